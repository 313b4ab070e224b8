"""Served models on this GPU, by `vllm bench throughput`, each format in a process of its own, one after the other."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.gpu.kernels import device_provenance
from benchmarks.provenance import write_rows
from benchmarks.server import vllm_environment

SHAPES = {"decode": (128, 512, 64), "prompts": (2048, 16, 32), "long": (16000, 128, 4)}
"""Tokens in, tokens out, requests."""


def main() -> None:
    """Measure, print rows and write --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.served", description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the bf16 model")
    parser.add_argument("checkpoint", type=Path, help="folder of the W4A4KV4 one")
    parser.add_argument("--w4a16", type=Path, help="folder of one that vLLM serves with Marlin")
    parser.add_argument("--w4a4", type=Path, help="folder of one in vLLM's own W4A4")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    served = formats(options.model, options.checkpoint, options.w4a16, options.w4a4)
    rows = [measure(name, arguments, shape) for name, arguments in served.items() for shape in SHAPES]
    for row in rows:
        Console().print(row)
    if options.json:
        write_rows(rows, options.json)


def formats(model: Path, checkpoint: Path, w4a16: Path | None, w4a4: Path | None) -> dict[str, list[str]]:
    """Arguments of vLLM by what is served."""
    found = {
        "bf16": [str(model)],
        "W4A4KV4": [str(checkpoint)],
        "FP8": [str(model), "--quantization", "fp8"],
        "bf16, vLLM's 4-bit cache": [str(model), "--kv-cache-dtype", "int4_per_token_head"],
    }
    if w4a16 is not None:
        found["Marlin W4A16"] = [str(w4a16), "--linear-backend", "marlin"]  # vLLM may prefer another on new GPUs
    return found if w4a4 is None else found | {"vLLM's W4A4": [str(w4a4)]}


def measure(name: str, arguments: list[str], shape: str) -> dict[str, Any]:
    """One row; one that vLLM does not serve holds the end of its log instead of figures."""
    tokens_in, tokens_out, requests = SHAPES[shape]
    row = {"served": name, "shape": shape, "in": tokens_in, "out": tokens_out, "requests": requests}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [str(Path(sys.executable).with_name("vllm")), "bench", "throughput", "--model", *arguments]
        command += ["--input-len", str(tokens_in), "--output-len", str(tokens_out), "--num-prompts", str(requests)]
        command += ["--max-model-len", str(tokens_in + tokens_out + 64), "--output-json", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=vllm_environment())
        if done.returncode:
            return row | device_provenance() | {"problem": (done.stdout + done.stderr)[-2000:]}
        figures = json.loads(result.read_text())
    return row | device_provenance() | {name: figures[name] for name in ("requests_per_second", "tokens_per_second")}


if __name__ == "__main__":
    main()
