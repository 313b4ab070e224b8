"""Unusual but valid models are quantized as their source computes, in 8 bits, so that faults show."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline.evaluate.verify import verify
from tests.common.eight_bits import LARGEST_KL, eight_bit_kl
from tests.common.tiny import write_source

SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "head_dim": 32}
SHARD = "model-00001-of-00001.safetensors"


def set_config(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    file = folder / "config.json"
    found = {name: value for name, value in json.loads(file.read_text()).items() if name not in drop}
    file.write_text(json.dumps(found | changes))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_dim", [80, 96, 120, 256])
def test_head_sizes_that_are_no_power_of_two_or_large(tmp_path: Path, head_dim: int, tied: bool) -> None:
    source = write_source(tmp_path / "source", **SMALL | {"head_dim": head_dim, "tie_word_embeddings": tied})
    assert eight_bit_kl(source, tmp_path / "out") < LARGEST_KL


def test_config_that_switches_the_cache_off_samples_and_serves(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", **SMALL)
    set_config(source, use_cache=False)
    assert eight_bit_kl(source, tmp_path / "out") < LARGEST_KL


def test_old_and_new_keys_of_rope_give_the_same_checkpoint(tmp_path: Path) -> None:
    rope = {"factor": 4.0, "original_max_position_embeddings": 128}
    old, new = (write_source(tmp_path / name, **SMALL) for name in ("old", "new"))
    gone = ("rope_parameters", "rope_scaling", "rope_theta")
    set_config(old, gone, rope_theta=500.0, rope_scaling={"type": "yarn", **rope})
    set_config(new, gone, rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, **rope})
    assert eight_bit_kl(old, tmp_path / "old-out") < LARGEST_KL
    assert eight_bit_kl(new, tmp_path / "new-out") < LARGEST_KL
    assert (tmp_path / "old-out" / SHARD).read_bytes() == (tmp_path / "new-out" / SHARD).read_bytes()


def test_source_of_links_with_a_name_in_another_script(tmp_path: Path) -> None:
    store = write_source(tmp_path / "блоки и 雪", **SMALL)
    linked = tmp_path / "модель 模型 é"
    linked.mkdir()
    for file in store.iterdir():
        (linked / file.name).symlink_to(file)
    (tmp_path / "ссылка").symlink_to(linked)
    assert eight_bit_kl(tmp_path / "ссылка", tmp_path / "вывод 出") < LARGEST_KL
    assert all(not file.is_symlink() for file in (tmp_path / "вывод 出").iterdir())


def test_massive_activations_in_float16(tmp_path: Path) -> None:
    """Make one feature of one token hundreds of times as large as the others from the first layer on."""
    source = write_source(tmp_path / "source", dtype=torch.float16, tie_word_embeddings=False, **SMALL)
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][1, 7] = 3000.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert eight_bit_kl(source, tmp_path / "out") < LARGEST_KL


def test_trained_head_of_a_model_that_config_calls_tied(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", **SMALL)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert eight_bit_kl(source, tmp_path / "out") < LARGEST_KL
    assert verify(tmp_path / "out", against=source).passed
