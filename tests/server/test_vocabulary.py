"""Inputs of 16 bits and an 8-bit vocabulary, served: the start-up line, and the simulation's numbers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import offline
from benchmarks.accuracy.scores import score
from benchmarks.common.server import Server, serve
from infoquant_vllm.kernels.dispatch import backend
from offline.evaluate.simulate import load_simulated
from tests.common.tiny import VOCAB_SIZE, write_source

SITE = {"input_activations": {"num_bits": 16}}
RECIPE = {
    "name": "w4a16",
    "transform": "hadamard",
    "rounding": "rtn",
    "sites": {"qkv": SITE, "o": SITE, "gate_up": SITE, "down": SITE},
    "lm_head_bits": 8,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W4A16KV4 of a tiny tied model, whose 272 tokens vLLM pads to 320."""
    folder = tmp_path_factory.mktemp("vocabulary")
    recipe = offline.Recipe.model_validate(RECIPE)
    offline.quantize(write_source(folder / "source"), folder / "w4a16", recipe=recipe, progress=lambda *_: None)
    return folder / "w4a16"


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    arguments = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256")
    with serve(checkpoint, checkpoint.with_name("server.log"), *arguments) as running:
        yield running


def test_the_start_up_line_names_both(server: Server) -> None:
    line = server.logged(r"infoquant: (.+)")
    assert f"8 linears W4A16 ({backend('cpu').name})" in line
    assert f"lm_head W8A16 ({backend('cpu').name}) holds" in line


def test_served_is_what_the_simulation_computes(server: Server, checkpoint: Path) -> None:
    windows = torch.randint(3, VOCAB_SIZE - 13, (4, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = load_simulated(checkpoint, torch.float32)(windows[:, :-1]).logits.double()
    simulated = -logits.log_softmax(-1).gather(-1, windows[:, 1:, None]).squeeze(-1)
    alone, together = (score(server, windows, top=1, concurrent=count).nll for count in (1, 4))
    difference = (alone - simulated).abs()
    print(f"|difference of NLL| {difference.mean():.2e} on average, {difference.max():.2e} at most")
    assert simulated.std() > 0.5
    assert difference.mean() <= 1e-3
    assert (together - alone).abs().mean() <= 1e-4
