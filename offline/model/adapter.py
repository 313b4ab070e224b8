"""Read a LoRA adapter as PEFT writes it, and refuse what cannot be turned or vLLM does not serve.

A downloaded adapter is hostile input: numbers are bounded and names are checked before tensors are read.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from infoquant_vllm.format import ARCHITECTURES, FUSED, ModelShape, TensorSpec, read_header, read_json
from offline.errors import ToolError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = "lora_A.weight", "lora_B.weight"
NAME = re.compile(rf"{re.escape(PREFIX)}model\.layers\.(0|[1-9]\d{{0,3}})\.([\w.]+)\.({re.escape(A)}|{re.escape(B)})")
TURNED = ".infoquant_"
DTYPES = ("BF16", "F16", "F32")
LARGEST_RANK, LARGEST_ALPHA = 4096, 10**6
REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "biases of adapters",
    "modules_to_save": "whole modules beside the adapter",
    "trainable_token_indices": "trained rows of the embedding",
    "target_parameters": "adapters of parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "fan_in_fan_out": "transposed weights",
}
"""Fields of adapter_config.json that change what an adapter computes."""
INITIAL = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Ways to initialize that leave the weights of the source as they are."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of the linears of a decoder.

    linears: layer, name inside the layer, and rank of each
    """

    folder: Path
    config: dict[str, Any]
    linears: dict[str, tuple[int, str, int]]

    @classmethod
    def open(cls, folder: Path, shape: ModelShape) -> "Adapter":
        """Check config, names, shapes and dtypes; raises ToolError or FormatError for the first thing wrong."""
        config = read_json(folder / CONFIG)
        _check_config(config, folder / CONFIG)
        if not (folder / WEIGHTS).is_file():
            raise ToolError(f"{folder / WEIGHTS}: no such file; save the adapter as safetensors")
        return cls(folder, config, _linears(read_header(folder / WEIGHTS), folder / WEIGHTS, shape))

    def matrices(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A [rank, K] and B [N, rank] of a linear as they are stored."""
        file = self.folder / WEIGHTS
        with safe_open(file, framework="pt") as opened:
            a, b = (opened.get_tensor(f"{PREFIX}{module}.{part}") for part in (A, B))
        for part, tensor in ((A, a), (B, b)):
            if not torch.isfinite(tensor).all():
                raise ToolError(f"{file}: {module}.{part} holds NaN or Inf; train the adapter again")
        return a, b

    @property
    def largest_rank(self) -> int:
        """Return the largest rank of all linears."""
        return max(rank for _, _, rank in self.linears.values())

    def scale(self, module: str) -> float:
        """Return the factor on B A: alpha / rank, or alpha / sqrt(rank) of a rank-stabilized adapter, as in PEFT.

        The first key of `alpha_pattern` that ends the module's name stands for `lora_alpha`.
        """
        patterns = self.config.get("alpha_pattern") or {}
        found = [value for key, value in patterns.items() if module == key or module.endswith(f".{key}")]
        alpha, rank = (found or [self.config["lora_alpha"]])[0], self.linears[module][2]
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _check_config(config: dict[str, Any], file: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ToolError(f"{file}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for field, meaning in REFUSED.items():
        if config.get(field):
            raise ToolError(f"{file}: {field} is {config[field]!r}: {meaning} cannot be turned; merge the adapter")
    if config.get("bias", "none") != "none":
        raise ToolError(f"{file}: bias is {config['bias']!r}, expected 'none'; merge the adapter")
    initial = config.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.lower() not in INITIAL:
        raise ToolError(
            f"{file}: init_lora_weights is {initial!r}, which changes the weights of the source; "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ToolError(f"{file}: alpha_pattern is {patterns!r}, expected an object")
    for key in patterns:
        if not re.fullmatch(r"[\w.]+", key):
            raise ToolError(f"{file}: alpha_pattern names {key!r}, only the ends of modules' names are read")
    for name, value in {"lora_alpha": config.get("lora_alpha"), **patterns}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_ALPHA:
            raise ToolError(f"{file}: {name} is {value!r}, expected a number of at most {LARGEST_ALPHA}")


def _linears(headers: dict[str, TensorSpec], file: Path, shape: ModelShape) -> dict[str, tuple[int, str, int]]:
    """Return the linears of an adapter; raises ToolError naming the first tensor that is wrong."""
    sizes = _sizes(shape)
    found: dict[str, tuple[int, str, int]] = {}
    counts: Counter[str] = Counter()
    for name, spec in sorted(headers.items()):
        if TURNED in name:
            raise ToolError(f"{file}: {name} is turned already; give the adapter as it was trained")
        parts = NAME.fullmatch(name)
        if parts is None or parts[2] not in sizes or int(parts[1]) >= shape.num_hidden_layers:
            raise ToolError(
                f"{file}: {name} is no A or B of a linear in a decoder layer of the model "
                f"({shape.num_hidden_layers} layers: {', '.join(sorted(sizes))}); other adapters are not served"
            )
        (rows, columns), first = sizes[parts[2]], parts[3] == A
        rank = spec.shape[0 if first else -1] if spec.shape else 0
        expected = (rank, columns) if first else (rows, rank)
        if spec.dtype not in DTYPES or spec.shape != expected or not 1 <= rank <= LARGEST_RANK:
            raise ToolError(
                f"{file}: {name} is {spec.dtype} {list(spec.shape)}, expected {', '.join(DTYPES)} and "
                f"{f'[rank, {columns}]' if first else f'[{rows}, rank]'} with a rank of 1 .. {LARGEST_RANK}"
            )
        module = name.removeprefix(PREFIX).removesuffix(f".{parts[3]}")
        known = found.setdefault(module, (int(parts[1]), parts[2], rank))
        if known[2] != rank:
            raise ToolError(f"{file}: {module} has an A of rank {known[2]} and a B of rank {rank}")
        counts[module] += 1
    alone = [module for module, count in counts.items() if count != 2]
    if alone or not found:
        wrong = f"{alone[0]} has only one of {A} and {B}" if alone else "holds no tensors"
        raise ToolError(f"{file}: {wrong}; save the adapter again")
    return found


def _sizes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Return the linears of a decoder layer by the source's names: (out_features, in_features)."""
    sizes = dict(shape.layer_linears)
    if ARCHITECTURES[shape.architecture].fused:
        for fused, parts in FUSED.items():
            own = [sizes.pop(part) for part in parts]
            sizes[fused] = sum(rows for rows, _ in own), own[0][1]
    return sizes
