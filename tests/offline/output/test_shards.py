"""Shards written tensor by tensor have the bytes that the safetensors library writes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infoquant_vllm.format import TensorSpec
from offline.output.shards import DTYPES, ShardWriter, plan_shards, spec_bytes

GENERATOR = torch.Generator().manual_seed(0)
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TENSORS = {
    "b.weight": torch.randn(7, 3, generator=GENERATOR).bfloat16(),
    "a.codes": torch.randint(0, 255, (5, 9), generator=GENERATOR, dtype=torch.uint8),
    "c.scale": torch.randn(5, 1, generator=GENERATOR),
    "d.norm": torch.randn(11, generator=GENERATOR).half(),
}
SPECS = {name: TensorSpec(shape=tuple(t.shape), dtype=NAMES[t.dtype]) for name, t in TENSORS.items()}


def test_bytes_are_the_librarys_in_any_order_of_writing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, SPECS, 10**9)
    for name in reversed(TENSORS):
        writer.write(name, TENSORS[name])
    writer.finish()
    save_file(TENSORS, tmp_path / "library", metadata={"format": "pt"})
    assert (tmp_path / "model-00001-of-00001.safetensors").read_bytes() == (tmp_path / "library").read_bytes()


def test_shards_stay_within_their_size_and_hold_every_tensor_once(tmp_path: Path) -> None:
    plan = plan_shards(SPECS, 64)
    assert [name for shard in plan for name in shard] == list(SPECS)
    assert all(len(shard) == 1 or sum(spec_bytes(SPECS[name]) for name in shard) <= 64 for shard in plan)
    writer = ShardWriter(tmp_path, SPECS, 64)
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.finish()
    found: dict[str, torch.Tensor] = {}
    for file in sorted(tmp_path.glob(f"model-*-of-{len(plan):05d}.safetensors")):
        found |= load_file(file)
    assert len(plan) > 1
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_tensor_unlike_its_spec_and_missing_tensor_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, SPECS, 10**9)
    with pytest.raises(ValueError, match=r"c\.scale is .*float16 \[5, 1\], expected F32 \[5, 1\]"):
        writer.write("c.scale", TENSORS["c.scale"].half())
    with pytest.raises(ValueError, match=r"a\.codes was not written \(4 such"):
        writer.finish()
