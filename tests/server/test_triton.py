"""A served model says the same by Triton's kernels, under the interpreter, as by the reference's."""

from pathlib import Path

import pytest
import torch

import offline
from benchmarks.accuracy.scores import Scores, score
from benchmarks.common.server import serve
from infoquant_vllm.kernels.dispatch import FORCE
from tests.common.tiny import VOCAB_SIZE, write_source
from tests.server.test_equality import next_nll

TOKEN = {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}
RECIPE = {
    "name": "w8a8kv4",  # of 4 bits would be the linears' codes that a last bit upsets
    "transform": "hadamard",
    "rounding": "rtn",
    "sites": {"qkv": TOKEN, "o": TOKEN, "gate_up": TOKEN, "down": TOKEN},
}
FEW_BLOCKS = ("--num-gpu-blocks-override", "8")  # the interpreter copies the whole cache at every launch
ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", *FEW_BLOCKS)


def scores(checkpoint: Path, windows: torch.Tensor, log: Path) -> tuple[Scores, float, str]:
    """Of whole windows together; of a token that a decoding step makes after 140; the start-up line."""
    with serve(checkpoint, log, *ARGUMENTS) as server:
        found = score(server, windows, top=20, concurrent=len(windows))
        return found, next_nll(server, windows[0], 140), server.logged(r"infoquant: (.+)")


def test_log_probabilities_are_those_of_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, checkpoint = write_source(tmp_path / "source"), tmp_path / "w8a8kv4"
    offline.quantize(source, checkpoint, recipe=offline.Recipe.model_validate(RECIPE), progress=lambda *_: None)
    windows = torch.randint(3, VOCAB_SIZE - 13, (2, 144), generator=torch.Generator().manual_seed(0))
    found = {}
    for family in ("reference", "triton"):
        monkeypatch.setenv(FORCE, family)
        monkeypatch.setenv("TRITON_INTERPRET", str(int(family == "triton")))
        found[family] = scores(checkpoint, windows, tmp_path / f"{family}.log")
    (reference, reference_next, reference_line), (triton, triton_next, triton_line) = found.values()
    assert "caches KV4 (torch)" in reference_line
    assert "caches KV4 (Triton, interpreted)" in triton_line
    assert f"{FORCE}=triton" in triton_line
    difference = (triton.nll - reference.nll).abs()
    print(
        f"|difference of NLL| median of the first tokens {difference[:, :8].median():.1e}, mean {difference.mean():.1e}"
    )
    print(f"of {reference.nll.std():.1f} from token to token; decoding {abs(triton_next - reference_next):.1e}")
    assert difference[:, :8].median() <= 1e-5  # before a last bit has upset many codes
    assert difference.mean() <= 0.03 * reference.nll.std()
    assert abs(triton_next - reference_next) <= 0.1 * reference.nll.std()
