"""Broken checkpoints, made from a sound one: every kind of tensor, every field of the config, files and names.

A case spoils a folder and names what the refusal must say: where, and what was found there.
"""

import json
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from infoquant_vllm.format import INDEX_FILE
from tests.common.checkpoints import write_random

SHARD = "model-00001-of-00001.safetensors"
LAYER = "model.layers.1."
SCHEME = {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 4}}
QUANTIZATION = {
    "config_groups": {
        "blocks": SCHEME
        | {
            "targets": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
            "weights": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 64},
            "input_activations": {"num_bits": 4, "strategy": "group", "group_size": 32, "mean": True},
            "input_transform": {"type": "blocks", "block_size": 64},
        },
        "kronecker": SCHEME | {"targets": ["o_proj"], "input_transform": {"type": "kronecker", "factors": [8, 32]}},
        "hadamard": SCHEME | {"targets": ["down_proj"], "input_transform": {"type": "hadamard", "block_size": 384}},
    },
    "ignore": [],
    "kv_cache": {"key_bits": 4, "value_bits": 4, "key_transform": "hadamard", "key_mean": True, "key_feedback": True},
    "lm_head_bits": 8,
}
"""With it a checkpoint has tensors of every kind."""

TENSORS = {  # one of each kind
    "packed": f"{LAYER}mlp.up_proj.weight_packed",
    "scale": f"{LAYER}mlp.up_proj.weight_scale",
    "multiplier": f"{LAYER}mlp.up_proj.weight_multiplier",
    "zero point": f"{LAYER}mlp.up_proj.weight_zero_point",
    "clip": f"{LAYER}mlp.down_proj.input_clip_ratio",
    "input mean": f"{LAYER}self_attn.q_proj.input_mean",
    "output mean": f"{LAYER}self_attn.q_proj.output_mean",
    "blocks": f"{LAYER}self_attn.q_proj.input_blocks",
    "left factor": f"{LAYER}self_attn.o_proj.input_left",
    "right factor": f"{LAYER}self_attn.o_proj.input_right",
    "key clip": f"{LAYER}self_attn.attn.key_clip_ratio",
    "value clip": f"{LAYER}self_attn.attn.value_clip_ratio",
    "key offset": f"{LAYER}self_attn.attn.key_mean",
    "key feedback": f"{LAYER}self_attn.attn.key_feedback",
    "norm": f"{LAYER}input_layernorm.weight",
    "last norm": "model.norm.weight",
    "vocabulary": "model.embed_tokens.weight_packed",
    "vocabulary scale": "model.embed_tokens.weight_scale",
    "rotation": "model.embed_tokens.r1",
    "last norm's gain": "model.embed_tokens.final_norm_weight",
}
OTHERS = {  # tensors that Llama has none of
    "norm of all queries": f"{LAYER}self_attn.q_norm.weight",
    "norm of all keys": f"{LAYER}self_attn.k_norm.weight",
    "norm behind the MLP": f"{LAYER}post_feedforward_layernorm.weight",
}
AROUND = {  # tensors of a class with norms before and behind, whose gains are 1 more than their weights
    "norm of a head's queries": f"{LAYER}self_attn.q_norm.weight",
    "norm before the MLP": f"{LAYER}pre_feedforward_layernorm.weight",
}
MAY_BE_ZERO = ("packed", "zero point", "input mean", "output mean", "key offset", "key feedback", "vocabulary")

Change = Callable[[Any], Any]


@dataclass(frozen=True)
class Case:
    """How a sound folder is corrupted, and what the refusal must say (a part of it each)."""

    spoil: Callable[[Path], object]
    says: tuple[str, ...]


def write_sound(folder: Path) -> Path:
    """The checkpoint that all cases begin with."""
    return write_random(folder, QUANTIZATION, tie_word_embeddings=True)


def write_other_sound(folder: Path) -> Path:
    """One of a class with norms behind attention and MLP."""
    names = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
    return write_random(folder, {"rotated_hidden_states": False}, **names)


MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
GROUPS = ("quantization_config", "config_groups")
EXPERT, ROUTER = f"{LAYER}mlp.experts.2.", f"{LAYER}mlp.gate.weight"


def write_sound_mixture(folder: Path) -> Path:
    """The mixture of experts that the cases of `mixture_cases` begin with."""
    return write_random(folder, **MIXTURE)


