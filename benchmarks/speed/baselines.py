"""Write checkpoints in the other integer formats that vLLM serves, rounded to nearest, to measure speed.

The formats are those of compressed-tensors: W8A8 (`int-quantized`; weights per row, activations per token), W4A16
(`pack-quantized`; weights in groups of 64) and W4A4 (the same weights, symmetric activations per token; for GPUs, where
vLLM serves it by Humming). On CPUs vLLM's GPTQ and AWQ layers run the same kernel as W4A16; its W4A8 needs AMX.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from offline.output.atomic import atomic_folder

GROUP = 64
ON_CPUS = ("w8a8", "w4a16")


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.baselines", description=__doc__)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("model", type=Path, help="folder of a bf16 model")
    parser.add_argument("output", type=Path, help="folder to make")
    options = parser.parse_args()
    convert(options.format, options.model, options.output)


def convert(name: str, model: Path, output: Path) -> None:
    """Write `model` in the format `name` (see FORMATS) to the new folder `output`."""
    quantize, config = FORMATS[name]
    with atomic_folder(output) as folder:
        for file in model.iterdir():
            if file.suffix in (".json", ".txt", ".jinja", ".model") and not file.name.endswith(".index.json"):
                shutil.copy(file, folder)
        for shard in sorted(model.glob("*.safetensors")):
            save_file(_converted(shard, quantize), folder / shard.name, metadata={"format": "pt"})
        _write_index(folder)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}, indent=2))


def _converted(shard: Path, quantize: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(shard, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            tensor = opened.get_tensor(name)
            if name.endswith("_proj.weight"):
                module = name.removesuffix(".weight")
                tensors |= {f"{module}.{key}": value for key, value in quantize(tensor.float()).items()}
            else:
                tensors[name] = tensor
    return tensors


def _write_index(folder: Path) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1:
        return
    weight_map: dict[str, str] = {}
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    return {"weight": torch.round(weight / scale.float()).to(torch.int8), "weight_scale": scale}


def _int4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    grouped = weight.unflatten(1, (-1, GROUP))
    scale = (grouped.abs().amax(2, keepdim=True) / 7).bfloat16()
    codes = (torch.round(grouped / scale.float()).flatten(1) + 8).to(torch.int64).unflatten(1, (-1, 8))
    words = (codes << torch.arange(0, 32, 4)).sum(2)
    packed = torch.where(words < 2**31, words, words - 2**32).to(torch.int32)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": packed, "weight_scale": scale.squeeze(2), "weight_shape": shape}


def _config(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    common = {"type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": common | {"dynamic": False} | weights,
        "input_activations": None if inputs is None else common | {"dynamic": True} | inputs,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FORMATS: dict[str, tuple[Callable[[torch.Tensor], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "w8a8": (
        _int8,
        _config("int-quantized", {"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "strategy": "token"}),
    ),
    "w4a16": (_int4, _config("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, None)),
    "w4a4": (
        _int4,
        _config(
            "pack-quantized",
            {"num_bits": 4, "strategy": "group", "group_size": GROUP},
            {"num_bits": 4, "strategy": "token"},
        ),
    ),
}
FLOAT8 = _config(
    "float-quantized",
    {"num_bits": 8, "type": "float", "strategy": "channel"},
    {"num_bits": 8, "type": "float", "strategy": "token"},
)
"""The scheme of vLLM's own FP8: weights per row, activations per token."""

if __name__ == "__main__":
    main()
