"""Balanced scales keep the function and lower the noise that they are chosen against."""

from pathlib import Path

import pytest
import torch

from offline.balance import balance_down, balance_keys, balance_layer
from offline.fold import fold_layer
from offline.recipe import SITES
from offline.source import Source
from offline.stream import Statistics, Stream
from tests.tiny import SIZES, VOCAB_SIZE, write_source


@pytest.mark.parametrize("size", SIZES)
def test_balanced_model_gives_the_sources_logits(tmp_path: Path, size: str) -> None:
    source = Source.open(write_source(tmp_path / "source", **SIZES[size]))
    tokens = torch.randint(3, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(2))
    stream = Stream(source, tokens, None, torch.device("cpu"))
    model = source.model(torch.float32)
    expected = model(tokens).logits
    for number, layer in enumerate(model.model.layers):
        state, statistics = fold_layer(source, number, None), Statistics()
        before = state["mlp.down_proj.weight"]
        stream.advance(state, [linears[0] for linears in SITES.values()], statistics.observe)
        balance_layer(state, statistics.hessians(), statistics.energies, source.shape)
        assert not torch.allclose(state["mlp.down_proj.weight"], before, rtol=0.01)
        layer.load_state_dict(state)
    found = model(tokens).logits
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-4


def test_down_input_times_weight_norm_is_smallest_where_balanced() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(64, generator=generator).exp()
    x = torch.randn(500, 64, generator=generator) * spread
    state = {
        "mlp.down_proj.weight": torch.randn(32, 64, generator=generator) * spread.flip(0),
        "mlp.up_proj.weight": torch.eye(64),
    }
    before = x.norm() * state["mlp.down_proj.weight"].norm()
    hessian = balance_down(state, x.T @ x, x.square().sum(0))
    scaled = x @ state["mlp.up_proj.weight"].T
    torch.testing.assert_close(hessian, scaled.T @ scaled, rtol=1e-3, atol=1e-3)
    after = scaled.norm() * state["mlp.down_proj.weight"].norm()
    assert after < 0.8 * before
    best = (x.norm(dim=0) * (state["mlp.down_proj.weight"] * state["mlp.up_proj.weight"].diagonal()).norm(dim=0)).sum()
    torch.testing.assert_close(after, best)


def test_keys_and_queries_have_like_energies_in_every_pair_where_balanced(tmp_path: Path) -> None:
    source = Source.open(write_source(tmp_path / "source"))
    shape, state = source.shape, fold_layer(source, 0, None)
    state["self_attn.k_proj.weight"] *= torch.linspace(0.1, 3, 128)[:, None]
    balance_keys(state, torch.eye(shape.hidden_size), shape)
    queries = state["self_attn.q_proj.weight"].view(2, 2, 2, 32, -1).square().sum((1, 2, 4))
    keys = state["self_attn.k_proj.weight"].view(2, 2, 32, -1).square().sum((1, 3))
    ratio = queries / keys
    torch.testing.assert_close(ratio, ratio.mean(1, keepdim=True).expand_as(ratio))