def mixture_cases() -> dict[str, Case]:
    """What can be broken in a mixture of experts alone, by name."""
    packed, clip = f"{EXPERT}down_proj.weight_packed", f"{EXPERT}gate_proj.input_clip_ratio"
    found = {
        "expert's weights missing": _tensor(packed, None, "is missing"),
        "expert's weights cut short": _tensor(packed, lambda t: t[:-1].clone(), "has shape", "expected"),
        "expert's clip missing": _tensor(clip, None, "is missing"),
        "expert's scale zero": _tensor(f"{EXPERT}up_proj.weight_scale", torch.zeros_like, "is 0,"),
        "router missing": _tensor(ROUTER, None, "is missing"),
        "router of other experts": _tensor(ROUTER, lambda t: t[:-1].clone(), "has shape", "expected [4, 256]"),
        "router of another dtype": _tensor(ROUTER, lambda t: t.to(torch.int32), "is I32", "expected"),
        "router NaN": _tensor(ROUTER, lambda t: _first(t, float("nan")), "is nan", "1 of"),
        "an expert more": Case(_edit("config.json", ("num_experts",), 5), ("experts.4", "is missing")),
        "an expert fewer": Case(_edit("config.json", ("num_experts",), 3), ("mlp.gate", "has shape")),
        "router quantized": Case(
            _edit("config.json", (*GROUPS, "out", "targets"), ["o_proj", f"{LAYER}mlp.gate"]), ("mlp.gate",)
        ),
        "router not named": Case(_edit("config.json", ("quantization_config", "ignore"), ["lm_head"]), ("mlp.gate",)),
    }
    for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        found |= {f"{name} {kind}": Case(_edit("config.json", (name,), WRONG[kind]), (name,))
                  for kind in WRONG if kind != "missing" and (name, kind) != ("num_experts", "empty")}  # fmt: skip
    return found


def write_around_sound(folder: Path) -> Path:
    """One of a class with norms before and behind attention and MLP."""
    names = {"architectures": ["Gemma3ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh"}
    return write_random(folder, {"rotated_hidden_states": False}, **names)


def cases() -> dict[str, Case]:
    """All of them, by name."""
    return dict([*_tensors(TENSORS), *_values(), *_config_fields(), *_model_fields(), *_files()])


def other_cases() -> dict[str, Case]:
    """Those that begin with `write_other_sound`."""
    return dict(_tensors(OTHERS))


def around_cases() -> dict[str, Case]:
    """Those that begin with `write_around_sound`."""
    return dict(_tensors(AROUND, norm_offset=1))


def _tensors(tensors: dict[str, str], norm_offset: int = 0) -> Iterator[tuple[str, Case]]:
    for label, name in tensors.items():
        yield f"{label} missing", _tensor(name, None, "is missing")
        yield f"{label} cut short", _tensor(name, lambda t: t[:-1].clone(), "has shape", "expected")
        yield f"{label} reshaped", _tensor(name, lambda t: t.reshape(-1, 1, 1), "has shape", "expected")
        yield f"{label} of another dtype", _tensor(name, lambda t: t.to(torch.int32), "is I32", "expected")
        if label not in ("packed", "multiplier", "zero point", "vocabulary"):
            for value in (float("nan"), float("inf")):
                yield f"{label} {value}", _tensor(name, lambda t, v=value: _first(t, v), f"is {value:g}", "1 of")
        if label not in MAY_BE_ZERO:
            spoil = _tensor(name, lambda t: torch.full_like(t, -norm_offset), f"is {-norm_offset},")
            yield f"{label} zero", spoil


def _values() -> Iterator[tuple[str, Case]]:
    yield "scale negative", _tensor(TENSORS["scale"], lambda t: _first(t, -1.0), "is -1, expected scales above 0")
    yield "clip above 1", _tensor(TENSORS["clip"], lambda t: _first(t, 2.0), "is 2, expected factors in (0, 1]")
    too_large = _tensor(TENSORS["multiplier"], lambda t: _first(t, 16), "is 16, expected 1 .. ", "zero-point")
    yield "multiplier too large", too_large
    yield "multiplier too large for its zero point", Case(_stretch, (TENSORS["multiplier"], "is 9, expected 1 .. 8,"))
    yield "zero point of 5 bits", _tensor(TENSORS["zero point"], lambda t: _first(t, 16), "is 16, expected codes up to")


def _first(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor.view(-1)[0] = value
    return tensor


def _stretch(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    _first(tensors[TENSORS["multiplier"]], 9)
    _first(tensors[TENSORS["zero point"]], 0)
    save_file(tensors, folder / SHARD)


def _tensor(name: str, change: Change | None, *says: str) -> Case:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / SHARD)
        before = tensors.pop(name)
        if change is not None:
            tensors[name] = change(before)
        save_file(tensors, folder / SHARD)
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, SHARD)}))

    return Case(spoil, (name, *says))


