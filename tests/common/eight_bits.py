"""A recipe with the stages of `fast` that hardly rounds: any difference from the source is a fault."""

from pathlib import Path

import torch

from infoquant_vllm.format import WeightArgs
from offline import PRESETS, quantize
from offline.evaluate.metrics import compare
from offline.evaluate.simulate import load_simulated
from offline.formats import Site, SiteActivations, Sites
from offline.model.reference import load_reference
from offline.progress import silent
from offline.recipe import CalibrationSize, KVCache, Psot
from tests.common.tiny import VOCAB_SIZE

SITE = Site(weights=WeightArgs(num_bits=8), input_activations=SiteActivations(num_bits=16), clip_ratio=1.0)
EIGHT_BITS = PRESETS["fast"].model_copy(
    update={
        "name": "eight-bits",
        "sites": Sites(qkv=SITE, o=SITE, gate_up=SITE, down=SITE),
        "kv_cache": KVCache(
            key_bits=8, value_bits=8, key_clip_ratio=1.0, value_clip_ratio=1.0, key_mean_positions=2048
        ),
        "calibration": CalibrationSize(sequences=4, sequence_length=32),
        "psot": Psot(steps=3, batch_tokens=64, pool_tokens=256),
    }
)
LARGEST_KL = 0.01
PADDING = 5
"""A token that stands for those whose embeddings are degenerate."""


def eight_bit_kl(source: Path, output: Path, calibration: str = "self") -> float:
    """KL of the model in 8 bits, which is written to `output`, to its source, in float32."""
    quantize(source, output, recipe=EIGHT_BITS, calibration=calibration, progress=silent, device="cpu")
    return divergence(source, output)


def divergence(source: Path, output: Path) -> float:
    """KL of a checkpoint to its source, in float32, on random tokens with PADDING among them."""
    windows = torch.randint(6, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(4))
    windows[:, 5] = PADDING
    model, reference = load_simulated(output, torch.float32), load_reference(source, torch.float32)
    return compare(list(windows), model, reference)["kl"].mean
