"""Kernels: `reference` says what each operation means, the other folders make it fast."""
