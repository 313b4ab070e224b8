"""Write safetensors files tensor by tensor, with sizes that are known before the first one.

The library serializes whole files at once; a checkpoint larger than memory needs each file at full size first, and
each tensor written to its place as it comes. The layout is the library's (https://huggingface.co/docs/safetensors):
eight bytes with the length of the header, the header as JSON padded with spaces to a multiple of eight, the tensors.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from infoquant_vllm.format import INDEX_FILE, QuantizationConfigData, TensorSpec, expected_tensors
from offline.errors import ToolError
from offline.model.source import Source

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
}
"""In the order that tensors have in a file, which keeps each aligned to its own size."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the library reads no longer header
LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def checkpoint_specs(source: Source, config: QuantizationConfigData) -> dict[str, TensorSpec]:
    """Return shape and dtype of every tensor that a run writes, embeddings and lm_head first, then layer by layer.

    Raises FormatError where config and model disagree.
    """
    default, specs = source.unquantized_dtype, expected_tensors(config, source.shape)
    found = {}
    for name in sorted(specs, key=_layer):
        dtype = default if _layer(name) >= 0 or name not in source.weight_map else source.dtype(name)
        found[name] = specs[name].model_copy(update={"dtype": specs[name].dtype or NAMES[dtype]})
    return found


def spec_bytes(spec: TensorSpec) -> int:
    """Return the size of a tensor whose dtype is known."""
    return torch.Size(spec.shape).numel() * DTYPES[str(spec.dtype)].itemsize


def plan_shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[list[str]]:
    """Assign names to shards in the order of `specs`, a new shard where the next tensor would exceed `shard_bytes`."""
    shards: list[list[str]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or size + spec_bytes(spec) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec_bytes(spec)
    return shards


def begin_file(file: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> dict[str, int]:
    """Create a file of full size that holds only its header; return the offset of each tensor in it."""
    order = list(DTYPES)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for name in sorted(specs, key=lambda name: (order.index(str(specs[name].dtype)), name)):
        start, end = end, end + spec_bytes(specs[name])
        header[name] = {"dtype": specs[name].dtype, "shape": list(specs[name].shape), "data_offsets": [start, end]}
        offsets[name] = start
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER_BYTES:
        raise ToolError(f"{file}: a header of {len(encoded)} bytes, at most {MAX_HEADER_BYTES}; use smaller shards")
    with file.open("wb") as opened:
        opened.write(len(encoded).to_bytes(8, "little") + encoded)
        opened.truncate(8 + len(encoded) + end)
    return {name: 8 + len(encoded) + start for name, start in offsets.items()}


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes as a file holds them; a view where it is contiguous and in main memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


class ShardWriter:
    """Write the shards of one checkpoint, created at full size; tensors come in any order and go to their places."""

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], shard_bytes: int):
        self._folder, self._specs = folder, dict(specs)
        self._places: dict[str, tuple[Path, int]] = {}
        self._missing = set(specs)
        shards = plan_shards(specs, shard_bytes)
        for number, names in enumerate(shards, start=1):
            file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            offsets = begin_file(file, {name: self._specs[name] for name in names}, {"format": "pt"})
            self._places |= {name: (file, offset) for name, offset in offsets.items()}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor of the shape and dtype in its spec."""
        spec = self._specs[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES[str(spec.dtype)]:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {spec.dtype} {list(spec.shape)}")
        file, offset = self._places[name]
        with file.open("r+b") as opened:
            opened.seek(offset)
            opened.write(raw_bytes(tensor))
        self._missing.discard(name)

    def finish(self) -> None:
        """Write the index; raise ValueError where a tensor was not written."""
        if self._missing:
            raise ValueError(f"{min(self._missing)} was not written ({len(self._missing)} such tensors)")
        index = {
            "metadata": {"total_size": sum(map(spec_bytes, self._specs.values()))},
            "weight_map": {name: self._places[name][0].name for name in sorted(self._places)},
        }
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _layer(name: str) -> int:
    """Return the decoder layer of a tensor, -1 for those outside."""
    found = LAYER.match(name)
    return -1 if found is None else int(found[1])
