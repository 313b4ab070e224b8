"""`python -m offline` is the `infoquant` command."""

from offline.cli import main

main()
