#!/usr/bin/env bash
# Correctness, then timings, on a machine with one NVIDIA GPU of compute capability 8.0 or more:
#   benchmarks/gpu/run.sh OUTPUT [--stage smoke,tests] [--budget SECONDS] [--checkpoint FOLDER] [--dry-run]
# Paths are relative to the repository. Where vLLM is not installed, what `make gpu-pack` packed is unpacked first.
cd "$(dirname "$0")/../.." || exit
python=${PYTHON:-python3}
has_vllm='import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'
[ ! -e .gpu/unpack.sh ] || "$python" -c "$has_vllm" || . .gpu/unpack.sh
exec "$python" -m benchmarks.gpu.run "$@"
