"""Every model class of the table, served by vLLM, says what the simulation says.

On tiny random models in float32, quantised with the preset `fast`; see test_server_equality.py. A
last bit may flip a code that was all but a tie, and so change the rest of a window: most positions
must be equal, and the few behind such a code near.
"""

from pathlib import Path

import pytest
import torch

from benchmarks.scores import kl_divergence, score
from benchmarks.server import serve
from offline import PRESETS, quantize
from offline.progress import silent
from offline.recipe import CalibrationSize, Psot
from offline.simulate import load_simulated
from tests.test_server_equality import TOP, scores_of
from tests.tiny import FAMILIES, SIZES, VOCAB_SIZE, write_source

ARGUMENTS = ("--dtype", "float32", "--max-model-len", "512", "--max-logprobs", str(TOP))
SMALL = {"calibration": CalibrationSize(sequences=16, sequence_length=128), "psot": Psot(steps=3)}


@pytest.mark.parametrize("size", FAMILIES)
def test_served_is_what_the_simulation_computes(size: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    recipe = PRESETS["fast"].model_copy(update=SMALL)
    quantize(write_source(tmp_path / "source", **SIZES[size]), checkpoint, recipe=recipe, progress=silent)
    windows = torch.randint(3, VOCAB_SIZE - 13, (4, 256), generator=torch.Generator().manual_seed(3))
    with serve(checkpoint, tmp_path / "server.log", "--enforce-eager", *ARGUMENTS) as server:
        served = score(server, windows, TOP)
    model = load_simulated(checkpoint, torch.float32)
    with torch.no_grad():
        simulated = scores_of(model(windows[:, :-1]).logits.double(), windows)
    difference = (simulated.nll - served.nll).abs()
    divergence = float(kl_divergence(simulated, served).mean())
    print(f"|difference of NLL| median {difference.median():.1e}, mean {difference.mean():.5f}, KL {divergence:.5f}")
    assert difference.median() <= 1e-4
    assert difference.mean() <= 0.05
    assert divergence <= 0.01
