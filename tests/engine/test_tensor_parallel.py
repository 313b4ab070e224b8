"""Several workers say what one says, also where they are more than a model has kv-heads."""

from pathlib import Path

import pytest
import torch

from offline import PRESETS, quantize
from offline.progress import silent
from tests.common.engine import Engine
from tests.common.tiny import MIXTURES, SIZES, VOCAB_SIZE, write_source
from tests.offline.model.test_architectures import SMALL
from tests.offline.test_layers import MIXED

PROMPTS = torch.randint(3, VOCAB_SIZE - 13, (4, 128), generator=torch.Generator().manual_seed(0)).tolist()


DENSE = "one-kv-head", "ministral", "granite", "phi3", "smollm3", "gemma3", "olmo2"
CASES = [("fast", size) for size in (*DENSE, *MIXTURES)]
CASES += [("kv4", "one-kv-head"), ("kv4", "tied"), ("layers", "phi3")]
MEAN_DIFFERENCE = {"ministral": 5e-3, "granite": 1e-2, "smollm3": 1e-2}
"""Workers add sums in another order, so a code may flip: in these cases two or three of four prompts have no difference
above 1e-4 anywhere, another one has some from its 62nd or 96th token on. tests/plugin/test_experts.py holds that the
ranks of a mixture add up."""


def write_checkpoint(folder: Path, preset: str, size: str) -> Path:
    """Make a checkpoint for two workers, of a tied model; that of `fast` has an 8-bit vocabulary.

    `layers` is `fast` with layers that differ.
    """
    update = SMALL | {"fast": {"lm_head_bits": 8}, "layers": {"layers": MIXED}}.get(preset, {})
    source = write_source(folder / "source", **SIZES[size])
    tp_size = None if preset == "kv4" else 2  # unquantized linears need nothing
    recipe = PRESETS["fast" if preset == "layers" else preset].model_copy(update=update)
    quantize(source, folder / "checkpoint", recipe=recipe, max_tp_size=tp_size, progress=silent)
    return folder / "checkpoint"


def logprobs(engine: Engine, checkpoint: Path, workers: int, **options: bool) -> torch.Tensor:
    """Of the prompts' tokens and of the 8 generated after each."""
    (answers,) = engine.run(checkpoint, PROMPTS, max_tokens=8, tensor_parallel_size=workers, **options).answers
    return torch.tensor([answer.prompt + answer.logprobs for answer in answers])


@pytest.mark.parametrize(("preset", "size"), CASES)
def test_two_workers_say_what_one_says(engine: Engine, preset: str, size: str, tmp_path: Path) -> None:
    check(engine, write_checkpoint(tmp_path, preset, size), MEAN_DIFFERENCE.get(size, 1e-3))


def test_two_workers_share_the_experts_of_a_mixture(engine: Engine, tmp_path: Path) -> None:
    check(engine, write_checkpoint(tmp_path, "fast", "mixtral"), 1e-3, enable_expert_parallel=True)


def check(engine: Engine, checkpoint: Path, mean_difference: float, **options: bool) -> None:
    """Compare two workers with one."""
    alone, together = logprobs(engine, checkpoint, 1), logprobs(engine, checkpoint, 2, **options)
    difference = (together - alone).abs()
    print(f"|difference of log-probabilities| {difference.mean():.1e} on average, {difference.max():.1e} at most")
    assert alone.std() > 0.5
    assert difference.median() <= 1e-4
    assert difference.mean() <= mean_difference
