"""`python -m offline` is the `infoquant` command."""

from offline.cli.main import main

main()
