"""Count the arithmetic that a checkpoint adds while serving, and read its size and quantizing time from its report."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infoquant_vllm.format import (
    InputTransform,
    ModelShape,
    QuantizationConfigData,
    hadamard_dense,
    parse_config,
    read_json,
)

REPORT_FILE = "infoquant_report.json"


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds per token: `own` in linears and lm_head of the unquantized model, `added` by online transforms."""

    own: int
    added: int


def multiply_adds(shape: ModelShape, config: QuantizationConfigData | None) -> MultiplyAdds:
    """Count the multiply-adds of a decoded token that do not depend on the length of its context.

    `added` counts, per layer, the input transforms (once for linears that share their input) and R3, the
    Hadamard on queries and keys; for a tied model with `online_r1` also two multiplications by
    [hidden, hidden], after the embedding and before lm_head. Rotations fused into weights cost nothing.
    The element-wise work of the quantizers is not counted, and attention itself in neither figure.
    """
    linears = [(name, size) for name, size in shape.linears().items() if not _is_idle(name, shape)]
    own = sum(rows * features for _, (rows, features) in linears) + shape.vocab_size * shape.hidden_size
    if config is None:
        return MultiplyAdds(own, 0)
    added = 0
    for module, (_, features) in linears:
        scheme = config.scheme(module)
        if scheme is not None and module.endswith(tuple(shared[0] for shared in shape.sites.values())):
            added += features * per_feature(scheme.input_transform)
    if config.kv_cache is not None and config.kv_cache.key_transform == "hadamard":
        heads = shape.num_attention_heads + shape.num_key_value_heads
        added += shape.num_hidden_layers * heads * shape.head_dim * hadamard_adds(shape.head_dim)
    if config.online_r1:
        added += 2 * shape.hidden_size**2
    return MultiplyAdds(own, added)


def _is_idle(module: str, shape: ModelShape) -> bool:
    """Return whether a linear is of experts beyond as many as a token goes to."""
    expert = re.search(r"\.experts\.(\d+)\.", module)
    return expert is not None and int(expert[1]) >= shape.num_experts_per_tok


def per_feature(transform: InputTransform) -> int:
    """Return the multiply-adds per input feature: the summed sizes of the transform's matrices."""
    if transform.type == "hadamard" and transform.block_size is not None:
        return hadamard_adds(transform.block_size)
    if transform.factors is not None:
        return sum(transform.factors)
    return transform.block_size or 0


def hadamard_adds(size: int) -> int:
    """Return the additions per feature: the butterfly steps, and the order of a base Hadamard matrix."""
    order = len(hadamard_dense(size))
    return (size // order).bit_length() - 1 + (order if order > 1 else 0)


def costs(folder: Path) -> dict[str, Any]:
    """Return the cost fields of a result row; None for what the folder does not say.

    An unquantized model has the bits per weight of its dtype. Raises FormatError unless config.json is
    of a supported architecture, unquantized or quantized by InfoQuant.
    """
    hf_config = read_json(folder / "config.json")
    quantization = hf_config.get("quantization_config")
    config = None if quantization is None else parse_config(quantization, str(folder / "config.json"))
    counted = multiply_adds(ModelShape.from_hf(hf_config, str(folder / "config.json")), config)
    report = read_json(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else {}
    seconds = report.get("seconds")
    plain_bits = 32 if hf_config.get("dtype", hf_config.get("torch_dtype")) == "float32" else 16
    return {
        "bits_per_weight": plain_bits if config is None else report.get("bits_per_weight"),
        "multiply_adds": counted.own,
        "multiply_adds_added": counted.added,
        "quantizing_seconds": sum(seconds.values()) if seconds else None,
        "peak_memory_bytes": report.get("peak_memory_bytes"),
    }