def _edit(file: str, path: tuple[str, ...], value: Any) -> Callable[[Path], None]:
    """Set a field, or take it away where the value is `...`."""

    def spoil(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        place = data
        for name in path[:-1]:
            place = place[name]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        (folder / file).write_text(json.dumps(data))

    return spoil


WRONG = {"missing": ..., "of another type": {"a": 1}, "huge": 2**62, "negative": -1, "empty": None}
BLOCKS = ("config_groups", "blocks")
FIELDS = (
    ("quant_method",),
    ("format_version",),
    ("config_groups",),
    (*BLOCKS, "targets"),
    (*BLOCKS, "weights"),
    (*BLOCKS, "weights", "num_bits"),
    (*BLOCKS, "weights", "symmetric"),
    (*BLOCKS, "weights", "strategy"),
    (*BLOCKS, "weights", "group_size"),
    (*BLOCKS, "input_activations"),
    (*BLOCKS, "input_activations", "num_bits"),
    (*BLOCKS, "input_activations", "strategy"),
    (*BLOCKS, "input_activations", "group_size"),
    (*BLOCKS, "input_activations", "mean"),
    (*BLOCKS, "input_transform"),
    (*BLOCKS, "input_transform", "type"),
    (*BLOCKS, "input_transform", "block_size"),
    ("config_groups", "kronecker", "input_transform", "factors"),
    ("kv_cache",),
    ("kv_cache", "key_bits"),
    ("kv_cache", "value_bits"),
    ("kv_cache", "key_transform"),
    ("kv_cache", "key_mean"),
    ("kv_cache", "key_feedback"),
    ("online_r1",),
    ("lm_head_bits",),
    ("ignore",),
)
SERVED_WITHOUT = (("kv_cache", "key_transform"), ("ignore",))  # their defaults make another model, but a sound one


def _config_fields() -> Iterator[tuple[str, Case]]:
    for path in FIELDS:
        for kind, value in WRONG.items():
            if kind != "missing" or path not in SERVED_WITHOUT:
                spoil = _edit("config.json", ("quantization_config", *path), value)
                yield f"{'.'.join(path)} {kind}", Case(spoil, ())
    weights = ("quantization_config", *BLOCKS, "weights", "group_size")
    yield "groups that do not divide", Case(_edit("config.json", weights, 48), ("group_size 48 does not divide",))
    path = ("quantization_config", *BLOCKS, "input_activations", "segment_size")
    for size, says in ((96, "segment_size 96 does not divide"), (48, "group_size 32 does not divide segment_size 48")):
        yield f"segments of {size}", Case(_edit("config.json", path, size), (says,))
    for kind in ("of another type", "huge", "negative"):
        yield f"segment_size {kind}", Case(_edit("config.json", path, WRONG[kind]), ("segment_size",))
    inputs = ("quantization_config", "config_groups", "kronecker", "input_activations")
    yield "mean without tensors", Case(_edit("config.json", (*inputs, "mean"), True), ("input_mean", "is missing"))
    sixteen = {"num_bits": 16, "mean": True}
    yield "mean of 16 bits", Case(_edit("config.json", inputs, sixteen), ("mean does not go with num_bits 16",))
    yield "groups of another size", Case(_edit("config.json", weights, 16), ("weight_multiplier", "has shape"))


def _model_fields() -> Iterator[tuple[str, Case]]:
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        for kind, value in WRONG.items():
            yield f"{name} {kind}", Case(_edit("config.json", (name,), value), (name,))
    other = _edit("config.json", ("architectures",), ["GPT2LMHeadModel"])
    yield "another architecture", Case(other, ("GPT2LMHeadModel",))


def _write(file: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(data)


def _header(entries: dict[str, Any], length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def _cut(share: float) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        (folder / SHARD).write_bytes(data[: int(share * len(data))])

    return spoil


def _files() -> Iterator[tuple[str, Case]]:
    whole = "not a whole safetensors file"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    broken = {
        "empty": b"",
        "a pickle": pickle.dumps({"model.norm.weight": [1.0]}),
        "a header that is longer than the file": _header({}, 2**20),
        "a header of 2^63 bytes": _header({}, 2**63),
        "a header that is no JSON": struct.pack("<Q", 4) + b"{{{{",
        "data beyond the file": _header({"a": entry | {"data_offsets": [0, 2**40], "shape": [2**38]}}),
        "data that overlaps": _header({"a": entry, "b": entry}) + bytes(8),
        "a size that does not fit its data": _header({"a": entry | {"shape": [2**62]}}) + bytes(8),
        "a negative size": _header({"a": entry | {"shape": [-2]}}) + bytes(8),
        "an unknown dtype": _header({"a": entry | {"dtype": "Z9"}}) + bytes(8),
    }
    for label, data in broken.items():
        yield f"shard: {label}", Case(_write(SHARD, data), (SHARD, whole))
    for share in (0.001, 0.5, 0.999):
        yield f"shard: {share:.1%} of it", Case(_cut(share), (SHARD, whole))
    yield "shard missing", Case(lambda f: (f / SHARD).unlink(), (SHARD, "missing"))
    yield "shard a folder", Case(lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()), (SHARD, whole))
    for place in ("../x.safetensors", "/etc/passwd", "model.bin", "a/b.safetensors", 7, None, ["x"]):
        spoil = _edit(INDEX_FILE, ("weight_map", TENSORS["norm"]), place)
        yield f"index points to {place!r}", Case(spoil, (INDEX_FILE, TENSORS["norm"]))
    for file in ("config.json", INDEX_FILE):
        for label, data in {"empty": b"", "a list": b"[1]", "deep": b"[" * 10**5, "not text": b"\xff\xfe\x00"}.items():
            yield f"{file} {label}", Case(_write(file, data), (file,))
        yield f"{file} missing", Case(lambda f, name=file: (f / name).unlink(), (file,))
    yield "index without tensors", Case(_edit(INDEX_FILE, ("weight_map",), {}), (INDEX_FILE, "weight_map"))
    yield "a name with a line break", Case(_edit(INDEX_FILE, ("weight_map", "a\nb"), "a\n.safetensors"), (INDEX_FILE,))
