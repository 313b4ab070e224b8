#!/usr/bin/env bash
# Correctness, then timings, on a machine with one NVIDIA GPU of compute capability 8.0 or more, beside vLLM for CUDA:
#   benchmarks/gpu/run.sh BF16_MODEL W4A4KV4_CHECKPOINT OUTPUT_FOLDER
# Linears and served models are compared with bf16, FP8, Marlin W4A16, vLLM's own W4A4 (these two rounded to nearest, for
# speed alone), served ones also with its 4-bit cache.
set -eu
cd "$(dirname "$0")/../.."
model=$1 checkpoint=$2 output=$3
mkdir -p "$output"
python -m benchmarks.gpu.kernels --json "$output/kernels.json"
python -m benchmarks.gpu.linears --json "$output/linears.json"
for format in w4a16 w4a4; do
    [ -d "$output/$format" ] || python -m benchmarks.peers "$format" "$model" "$output/$format"
done
python -m benchmarks.gpu.served "$model" "$checkpoint" --w4a16 "$output/w4a16" --w4a4 "$output/w4a4" \
    --json "$output/served.json"
