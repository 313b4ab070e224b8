"""A model says the same by Triton's kernels, under the interpreter, as by the reference's.

A mixture of experts with a shared one, which has all kernels: those of linears, of experts and of the cache.
"""

from pathlib import Path

import pytest
import torch

import offline
from infoquant_vllm.kernels.dispatch import FORCE
from tests.common.engine import running_engine
from tests.common.tiny import SIZES, VOCAB_SIZE, write_source

TOKEN = {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}
RECIPE = {
    "name": "w8a8kv4",  # of 4 bits would be the linears' codes that a last bit upsets
    "transform": "hadamard",
    "rounding": "rtn",
    "sites": {"qkv": TOKEN, "o": TOKEN, "gate_up": TOKEN, "down": TOKEN},
}
DECODED = 140
BLOCKS = 8  # the interpreter copies the whole cache at every launch


def nll_by(checkpoint: Path, windows: torch.Tensor, **variables: str) -> tuple[torch.Tensor, float]:
    """NLL of the windows, and of a token that a decoding step makes after 140, in a process with these variables."""
    with running_engine(**variables) as engine:
        prompts, last = windows.tolist(), windows[0, :DECODED].tolist()
        whole, (decoded,) = engine.run(
            checkpoint, prompts, [last], max_tokens=1, top=VOCAB_SIZE, max_model_len=256, num_gpu_blocks_override=BLOCKS
        ).answers
    nll = -torch.tensor([answer.prompt for answer in whole], dtype=torch.float64)
    return nll, -decoded.likeliest[-1][int(windows[0, DECODED])]


def test_log_probabilities_are_those_of_the_reference(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, checkpoint = write_source(tmp_path / "source", **SIZES["qwen2-moe"]), tmp_path / "w8a8kv4"
    offline.quantize(source, checkpoint, recipe=offline.Recipe.model_validate(RECIPE), progress=lambda *_: None)
    windows = torch.randint(3, VOCAB_SIZE - 13, (2, 144), generator=torch.Generator().manual_seed(0))
    triton, triton_next = nll_by(checkpoint, windows, **{FORCE: "triton", "TRITON_INTERPRET": "1"})
    said = "".join(capfd.readouterr())
    for words in ("caches KV4 (Triton, interpreted)", "experts W8A8 (Triton, interpreted)", f"{FORCE}=triton"):
        assert words in said
    reference, reference_next = nll_by(checkpoint, windows, **{FORCE: "reference"})
    difference, spread = (triton - reference).abs(), reference.std()
    print(
        f"|difference of NLL| median of the first tokens {difference[:, :8].median():.1e}, mean {difference.mean():.1e}"
    )
    print(f"of {spread:.1f} from token to token; decoding {abs(triton_next - reference_next):.1e}")
    assert difference[:, :8].median() <= 1e-5  # before a last bit has upset many codes
    assert difference.mean() <= 0.03 * spread
    assert abs(triton_next - reference_next) <= 0.1 * spread
