"""Measure the memory of served models: weights, tokens of the KV cache, and the worker's peak.

vLLM's engine loads each model in its own process. Weights are all tensors that the model's modules hold, each storage
counted once, and the copies that oneDNN holds instead of them in its own layout.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common.provenance import provenance, write_rows
from benchmarks.common.server import vllm_environment

if TYPE_CHECKING:
    from vllm import LLM

KV_GIB = 1
PROMPT_TOKENS = 512


def main() -> None:
    """Measure, print a table and write --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.memory", description=__doc__)
    parser.add_argument(
        "models", type=Path, nargs="+", help="folders of models; the others are compared with the first"
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)  # the worker of `measure`
    options = parser.parse_args()
    if options.in_process:
        print(json.dumps(figures(options.models[0])))
        return
    rows = compare([measure(model) for model in options.models])
    Console().print(table(rows))
    if options.json:
        write_rows(rows, options.json)


def measure(model: Path) -> dict[str, Any]:
    """Return the figures of one model, which a new process loads."""
    environment = vllm_environment(KV_GIB) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", "benchmarks.speed.memory", str(model), "--in-process"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{model} was not loaded, exit code {done.returncode}:\n{done.stderr[-4000:]}")
    return {"model": model.name} | json.loads(done.stdout.splitlines()[-1]) | provenance(0)


def figures(model: Path) -> dict[str, int]:
    """Load a model into this process, run a prompt, and return the bytes and tokens that the process holds."""
    from vllm import LLM, SamplingParams

    engine = LLM(str(model), enforce_eager=True, max_model_len=2 * PROMPT_TOKENS)
    engine.generate({"prompt_token_ids": [5] * PROMPT_TOKENS}, SamplingParams(max_tokens=8), use_tqdm=False)
    cache = engine.llm_engine.vllm_config.cache_config
    assert cache.num_gpu_blocks is not None  # set when the engine has made its cache
    return {
        "weight_bytes": engine.apply_model(held_bytes)[0] + onednn_bytes(engine),
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def held_bytes(model: torch.nn.Module) -> int:
    """Count the bytes of all tensors that a model's modules hold except the KV cache, each storage once."""
    storages = {}
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        for owner in (module, getattr(module, "quant_method", None)):
            own = vars(owner) if owner is not None else {}
            held += [value for name, value in own.items() if not name.startswith("_") and name != "kv_cache"]
        for tensor in _tensors(held):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def onednn_bytes(engine: "LLM") -> int:
    """Count the bytes of the weights that oneDNN holds outside of torch, in its own layout, instead of the linears.

    They are bf16; int8 where vLLM quantizes to 8 bits, except lm_head.
    """
    from vllm._custom_ops import CPUDNNLGEMMHandler

    config = engine.llm_engine.vllm_config
    gc.unfreeze()  # vLLM freezes what it loaded, which hides it from get_objects
    handlers = [each for each in gc.get_objects() if isinstance(each, CPUDNNLGEMMHandler)]
    vocab_size = config.model_config.get_vocab_size()
    are_bf16 = [config.quant_config is None or each.n >= vocab_size for each in handlers]
    return sum(each.k * each.n * (2 if bf16 else 1) for each, bf16 in zip(handlers, are_bf16, strict=True))


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the ratios to the first row."""
    names = {"weight_bytes": "weights_over_first", "kv_tokens": "kv_tokens_over_first", "peak_bytes": "peak_over_first"}
    return [row | {ratio: row[name] / rows[0][name] for name, ratio in names.items()} for row in rows]


def table(rows: list[dict[str, Any]]) -> Table:
    """Format the rows for a terminal."""
    printed = Table(title="What a worker holds")
    for heading in ("model", "weights, MB", "ratio", f"KV tokens in {KV_GIB} GiB", "ratio", "peak, MB", "ratio"):
        printed.add_column(heading, justify="right")
    for row in rows:
        printed.add_row(
            row["model"],
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['weights_over_first']:.3f}",
            f"{row['kv_tokens']:,}",
            f"{row['kv_tokens_over_first']:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['peak_over_first']:.2f}",
        )
    return printed


if __name__ == "__main__":
    main()
