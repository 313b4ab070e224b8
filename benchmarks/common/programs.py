"""Command lines that start vLLM and the `infoquant` tool with this Python."""

import sys

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
INFOQUANT = (sys.executable, "-m", "offline")
DEMO_MODEL = (sys.executable, "-m", "benchmarks.common.demo_model")
"""They name modules, since a package that was only unpacked has no executables."""
