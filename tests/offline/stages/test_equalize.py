"""Equalization keeps the function and minimizes the noise that its scales are chosen for."""

from pathlib import Path

import pytest
import torch

from infoquant_vllm.format import ARCHITECTURES, SITES
from offline.model.architectures import CausalLM
from offline.model.hidden_states import HiddenStates
from offline.model.input_statistics import InputStatistics
from offline.model.source import Source
from offline.stages.equalize import equalize_down, equalize_layer, equalize_mlp
from offline.stages.fold import fold_expert, fold_layer
from tests.common.tiny import SIZES, VOCAB_SIZE, write_source


@pytest.mark.parametrize("size", SIZES)
def test_equalized_model_gives_the_sources_logits(tmp_path: Path, size: str) -> None:
    source = Source.open(write_source(tmp_path / "source", **SIZES[size]))
    tokens = torch.randint(3, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(2))
    hidden = HiddenStates(source, tokens, None, [torch.device("cpu")])
    model, shape = source.model(torch.float32), source.shape
    expected = model(tokens).logits
    for number, layer in enumerate(model.model.layers):
        state, statistics = fold_layer(source, number, None), InputStatistics()
        modules = [linears[0] for linears in shape.sites.values() if f"{linears[0]}.weight" in state]
        hidden.forward_layer(state, modules, statistics.observe)
        equalize_layer(state, statistics.take_hessians(), statistics, shape)
        for expert in range(shape.num_experts):
            state |= equalized_expert(source, hidden, number, expert)
        for site, (down, *_) in shape.sites.items():
            before = source.tensor(f"model.layers.{number}.{down}.weight")
            assert not (site.endswith("down") and torch.allclose(state[f"{down}.weight"], before, rtol=0.01))
        layer.load_state_dict(state)
    found = model(tokens).logits
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-4


def equalized_expert(source: Source, hidden: HiddenStates, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """Run an expert after its layer, and return its equalized weights."""
    state, statistics = fold_expert(source, layer, expert, None), InputStatistics()
    hidden.forward_expert(expert, state, statistics.observe)
    names = source.shape.experts
    assert names is not None
    up, down = (f"{names.expert(expert)}.{name}" for name in (names.up, names.down))
    equalize_mlp(state, statistics.take_hessians(), statistics, up, down)
    return state


def test_down_input_times_weight_norm_is_smallest_when_equalized() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(64, generator=generator).exp()
    x = torch.randn(500, 64, generator=generator) * spread
    state = {
        "mlp.down_proj.weight": torch.randn(32, 64, generator=generator) * spread.flip(0),
        "mlp.up_proj.weight": torch.eye(64),
    }
    before = x.norm() * state["mlp.down_proj.weight"].norm()
    scaled = x * equalize_down(state, x.square().sum(0))
    torch.testing.assert_close(scaled, x @ state["mlp.up_proj.weight"].T)
    after = scaled.norm() * state["mlp.down_proj.weight"].norm()
    assert after < 0.8 * before
    best = (x.norm(dim=0) * (state["mlp.down_proj.weight"] * state["mlp.up_proj.weight"].diagonal()).norm(dim=0)).sum()
    torch.testing.assert_close(after, best)


@torch.no_grad()
def second_moments(
    model: CausalLM, modules: tuple[str, str], head_dim: int, tokens: torch.Tensor
) -> list[torch.Tensor]:
    """Second moments of the outputs of two modules of the first layer, [heads, channel pairs of RoPE]."""
    found: list[torch.Tensor] = []
    handles = [
        model.model.layers[0]
        .get_submodule(name)
        .register_forward_hook(lambda _, __, out: found.append(out.reshape(tokens.numel(), -1, 2, head_dim // 2)))
        for name in modules
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    return [out.square().sum((0, 2)) for out in found]


@pytest.mark.parametrize("size", ["tied", "biases", "qwen2", "qwen3"])
def test_equalized_keys_and_queries_have_equal_moments_in_every_channel_pair(tmp_path: Path, size: str) -> None:
    source = Source.open(write_source(tmp_path / "source", **SIZES[size]))
    shape, model = source.shape, source.model(torch.float32)
    query_module, key_module = ARCHITECTURES[shape.architecture].rope_inputs
    state, statistics = fold_layer(source, 0, None), InputStatistics()
    for name in state:
        if key_module in name:  # keys of uneven sizes, and biases that matter
            uneven = torch.linspace(0.1, 3, len(state[name]))
            state[name] = state[name] * uneven.view(-1, *[1] * (state[name].dim() - 1)) * (20 if "bias" in name else 1)
    tokens = torch.randint(3, VOCAB_SIZE, (8, 64), generator=torch.Generator().manual_seed(2))
    HiddenStates(source, tokens, None, [torch.device("cpu")]).forward_layer(
        state, [linears[0] for linears in SITES.values()], statistics.observe
    )
    equalize_layer(state, statistics.take_hessians(), statistics, shape)
    model.model.layers[0].load_state_dict(state)
    queries, keys = second_moments(model, (query_module, key_module), shape.head_dim, tokens)
    heads = 1 if key_module == "self_attn.k_norm" else shape.num_key_value_heads
    ratio = (x.reshape(heads, -1, shape.head_dim // 2).sum(1) for x in (queries, keys))
    logarithm = torch.log(next(ratio) / next(ratio))
    spread = (logarithm - logarithm.mean(1, keepdim=True)).abs().max().item()
    assert spread < (0.1 if size == "qwen3" else 1e-3)  # a head's tokens are not quite alike before its norm
