"""A damaged or misused checkpoint is refused before anything is loaded, saying where and what."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs

from infoquant_vllm import register
from infoquant_vllm.format import ARCHITECTURES, INDEX_FILE
from tests.common.checkpoints import write_random

SHARD = "model-00001-of-00001.safetensors"
SCALE = "model.layers.1.mlp.up_proj.weight_scale"


def _start(folder: Path, **options: Any) -> None:
    """What vLLM does in the process of the command line, before it starts any other."""
    register()
    EngineArgs(model=str(folder), skip_tokenizer_init=True, **options).create_engine_config()


def _change_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def _change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD)
    _change_json(folder / INDEX_FILE, lambda index: index.update(weight_map=dict.fromkeys(tensors, SHARD)))


def _truncate(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: len(data) // 2])


def _add_shard(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    save_file({"model.layers.2.mlp.up_proj.bias": tensors[SCALE]}, folder / "extra.safetensors")
    entry = {"model.layers.2.mlp.up_proj.bias": "extra.safetensors"}
    _change_json(folder / INDEX_FILE, lambda index: index["weight_map"].update(entry))


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: _change_json(folder / "config.json", lambda data: change(data["quantization_config"]))


def _as_qwen2(folder: Path) -> None:
    names = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    _change_json(folder / "config.json", lambda data: data.update(names))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (_truncate, rf"{SHARD}: not a whole safetensors file"),
    "missing shard": (lambda f: (f / SHARD).unlink(), rf"{SHARD}: the shard is missing"),
    "extra shard": (_add_shard, r"extra\.safetensors: unexpected tensor model\.layers\.2\.mlp\.up_proj\.bias"),
    "missing tensor": (lambda f: _change_tensors(f, lambda t: t.pop(SCALE)), rf"{SCALE} \[384, 1\] is missing"),
    "wrong shape": (
        lambda f: _change_tensors(f, lambda t: t.update({SCALE: t[SCALE][:-1].clone()})),
        rf"{SCALE} has shape \[383, 1\], expected \[384, 1\]",
    ),
    "a norm of no number": (
        lambda f: _change_tensors(f, lambda t: t["model.norm.weight"].fill_(float("inf"))),
        rf"{SHARD}: model\.norm\.weight\[0\] is inf, expected finite numbers \(256 of 256",
    ),
    "unknown version": (_config(lambda q: q.update(format_version=9)), r"format_version is 9, this release reads 3"),
    "unknown field": (_config(lambda q: q.update(sparsity=2)), r"sparsity"),
    "promised rotation": (
        lambda f: (
            _config(lambda q: q.update(online_r1=True))(f),
            _change_json(f / "config.json", lambda c: c.update(tie_word_embeddings=True)),
        ),
        r"r1 \[256, 256\] is missing",
    ),
    "promised biases": (_as_qwen2, r"self_attn\.[qkv]_proj\.bias \[\d+\] is missing"),
    "unnamed linear": (_config(lambda q: q["config_groups"].pop("down")), r"down_proj: no target of config_groups"),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sound_checkpoint_is_accepted(architecture: str, tmp_path: Path) -> None:
    names = {"architectures": [architecture], "model_type": ARCHITECTURES[architecture].model_type}
    experts, sizes = ARCHITECTURES[architecture].experts, dict[str, int]()
    if experts is not None:
        sizes = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, experts.size: 64}
        sizes |= {} if experts.shared_size is None else {experts.shared_size: 128}
    windowed = ARCHITECTURES[architecture].windows == "pattern"
    _start(write_random(tmp_path, sliding_window=64 if windowed else None, **names, **sizes))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_it_is_loaded(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    folder = write_random(tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        _start(folder)


def test_the_flag_on_an_unquantized_model_says_what_to_run(tmp_path: Path) -> None:
    folder = write_random(tmp_path)
    _change_json(folder / "config.json", lambda data: data.pop("quantization_config"))
    with pytest.raises(ValueError, match=r"not quantized.*run `infoquant quantize"):
        _start(folder, quantization="infoquant")
