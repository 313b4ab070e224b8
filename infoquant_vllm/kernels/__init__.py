"""Compute what the server computes: `torch` defines each operation, `cpu` and `triton` make it fast."""
