"""Describe a checkpoint from its config, headers and records, without reading weights."""

import math
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from infoquant_vllm.format import (
    Checkpoint,
    FormatError,
    KVCacheArgs,
    LinearScheme,
    ModelShape,
    read_json,
)
from offline.errors import ToolError
from offline.output.report import REPORT_FILE, kv_bytes_per_token
from offline.output.shards import spec_bytes

BF16_BYTES = 2


class Size(BaseModel):
    """Bytes of one part on disk, and in the unquantized bfloat16 model (0 where that has no such part)."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    bf16_bytes: int


class Inspection(BaseModel):
    """The description of a checkpoint."""

    model_config = ConfigDict(frozen=True)

    checkpoint: str
    format_version: int
    shape: ModelShape
    schemes: dict[str, LinearScheme | None]
    """Scheme by the linear's name inside its layer, or by full name where layers differ; None: unquantized."""
    kv_cache: KVCacheArgs | None
    rotated_residual: bool
    lm_head_bits: int | None
    """Bits of lm_head and, in a tied model, of the embeddings; None: unquantized."""
    sizes: dict[str, Size]
    bits_per_weight: float
    """Bits on disk per weight of the decoder's linears, with scales and transforms."""
    kv_bytes_per_token: int
    kv_bf16_bytes_per_token: int
    recipe: dict[str, Any] | None
    report: dict[str, Any] | None


def inspect_checkpoint(folder: str | Path) -> Inspection:
    """Describe a checkpoint; raise ToolError where its headers do not agree with its config."""
    try:
        checkpoint = Checkpoint(folder)
        report = checkpoint.folder / REPORT_FILE
        found = read_json(report) if report.is_file() else None
    except FormatError as error:
        raise ToolError(str(error)) from None
    sizes = part_sizes(checkpoint)
    shape, cache = checkpoint.shape, checkpoint.config.kv_cache
    weights = sum(math.prod(size) for size in shape.linears().values())
    return Inspection(
        checkpoint=str(folder),
        format_version=checkpoint.config.format_version,
        shape=shape,
        schemes=_schemes(checkpoint),
        kv_cache=cache,
        rotated_residual=checkpoint.config.online_r1,
        lm_head_bits=checkpoint.config.lm_head_bits,
        sizes=sizes,
        bits_per_weight=8 * sizes["linears"].bytes / weights,
        kv_bytes_per_token=kv_bytes_per_token(shape, cache, BF16_BYTES),
        kv_bf16_bytes_per_token=kv_bytes_per_token(shape, None, BF16_BYTES),
        recipe=_recipe(checkpoint.folder / "infoquant_recipe.yaml"),
        report=found,
    )


def scheme_words(scheme: LinearScheme | None) -> tuple[str, str, str]:
    """Describe weights, inputs and input transform of a linear in words."""
    if scheme is None:
        return "unquantized", "unquantized", "none"
    weights, inputs, transform = scheme.weights, scheme.input_activations, scheme.input_transform
    shape = transform.block_size or transform.factors or ""
    words = [
        f"{args.num_bits} bits, {'symmetric' if args.symmetric else 'asymmetric'}, per {args.strategy}"
        + (f" of {args.group_size}" if args.group_size else "")
        for args in (weights, inputs)
    ]
    segments = f", a scale per segment of {inputs.segment_size}" if inputs.segment_size else ""
    mean = ", less the mean" if inputs.mean else ""
    activations = "int16 per token" if inputs.num_bits == 16 else words[1] + segments + mean
    return words[0], activations, f"{transform.type} {shape}".strip()


def part_sizes(checkpoint: Checkpoint) -> dict[str, Size]:
    """Sum up the bytes of linears, embeddings, norms, R1 and cache parameters, and of all together."""
    parts = ["linears", "embeddings", "norms", "R1", "cache parameters", "total"]
    sizes = {part: [0, 0] for part in parts + ["routers"] * bool(checkpoint.shape.gates)}
    linears = checkpoint.shape.linears()
    for name, spec in checkpoint.headers.items():
        for part in (_part(name, linears), "total"):
            sizes[part][0] += spec_bytes(spec)
            sizes[part][1] += _plain_bytes(name, spec.shape, linears)
    return {part: Size(bytes=stored, bf16_bytes=plain) for part, (stored, plain) in sizes.items()}


def _part(name: str, linears: dict[str, tuple[int, int]]) -> str:
    module, _, kind = name.rpartition(".")
    if module in linears:
        return "linears"
    if kind in ("key_clip_ratio", "value_clip_ratio", "key_mean", "key_feedback"):
        return "cache parameters"
    if kind in ("r1", "final_norm_weight"):
        return "R1"
    if module.endswith("gate"):
        return "routers"
    return "norms" if "norm" in module else "embeddings"


def _plain_bytes(name: str, shape: tuple[int, ...], linears: dict[str, tuple[int, int]]) -> int:
    """Return the bytes of the corresponding tensor in the unquantized bfloat16 model."""
    module, _, kind = name.rpartition(".")
    if kind == "weight_packed":
        return (math.prod(linears[module]) if module in linears else math.prod(shape)) * BF16_BYTES
    return math.prod(shape) * BF16_BYTES if kind in ("weight", "bias") else 0


def _schemes(checkpoint: Checkpoint) -> dict[str, LinearScheme | None]:
    """Return schemes by the linears' names inside their layer, by full names for linears whose layers differ."""
    by_module = {module: checkpoint.config.scheme(module) for module in checkpoint.shape.linears()}
    by_end: dict[str, list[LinearScheme | None]] = {}
    for module, scheme in by_module.items():
        by_end.setdefault(_end(module), []).append(scheme)
    same = {end: schemes[0] for end, schemes in by_end.items() if all(scheme == schemes[0] for scheme in schemes)}
    return same | {module: scheme for module, scheme in by_module.items() if _end(module) not in same}


def _end(module: str) -> str:
    """Return the name of a linear inside its block; all experts of a mixture have the same one."""
    return ".".join([part for part in module.split(".") if not part.isdigit()][-2:])


def _recipe(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ToolError(f"{file}: not readable as YAML ({error})") from None
    return found if isinstance(found, dict) else None
