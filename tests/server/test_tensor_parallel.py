"""Servers of two pipeline stages and of two data-parallel engines say what one engine says."""

from pathlib import Path

import pytest
import torch

from benchmarks.common.server import Server, serve
from offline import PRESETS, quantize
from offline.progress import silent
from tests.common.engine import Engine
from tests.common.tiny import VOCAB_SIZE, write_source
from tests.offline.model.test_architectures import SMALL

PROMPTS = torch.randint(3, VOCAB_SIZE - 13, (8, 100), generator=torch.Generator().manual_seed(0)).tolist()
MAX_TOKENS = 8
SERVED = ("--dtype", "float32", "--max-model-len", "256")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fast`, of a tied model of two layers."""
    folder = tmp_path_factory.mktemp("workers")
    recipe = PRESETS["fast"].model_copy(update=SMALL)
    quantize(write_source(folder / "source"), folder / "checkpoint", recipe=recipe, progress=silent)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def alone(engine: Engine, checkpoint: Path) -> torch.Tensor:
    """Log-probabilities [prompts, tokens] that one engine gives."""
    (answers,) = engine.run(checkpoint, PROMPTS, max_tokens=MAX_TOKENS).answers
    return torch.tensor([answer.prompt + answer.logprobs for answer in answers])


def served(server: Server) -> torch.Tensor:
    """The same of a server, which is asked for all prompts at once."""
    answer = server.client().completions.create(
        model=str(server.model),
        prompt=PROMPTS,
        max_tokens=MAX_TOKENS,
        temperature=0,
        logprobs=0,
        echo=True,
        extra_body={"ignore_eos": True},
    )
    return torch.tensor([choice.logprobs.token_logprobs[1:] for choice in answer.choices])


@pytest.mark.parametrize(
    ("workers", "engines"),
    [(("--pipeline-parallel-size", "2"), 1), (("--data-parallel-size", "2", "--enforce-eager"), 2)],
    ids=["stages", "engines"],
)
def test_two_workers_say_what_one_says(
    workers: tuple[str, ...], engines: int, checkpoint: Path, alone: torch.Tensor, tmp_path: Path
) -> None:
    bind = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # else each worker asks for a NUMA node of its own
    with serve(checkpoint, tmp_path / "server.log", *SERVED, *workers, environment=bind) as server:
        difference = (served(server) - alone).abs()
        tokens = server.metrics("vllm:generation_tokens_total")
    print(f"|difference of log-probabilities| {difference.mean():.1e} on average, {difference.max():.1e} at most")
    print(f"tokens by engine: {tokens}")
    assert alone.std() > 0.5
    assert difference.mean() <= 1e-3
    assert len(tokens) == engines
    assert all(tokens)
