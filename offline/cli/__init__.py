"""The `infoquant` command."""
