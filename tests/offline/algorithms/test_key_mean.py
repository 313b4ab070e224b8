"""K smoothing: keys minus their mean give the same attention and span smaller ranges."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from infoquant_vllm.format import ARCHITECTURES, SITES, WeightArgs
from offline import Recipe, quantize
from offline.algorithms.key_mean import mean_rotated_key
from offline.evaluate.metrics import compare
from offline.evaluate.simulate import load_simulated
from offline.formats import Site, SiteActivations, Sites
from offline.model.hidden_states import OUTPUT, HiddenStates
from offline.model.input_statistics import InputStatistics
from offline.model.source import Source
from offline.progress import silent
from offline.recipe import CalibrationSize, KVCache, Psot
from offline.stages.fold import fold_layer
from tests.common.tiny import FAMILIES, MIXTURES, SIZES, VOCAB_SIZE, write_source

EIGHT = WeightArgs(num_bits=8)
TEXT = "".join(f"The number {n} is followed by {n + 1}, and its square is {n * n}.\n\n" for n in range(300))
MODULES = [linears[0] for linears in SITES.values()]


def recipe(positions: int | None, num_bits: int = 8) -> Recipe:
    site = Site(weights=EIGHT, input_activations=SiteActivations(num_bits=8), clip_ratio=1.0)
    return Recipe(
        name="test",
        transform="psot-shared",
        rounding="gptq",
        equalize=True,
        sites=Sites(qkv=site, o=site, gate_up=site, down=site),
        kv_cache=KVCache(key_bits=num_bits, value_bits=num_bits, value_clip_ratio=1.0, key_mean_positions=positions),
        calibration=CalibrationSize(sequences=4, sequence_length=64),
        psot=Psot(steps=3),
    )


def divergence(source: Path, folder: Path, chosen: Recipe, text: Path) -> float:
    """Mean KL from the source to its checkpoint, simulated in float32."""
    quantize(source, folder, recipe=chosen, calibration=str(text), progress=silent)
    windows = torch.randint(3, VOCAB_SIZE, (4, 64), generator=torch.Generator().manual_seed(5))
    return compare(list(windows), load_simulated(folder, torch.float32), Source.open(source).model(torch.float32))[
        "kl"
    ].mean


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.mark.parametrize("size", ["tied", "untied-biases", *FAMILIES])
def test_checkpoint_of_smoothed_keys_in_eight_bits_predicts_as_its_source(
    tmp_path: Path, text: Path, size: str
) -> None:
    source = write_source(tmp_path / "source", **SIZES[size])
    plain, smoothed = (divergence(source, tmp_path / str(n), recipe(n), text) for n in (None, 128))
    limit = 0.02 if size in MIXTURES else 0.005  # a router may choose other experts
    assert smoothed < 1.5 * plain < limit


@pytest.mark.parametrize("size", ["tied", "llama3-rope", "qwen3"])
def test_key_mean_is_the_mean_of_a_constant_key_at_all_positions(tmp_path: Path, size: str) -> None:
    source = Source.open(write_source(tmp_path / "source", **SIZES[size]))
    tokens = torch.randint(3, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(2))
    hidden = HiddenStates(source, tokens, None, [torch.device("cpu")])
    heads, size_of_head = source.shape.num_key_value_heads, source.shape.head_dim
    key = torch.randn(heads, size_of_head, generator=torch.Generator().manual_seed(3))
    rotary = source.model(torch.float32).model.rotary_emb
    cos, sin = rotary(key, torch.arange(100)[None])
    rotated, _ = apply_rotary_pos_emb(key[None, :, None].expand(-1, -1, 100, -1), key[None, :, None], cos, sin)
    torch.testing.assert_close(mean_rotated_key(key, *hidden.rotary(100)), rotated[0].mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", ["tied", "qwen2", "qwen3"])
def test_keys_are_observed_as_rope_turns_them(tmp_path: Path, size: str) -> None:
    source = Source.open(write_source(tmp_path / "source", **SIZES[size]))
    tokens = torch.randint(3, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(2))
    hidden, statistics, keys = (
        HiddenStates(source, tokens, None, [torch.device("cpu")]),
        InputStatistics(),
        ARCHITECTURES[source.shape.architecture].rope_inputs[1],
    )
    hidden.forward_layer(fold_layer(source, 0, None), MODULES, statistics.observe, (keys,))
    expected: list[torch.Tensor] = []
    model = source.model(torch.float32)
    model.model.layers[0].get_submodule(keys).register_forward_hook(lambda _, __, out: expected.append(out))
    with torch.no_grad():
        model(tokens)
    torch.testing.assert_close(statistics.sums[keys + OUTPUT], expected[0].reshape(32, -1).sum(0), rtol=1e-4, atol=1e-3)


def test_smoothed_keys_have_less_quantization_noise(tmp_path: Path, text: Path) -> None:
    """Biases make keys of one sign; their four bits are then for what differs."""
    source = write_source(tmp_path / "source", architecture="Qwen2ForCausalLM")
    file = source / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("k_proj.bias"):
            half = len(tensors[name]) // 2
            tensors[name] = torch.where(torch.arange(2 * half) % 64 % 32 > 24, 8.0, 0.0)
    save_file(tensors, file, metadata={"format": "pt"})
    plain, smoothed = (divergence(source, tmp_path / str(n), recipe(n, 4), text) for n in (None, 128))
    assert smoothed < 0.5 * plain
