"""Command lines of the programs that benchmarks start, in this Python's own environment."""

import sys

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
INFOQUANT = (sys.executable, "-m", "offline")
DEMO_MODEL = (sys.executable, "-m", "benchmarks.common.demo_model")
"""As modules: executables need not lie beside this Python, and need not exist where a package was unpacked."""
