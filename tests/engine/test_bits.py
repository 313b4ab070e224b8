"""What has other bits than the presets says what the simulation says, however vLLM cuts up its work.

Inputs of 16 bits and a vocabulary of 8; weights, inputs and cache of 8, whose codes near-ties do not upset.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import offline
from offline.evaluate.simulate import load_simulated
from offline.progress import silent
from tests.common.engine import Engine
from tests.common.tiny import VOCAB_SIZE, write_source

SIXTEEN = {"input_activations": {"num_bits": 16}}
EIGHT = {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}, "clip_ratio": 1.0}


def recipe(name: str, site: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "transform": "hadamard",
        "rounding": "rtn",
        "sites": dict.fromkeys(("qkv", "o", "gate_up", "down"), site),
        **changes,
    }


CACHE = {"key_bits": 8, "value_bits": 8, "key_clip_ratio": 1.0, "value_clip_ratio": 1.0}
RECIPES = [
    recipe("w4a16", SIXTEEN, lm_head_bits=8),
    recipe("w8a8kv8", EIGHT, kv_cache=CACHE),
    recipe("w8a8kv8-unrotated", EIGHT, kv_cache=CACHE, transform="none"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda each: each["name"])
def test_served_is_what_the_simulation_computes(recipe: dict[str, Any], engine: Engine, tmp_path: Path) -> None:
    """Of a tiny tied model, whose 272 tokens vLLM pads to 320."""
    source, checkpoint = write_source(tmp_path / "source"), tmp_path / "checkpoint"
    offline.quantize(source, checkpoint, recipe=offline.Recipe.model_validate(recipe), progress=silent)
    windows = torch.randint(3, VOCAB_SIZE - 13, (4, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = load_simulated(checkpoint, torch.float32)(windows[:, :-1]).logits.double()
    simulated = logits.log_softmax(-1).gather(-1, windows[:, 1:, None]).squeeze(-1)
    prompts = windows.tolist()
    batches = engine.run(checkpoint, *([prompt] for prompt in prompts), prompts).answers
    batches += engine.run(checkpoint, prompts, max_num_batched_tokens=96).answers
    *singly, together, chunks = [torch.tensor([answer.prompt for answer in answers]) for answers in batches]
    alone = torch.cat(singly)
    difference = (alone - simulated).abs()
    print(f"|difference of log-probabilities| {difference.mean():.2e} on average, {difference.max():.2e} at most")
    assert simulated.std() > 0.5
    assert difference.mean() <= 1e-3
    assert (together - alone).abs().mean() <= 1e-4
    assert (chunks - alone).abs().mean() <= 1e-3
