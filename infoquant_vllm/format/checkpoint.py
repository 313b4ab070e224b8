"""Read a checkpoint folder: check headers against the config, and values for plausibility."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from infoquant_vllm.format.errors import FormatError
from infoquant_vllm.format.schema import MAX_VALUE, QUANT_METHOD, parse_config
from infoquant_vllm.format.tensors import ModelShape, TensorSpec, expected_tensors

INDEX_FILE = "model.safetensors.index.json"
MAX_JSON_BYTES = 64 * 2**20
VALUES_PER_CHUNK = 2**22  # values checked at once; bounds peak memory
Rule = Callable[[torch.Tensor], torch.Tensor]
NEVER_ZERO = ("r1", "final_norm_weight", "input_blocks", "input_left", "input_right")


class Checkpoint:
    """Open a checkpoint folder and check that it holds the tensors its config requires, and no others.

    Read config.json, the index and the headers of the shards, but no tensor data.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        config_file = self.folder / "config.json"
        self.hf_config = read_json(config_file)
        if self.hf_config.get("quantization_config") is None:
            raise FormatError(f"{config_file}: no quantization_config; run `infoquant quantize` on the model first")
        self.config = parse_config(self.hf_config["quantization_config"], f"{config_file}: quantization_config")
        self.shape = ModelShape.from_hf(self.hf_config, str(config_file))
        self.weight_map = read_weight_map(self.folder)
        self.headers: dict[str, TensorSpec] = {}
        for shard in sorted(set(self.weight_map.values())):
            self.headers |= self._headers(shard)
        self._compare(self.headers)

    def tensor(self, name: str) -> torch.Tensor:
        """Load one tensor; raise FormatError if its values are invalid (see `check_values`, `check_multipliers`)."""
        file = self.folder / self.weight_map[name]
        with safe_open(file, framework="pt") as shard:
            tensor = shard.get_tensor(name)
        module, _, kind = name.rpartition(".")
        if kind == "weight_multiplier":
            zero_point = f"{module}.weight_zero_point"
            check_multipliers(tensor, self.tensor(zero_point) if zero_point in self.headers else None, name, str(file))
        else:
            check_values(tensor, name, str(file), self._largest_code(name), self.shape.norm_offset)
        return tensor

    def check_unquantized(self) -> None:
        """Load the weights of all norms and routers and check their values; nothing else checks them."""
        layers = range(self.shape.num_hidden_layers)
        gates = [f"model.layers.{layer}.{gate}" for layer in layers for gate in self.shape.gates]
        for module in (*self.shape.norms(), *gates):
            self.tensor(f"{module}.weight")

    def _largest_code(self, name: str) -> int | None:
        module, _, kind = name.rpartition(".")
        scheme = self.config.scheme(module) if kind == "weight_zero_point" else None
        return None if scheme is None else 2**scheme.weights.num_bits - 1

    def _headers(self, shard: str) -> dict[str, TensorSpec]:
        file = self.folder / shard
        if not file.exists():
            raise FormatError(f"{file}: the shard is missing, but {INDEX_FILE} lists it")
        found = read_header(file)
        stray = sorted(name for name in found if self.weight_map.get(name) != shard)
        if stray:
            raise FormatError(
                f"{file}: holds {stray[0]}, which {INDEX_FILE} does not place there ({len(stray)} such tensors)"
            )
        return found

    def _compare(self, found: dict[str, TensorSpec]) -> None:
        try:
            expected = expected_tensors(self.config, self.shape)
        except FormatError as error:
            raise FormatError(f"{self.folder / 'config.json'}: {error}") from None
        for name, spec in expected.items():
            if name not in found:
                raise FormatError(f"{self.folder}: tensor {name} {list(spec.shape)} is missing")
            file, header = self.folder / self.weight_map[name], found[name]
            if header.shape != spec.shape:
                raise FormatError(f"{file}: {name} has shape {list(header.shape)}, expected {list(spec.shape)}")
            if header.dtype not in ((spec.dtype,) if spec.dtype else ("BF16", "F16", "F32")):
                raise FormatError(f"{file}: {name} is {header.dtype}, expected {spec.dtype or 'BF16, F16 or F32'}")
        extra = sorted(set(found) - set(expected))
        if extra:
            file = self.folder / self.weight_map[extra[0]]
            raise FormatError(f"{file}: unexpected tensor {extra[0]} ({len(extra)} such tensors)")
        absent = sorted(set(self.weight_map) - set(found))
        if absent:
            file = self.folder / self.weight_map[absent[0]]
            raise FormatError(f"{file}: {INDEX_FILE} places {absent[0]!r} there, which it does not hold")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raise FormatError naming the file."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise FormatError(f"{file}: {file.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}")
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{file}: no such file") from None
    except FormatError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise FormatError(f"{file}: a JSON object was expected, found {type(data).__name__}")
    return data


