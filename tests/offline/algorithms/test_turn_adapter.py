"""A turned adapter does to the folded model what it did to the source, exactly."""

from pathlib import Path

import pytest
import torch

from infoquant_vllm.format import ARCHITECTURES, FUSED, R1, R2, SITES, ModelShape
from offline.algorithms.rotations import Transforms, random_hadamard, random_head_rotations
from offline.algorithms.turn_adapter import turn
from offline.model.hidden_states import HiddenStates
from offline.model.input_statistics import InputStatistics
from offline.model.source import Source
from offline.stages.equalize import equalize_layer
from offline.stages.fold import fold_layer
from tests.common.tiny import MIXTURES, SIZES, VOCAB_SIZE, write_source

RANK = 3
FIRST = [linears[0] for linears in SITES.values()]
DENSE = [size for size in SIZES if size not in MIXTURES]
CPU = [torch.device("cpu")]
Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]


def random_adapter(shape: ModelShape, seed: int) -> Adapter:
    """A [RANK, K] and B [N, RANK] of every linear of a layer, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        linear: (torch.randn(RANK, k, generator=generator) / k**0.5, torch.randn(n, RANK, generator=generator) / 2)
        for linear, (n, k) in shape.layer_linears.items()
    }


def merged(state: dict[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    return state | {f"{name}.weight": state[f"{name}.weight"] + (b @ a).float() for name, (a, b) in adapter.items()}


@pytest.mark.parametrize("size", DENSE)
def test_the_folded_model_with_turned_adapters_is_the_merged_source(tmp_path: Path, size: str) -> None:
    source = Source.open(write_source(tmp_path / "source", **SIZES[size]))
    shape, generator = source.shape, torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB_SIZE, (2, 32), generator=generator)
    fixed = ARCHITECTURES[shape.architecture].norms_behind
    residual = None if fixed else random_hadamard(shape.hidden_size, generator)
    transforms = Transforms(residual, random_head_rotations(shape, generator))
    ours, theirs, plain, equalized = (
        HiddenStates(source, tokens, folded, CPU) for folded in (transforms, None, None, transforms)
    )
    for layer in range(shape.num_hidden_layers):
        adapter, statistics, state = (
            random_adapter(shape, layer),
            InputStatistics(),
            fold_layer(source, layer, transforms),
        )
        equalized.forward_layer(state, FIRST, statistics.observe)
        scales = equalize_layer(state, statistics.take_hessians(), statistics, shape)
        assert transforms.heads is not None
        basis = scales.folded | {R2: transforms.heads[layer]} | ({} if residual is None else {R1: residual})
        basis |= {
            f"{norm}.weight": source.tensor(f"model.layers.{layer}.{norm}.weight") for norm in shape.norm_of.values()
        }
        turned = {name: turn(name, a, b, basis, shape) for name, (a, b) in adapter.items()}
        ours.forward_layer(merged(state, turned), [], lambda *_: None)
        unfolded = fold_layer(source, layer, None)
        theirs.forward_layer(merged(unfolded, adapter), [], lambda *_: None)
        plain.forward_layer(unfolded, [], lambda *_: None)
    found = ours.values if residual is None else ours.values @ residual.float().T
    assert relative(plain.values, theirs.values) > 0.1
    assert relative(found, theirs.values) < 1e-4


@pytest.mark.parametrize("fused", FUSED)
def test_an_adapter_of_a_fused_linear_is_turned_as_its_parts(tmp_path: Path, fused: str) -> None:
    source = Source.open(write_source(tmp_path / "source", **SIZES["phi3"]))
    shape, generator = source.shape, torch.Generator().manual_seed(1)
    kv_heads, size = shape.num_key_value_heads, shape.head_dim
    basis = {
        R1: random_hadamard(shape.hidden_size, generator),
        R2: random_head_rotations(shape, generator)[0],
        "self_attn.key_scale": torch.rand(kv_heads, size, generator=generator) + 0.5,
        "mlp.down_scale": torch.rand(shape.intermediate_size, generator=generator) + 0.5,
    }
    parts = random_adapter(shape, 0)
    a = parts[FUSED[fused][0]][0]
    together = turn(fused, a, torch.cat([parts[part][1] for part in FUSED[fused]]), basis, shape)
    apart = [turn(part, a, parts[part][1], basis, shape) for part in FUSED[fused]]
    assert all(torch.equal(together[0], own) for own, _ in apart)
    assert torch.equal(together[1], torch.cat([b for _, b in apart]))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
