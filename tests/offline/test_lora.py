"""`infoquant lora` turns adapters of a checkpoint's source, and refuses others by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infoquant_vllm.format import (
    BASIS_CONFIG,
    BASIS_WEIGHTS,
    Checkpoint,
    FormatError,
    read_basis,
    source_name,
    turned_name,
)
from offline import PRESETS, Recipe, ToolError, quantize
from offline.lora import TurnedAdapter, turn_adapter
from offline.progress import silent
from tests.common.tiny import LINEARS, PREFIX, RANK, SIZES, write_adapter, write_source

HADAMARD = Recipe(name="hadamard-rtn", transform="hadamard", rounding="rtn")
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


def quantized(folder: Path, size: str = "untied", recipe: Recipe = HADAMARD, seed: int = 0) -> Path:
    source = write_source(folder / "source", **SIZES[size])
    quantize(source, folder / "checkpoint", recipe=recipe, seed=seed, progress=silent)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("rotated"))


@pytest.fixture
def adapter(tmp_path: Path, checkpoint: Path) -> Path:
    return write_adapter(tmp_path / "adapter", checkpoint.parent / "source")


def change(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def delta(adapter: Path, turned: TurnedAdapter) -> torch.Tensor:
    """What a turned adapter adds to the first q_proj."""
    tensors, module = weights(Path(turned.output)), Q.removeprefix(PREFIX)
    a, b = (tensors[PREFIX + turned_name(module, turned.fingerprint, f"lora_{part}.weight")] for part in "AB")
    return b @ a


def test_a_turned_adapter_keeps_names_ranks_and_dtypes(tmp_path: Path, checkpoint: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in weights(adapter).items()}, file)
    found = turn_adapter(checkpoint, adapter, tmp_path / "turned")
    tensors = weights(tmp_path / "turned")
    names = {PREFIX + source_name(name.removeprefix(PREFIX), found.fingerprint) for name in tensors}
    assert names == set(weights(adapter))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert (found.linears, found.rank, found.bytes) == (2 * len(LINEARS), RANK, sum(x.nbytes for x in tensors.values()))
    config = json.loads((tmp_path / "turned" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, RANK, "LORA")
    assert config["target_modules"] == sorted({linear.rpartition(".")[2] for linear in LINEARS})


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 2 * RANK**0.5),
        ({"alpha_pattern": {"k_proj": 4 * RANK}}, 2.0),
        ({"alpha_pattern": {"self_attn.q_proj": 4 * RANK, "q_proj": RANK}}, 4.0),
        ({"alpha_pattern": {"j_proj": 4 * RANK, "layers.0.self_attn.q_proj": 3 * RANK}}, 3.0),
    ],
)
def test_the_scale_of_an_adapter_is_that_of_peft(
    tmp_path: Path, checkpoint: Path, adapter: Path, fields: dict[str, Any], scale: float
) -> None:
    one = turn_adapter(checkpoint, adapter, tmp_path / "one")
    change(adapter, lora_alpha=2 * RANK, **fields)
    other = turn_adapter(checkpoint, adapter, tmp_path / "other")
    torch.testing.assert_close(delta(adapter, other), delta(adapter, one) * scale / 2)


def test_a_checkpoint_in_the_sources_basis_leaves_an_adapter_as_it_is(tmp_path: Path) -> None:
    plain = quantized(tmp_path, recipe=PRESETS["rtn"])
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "source")
    found = turn_adapter(plain, adapter, tmp_path / "turned")
    given = weights(adapter)
    torch.testing.assert_close(delta(adapter, found), 2 * given[f"{Q}.lora_B.weight"] @ given[f"{Q}.lora_A.weight"])


def test_every_rotation_has_a_fingerprint_of_its_own(tmp_path: Path, checkpoint: Path) -> None:
    found = [quantized(tmp_path / str(seed), size, seed=seed) for size, seed in (("untied", 1), ("tied", 2))]
    bases = [read_basis(Checkpoint(folder)) for folder in (checkpoint, *found)]
    assert len({basis.fingerprint() for basis in bases if basis is not None}) == 3


def test_names_of_adapters_are_taken_of_one_basis_alone() -> None:
    name = turned_name("model.layers.0.mlp.up_proj", "0123456789abcdef", "lora_A.weight")
    assert source_name(name, "0123456789abcdef") == "model.layers.0.mlp.up_proj.lora_A.weight"
    with pytest.raises(
        FormatError, match="turned for the basis 0123456789abcdef, this checkpoint has 0000456789abcdef"
    ):
        source_name(name, "0000456789abcdef")
    for other in ("model.layers.0.mlp.up_proj.lora_A.weight", "lm_head.lora_A.weight", name.replace("9", "g")):
        with pytest.raises(FormatError, match=f"{other} is in the basis of the source model.*run `infoquant lora"):
            source_name(other, "0123456789abcdef")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"use_dora": True}, "use_dora is True: DoRA cannot be turned; merge the adapter"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*whole modules"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the weights"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', expected a number"),
        ({"lora_alpha": True}, "lora_alpha is True, expected a number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 10+, expected a number of at most"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a number"),
        ({"alpha_pattern": [8]}, r"alpha_pattern is \[8\], expected an object"),
        ({"alpha_pattern": {"q_proj": None}}, "q_proj is None, expected a number"),
        ({"alpha_pattern": {"(a+)+$": 8}}, r"alpha_pattern names '\(a\+\)\+\$'"),
    ],
)
def test_a_config_that_cannot_be_turned_is_refused_by_field(
    tmp_path: Path, checkpoint: Path, adapter: Path, fields: dict[str, Any], message: str
) -> None:
    change(adapter, **fields)
    with pytest.raises(ToolError, match=f"{adapter}/adapter_config.json: {message}"):
        turn_adapter(checkpoint, adapter, tmp_path / "turned")
    assert not (tmp_path / "turned").exists()


HEAD = f"{PREFIX}lm_head.lora_A.weight"
EMBEDDING = f"{PREFIX}model.embed_tokens.lora_embedding_A"
BEYOND = Q.replace("layers.0", "layers.2") + ".lora_A.weight"
NAN = {f"{Q}.lora_A.weight": torch.full((RANK, 256), float("nan"))}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({HEAD: torch.ones(RANK, 256)}, f"{HEAD} is no A or B of a linear in a decoder layer.*other adapters"),
        ({EMBEDDING: torch.ones(RANK, 272)}, f"{EMBEDDING} is no A or B of a linear"),
        ({BEYOND: torch.ones(RANK, 256)}, rf"{BEYOND} is no A or B .* \(2 layers"),
        ({f"{Q}.lora_A.weight": torch.ones(RANK, 255)}, r"is F32 \[4, 255\], expected BF16, .*\[rank, 256\]"),
        ({f"{Q}.lora_B.weight": torch.ones(255, RANK)}, r"is F32 \[255, 4\], expected .*\[256, rank\]"),
        ({f"{Q}.lora_A.weight": torch.ones(5000, 256)}, r"is F32 \[5000, 256\], expected .* rank of 1 .. 4096"),
        ({f"{Q}.lora_A.weight": torch.ones(())}, r"is F32 \[\], expected"),
        ({f"{Q}.lora_A.weight": torch.ones(RANK, 256, dtype=torch.int32)}, "is I32"),
        ({f"{Q}.lora_A.weight": torch.ones(RANK + 1, 256)}, "has an A of rank 5 and a B of rank 4"),
        ({f"{Q}.lora_A.weight": None}, "model.layers.0.self_attn.q_proj has only one of lora_A.weight and lora_B"),
        (NAN, "q_proj.lora_A.weight holds NaN or Inf"),
        ({f"{Q}.infoquant_0123456789abcdef.lora_A.weight": torch.ones(1, 1)}, "is turned already"),
    ],
)
def test_a_tensor_that_cannot_be_turned_is_refused_by_name(
    tmp_path: Path, checkpoint: Path, adapter: Path, tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    file = adapter / "adapter_model.safetensors"
    changed = {name: tensor for name, tensor in (weights(adapter) | tensors).items() if tensor is not None}
    save_file(changed, file)
    with pytest.raises(ToolError, match=f"{file}: .*{message}"):
        turn_adapter(checkpoint, adapter, tmp_path / "turned")
    assert not (tmp_path / "turned").exists()


def test_what_is_no_adapter_is_refused_by_file(tmp_path: Path, checkpoint: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({}, file)
    with pytest.raises(ToolError, match=f"{file}: holds no tensors"):
        turn_adapter(checkpoint, adapter, tmp_path / "turned")
    file.write_bytes(b"no header")
    with pytest.raises(FormatError, match=f"{file}: not a whole safetensors file"):
        turn_adapter(checkpoint, adapter, tmp_path / "turned")
    file.unlink()
    with pytest.raises(ToolError, match=f"{file}: no such file; save the adapter as safetensors"):
        turn_adapter(checkpoint, adapter, tmp_path / "turned")
    with pytest.raises(ToolError, match="exists already"):
        turn_adapter(checkpoint, adapter, tmp_path)


def test_adapters_of_mixtures_are_refused_by_name(tmp_path: Path, adapter: Path) -> None:
    mixture = quantized(tmp_path, "mixtral")
    with pytest.raises(ToolError, match=f"{mixture}: no {BASIS_CONFIG}, which mixtures of experts"):
        turn_adapter(mixture, adapter, tmp_path / "turned")


R2 = "model.layers.1.self_attn.r2"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({R2: None}, f"{R2} is missing"),
        ({"r1": None}, "r1 is missing"),
        ({"model.layers.2.self_attn.r2": torch.ones(2, 64, 64)}, "layers.2.self_attn.r2 is not expected"),
        ({R2: torch.ones(2, 64, 63)}, r"r2 is torch.float32 \[2, 64, 63\], expected float32 \[2, 64, 64\]"),
        ({R2: torch.ones(2, 64, 64, dtype=torch.float64)}, "r2 is torch.float64"),
        ({R2: torch.full((2, 64, 64), float("inf"))}, "r2 holds values that are not finite"),
        (
            {f"model.layers.{layer}.mlp.down_scale": torch.zeros(320) for layer in range(2)},
            "down_scale holds .* not above 0",
        ),
        ({R2: torch.ones(2, 64, 64)}, f"its fingerprint is [0-9a-f]{{16}}, {BASIS_CONFIG} says"),
    ],
)
def test_a_broken_basis_is_refused_by_tensor(
    tmp_path: Path, tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = quantized(tmp_path)
    file = folder / BASIS_WEIGHTS
    save_file({name: x for name, x in (load_file(file) | tensors).items() if x is not None}, file)
    with pytest.raises(FormatError, match=f"{file}: .*{message}"):
        read_basis(Checkpoint(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "fingerprint is None, expected 16 hexadecimal digits"),
        (b"[]", "fingerprint is None"),
        (b'{"fingerprint": "../../0123456789"}', "fingerprint is '../../0123456789'"),
        (b"{", "not readable as JSON"),
        (b" " * 5000, "5000 bytes, expected at most 4096"),
    ],
)
def test_a_broken_fingerprint_is_refused_by_file(tmp_path: Path, content: bytes, message: str) -> None:
    folder = quantized(tmp_path)
    (folder / BASIS_CONFIG).write_bytes(content)
    with pytest.raises(FormatError, match=f"{folder / BASIS_CONFIG}: .*{message}"):
        read_basis(Checkpoint(folder))
    (folder / BASIS_CONFIG).write_text('{"fingerprint": "0123456789abcdef"}')
    (folder / BASIS_WEIGHTS).unlink()
    with pytest.raises(FormatError, match=f"{folder / BASIS_WEIGHTS}: no such file"):
        read_basis(Checkpoint(folder))
