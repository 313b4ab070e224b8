#!/usr/bin/env bash
# Correctness, then timings, on a machine with one NVIDIA GPU of compute capability 8.0 or more, beside vLLM for CUDA:
#   benchmarks/gpu/run.sh BF16_MODEL W4A4KV4_CHECKPOINT OUTPUT_FOLDER
# Served models are compared with bf16, FP8, Marlin W4A16 (rounded to nearest, for speed alone) and vLLM's 4-bit cache.
set -eu
cd "$(dirname "$0")/../.."
model=$1 checkpoint=$2 output=$3
mkdir -p "$output"
python -m benchmarks.gpu.kernels --json "$output/kernels.json"
[ -d "$output/w4a16" ] || python -m benchmarks.peers w4a16 "$model" "$output/w4a16"
python -m benchmarks.gpu.served "$model" "$checkpoint" --w4a16 "$output/w4a16" --json "$output/served.json"