def is_checkpoint(folder: Path) -> bool:
    """Return whether the folder's config.json says that InfoQuant quantized it."""
    try:
        found = read_json(folder / "config.json").get("quantization_config")
    except FormatError:
        return False
    return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD


def read_weight_map(folder: Path) -> dict[str, str]:
    """Read the index of a folder: the shard of every tensor; raises FormatError for names of other files."""
    file = folder / INDEX_FILE
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{file}: weight_map is missing or empty")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise FormatError(f"{file}: weight_map places {name} in {shard!r}, which is no safetensors file name")
    return weight_map


def read_header(file: Path) -> dict[str, TensorSpec]:
    """Read shape and dtype of every tensor in a safetensors file, no data."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            return {n: TensorSpec(shape=tuple(s.get_shape()), dtype=str(s.get_dtype())) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{file}: not a whole safetensors file ({error}); copy, download or quantize it again"
        ) from None


def check_values(
    tensor: torch.Tensor, name: str, source: str, largest_code: int | None = None, norm_offset: int = 0
) -> None:
    """Raise FormatError for values that no quantizer writes.

    Invalid are NaN and Inf anywhere, scales <= 0, clip ratios outside (0, 1], all-zero gains of norms (`norm_offset`
    more than their weights), embeddings and transforms, and zero-points above `largest_code`.
    """
    if not tensor.is_floating_point() and largest_code is None:
        return
    wrong, expected = _rule(tensor, name, largest_code, norm_offset)
    first, count = None, 0
    for start in range(0, tensor.numel(), VALUES_PER_CHUNK):
        bad = wrong(tensor.flatten()[start : start + VALUES_PER_CHUNK])
        if bad.any():
            first = start + int(bad.nonzero()[0]) if first is None else first
            count += int(bad.sum())
    if first is not None:
        raise FormatError(_wrong_values(tensor, first, count, expected, f"{source}: {name}"))


def check_multipliers(multiplier: torch.Tensor, zero_point: torch.Tensor | None, name: str, source: str) -> None:
    """Raise FormatError for multipliers [N, groups] of 0, and for those with which some code is no int8 value.

    zero_point: [N, groups], 0 .. 15; None: signed codes
    """
    reach = torch.full_like(multiplier, 8) if zero_point is None else torch.maximum(zero_point, 15 - zero_point)
    bad = ((multiplier < 1) | (multiplier.int() * reach > MAX_VALUE)).flatten()
    if bad.any():
        first = int(bad.nonzero()[0])
        farthest = int(reach.flatten()[first])
        expected = f"1 .. {MAX_VALUE // farthest}, since codes are up to {farthest} from their zero-point"
        raise FormatError(_wrong_values(multiplier, first, int(bad.sum()), expected, f"{source}: {name}"))


def _wrong_values(tensor: torch.Tensor, first: int, count: int, expected: str, name: str) -> str:
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape))
    return (
        f"{name}[{', '.join(map(str, index))}] is {tensor[index].item():g}, "
        f"expected {expected} ({count} of {tensor.numel()} are wrong)"
    )


def _rule(tensor: torch.Tensor, name: str, largest_code: int | None, norm_offset: int) -> tuple[Rule, str]:
    """Return a function that marks wrong values, and a description of the right ones."""
    kind = name.rsplit(".", 1)[-1]
    if kind == "weight_scale":
        return lambda x: ~torch.isfinite(x) | (x <= 0), "scales above 0"
    if kind in ("input_clip_ratio", "key_clip_ratio", "value_clip_ratio"):
        return lambda x: ~torch.isfinite(x) | (x <= 0) | (x > 1), "factors in (0, 1]"
    if kind in NEVER_ZERO or name.endswith(("norm.weight", "embed_tokens.weight")):
        zero = -norm_offset if name.endswith("norm.weight") else 0
        if not (tensor != zero).any():
            return lambda x: torch.ones_like(x, dtype=torch.bool), f"numbers other than {zero}"
    elif largest_code is not None:
        return lambda x: x > largest_code, f"codes up to {largest_code}"
    return _not_finite, "finite numbers"


def _not_finite(values: torch.Tensor) -> torch.Tensor:
    """Mark NaN and Inf; [1] where there is none, which their sum tells in a tenth of the time."""
    if torch.isfinite(values.sum(dtype=torch.float32)):
        return torch.zeros(1, dtype=torch.bool)
    return ~torch.isfinite(values)
