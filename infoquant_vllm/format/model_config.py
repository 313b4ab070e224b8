"""Check every field of config.json: transformers and vLLM must read it alike, or the model is refused by name."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from infoquant_vllm.format.architectures import ARCHITECTURES, LAYER_TYPES, MULTIPLIERS, Architecture
from infoquant_vllm.format.errors import FormatError

Settings = Mapping[str, Any]
"""config.json, completed by the defaults of the class."""
Check = Callable[[str, Settings, Architecture], str | None]
"""Takes a field, the settings and the class; returns a description of what differs, or None."""

ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""Required parameters by RoPE type; `original_max_position_embeddings` has a default."""
ROPE_OPTIONS = ("rope_theta", "original_max_position_embeddings", "beta_fast", "beta_slow")
"""Optional parameters. They must not be null: vLLM would use null as a number."""
ROPE_OF_VLLM = ("rope_dim", "mrope_section", "xdrope_section", "use_fope")  # only vLLM reads them
DTYPES = ("bfloat16", "float16", "float32")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # numbers of experts

REQUIRED = ("model_type",)  # fields without a default


def architecture_name(config: dict[str, Any], source: str) -> str:
    """Return the class that config.json names; raise FormatError if it, or a value of a field, is not supported."""
    found = config.get("architectures")
    if not isinstance(found, list) or len(found) != 1 or found[0] not in tuple(ARCHITECTURES):
        experts = next((f", a mixture of {config[key]!r:.20} experts" for key in EXPERTS if config.get(key)), "")
        raise FormatError(
            f"{source}: architectures is {found!r:.200}{experts}; this release knows {', '.join(ARCHITECTURES)}"
        )
    name: str = found[0]
    problem = _not_alike(config, ARCHITECTURES[name])
    if problem is not None:
        raise FormatError(f"{source}: {problem}; this release does not serve that with {name}")
    return name


def _not_alike(config: dict[str, Any], architecture: Architecture) -> str | None:
    settings = dict(architecture.defaults) | config
    named = (name for name in FIELDS if name in settings or name in REQUIRED)
    problems = (FIELDS[name](name, settings, architecture) or _fixed(name, settings, architecture) for name in named)
    return next((problem for problem in problems if problem is not None), None)


def _fixed(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Refuse another value than the one that vLLM's class computes with, whatever config.json says."""
    fixed = architecture.fixed
    return _only(fixed[name])(name, settings, architecture) if name in fixed else None


def _unread(name: str, settings: Settings, architecture: Architecture) -> None:
    """Accept a field that changes no result."""


def _size(name: str, settings: Settings, architecture: Architecture) -> None:
    """Accept a field that `ModelShape` checks."""


def _only(*values: Any) -> Check:
    """Accept these values only; a missing field has one of them."""

    def check(name: str, settings: Settings, architecture: Architecture) -> str | None:
        found = settings[name]
        alike = any(found is value or (type(found) is type(value) and found == value) for value in values)
        return None if alike else f"{name} is {found!r:.80}, not {' or '.join(map(_json, values))}"

    return check


def _json(value: Any) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))


def _model_type(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Require the class's own `model_type`: both choose the config class and its defaults by it."""
    found = settings.get(name)
    return None if found == architecture.model_type else f"{name} is {found!r:.80}, not '{architecture.model_type}'"


def _activation(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Require the class's activation; a class does not read the field that another names its activation by."""
    own, activation = architecture.activation
    return _only(activation)(name, settings, architecture) if name == own else None


def _bias(name: str, settings: Settings, architecture: Architecture) -> str | None:
    if settings[name] and name not in architecture.bias_fields:
        return f"{name} is {settings[name]!r:.80}"
    return None


def _qkv_bias(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Refuse a value unlike attention_bias: vLLM prefers this field, unless the class has its own rule.

    Qwen2-MoE reads it, and has biases by default.
    """
    if architecture.qkv_bias and architecture.experts is not None:
        return None if settings[name] is True else f"{name} is {settings[name]!r:.80}"
    own_rule = architecture.qkv_bias or architecture.qk_norm != "none"
    if own_rule or bool(settings[name]) == bool(settings.get("attention_bias")):
        return None
    return f"{name} is {settings[name]!r:.80}, attention_bias {settings.get('attention_bias')!r:.80}"


def _head_dim(name: str, settings: Settings, architecture: Architecture) -> str | None:
    hidden, heads, head_dim = (settings.get(key) for key in ("hidden_size", "num_attention_heads", name))
    if head_dim is None and name in architecture.defaults:
        return f"{name} is missing or null, without which transformers does not build the class"
    if head_dim is None or architecture.free_head_dim:
        return None
    share = isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and head_dim == hidden // heads
    return None if share else f"{name} {head_dim!r:.80} is not hidden_size / num_attention_heads"


def _kv_heads(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Refuse a value unlike num_key_value_heads: vLLM sizes the cache by this field if it exists."""
    found, used = settings[name], settings.get("num_key_value_heads") or settings.get("num_attention_heads")
    return None if found in (None, used) else f"{name} is {found!r:.80}, num_key_value_heads {used!r:.80}"


def _positive(name: str, settings: Settings, architecture: Architecture) -> str | None:
    return None if _is_positive(settings[name]) else f"{name} is {settings[name]!r:.80}, not a number above 0"


def _own_factor(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Check a factor that only the classes with a default for it read."""
    return _positive(name, settings, architecture) if name in architecture.defaults else None


def _soft_cap(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Accept a bound of scores or logits, or none, of the classes with a default for it; others have none."""
    if settings[name] is None:
        return None
    return _positive(name, settings, architecture) if name in architecture.defaults else f"{name} is not null"


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _positions(name: str, settings: Settings, architecture: Architecture) -> str | None:
    found = settings[name]
    return None if type(found) is int and found > 0 else f"{name} is {found!r:.80}, not a number of tokens"


def _padding(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Refuse a padding token outside the vocabulary: transformers cannot build such an embedding."""
    found, rows = settings[name], settings.get("vocab_size")
    if found is None or not isinstance(rows, int) or rows < 1 or (type(found) is int and -rows <= found < rows):
        return None
    return f"{name} is {found!r:.80}, not among {rows} tokens (null names none)"


def _dtype(name: str, settings: Settings, architecture: Architecture) -> str | None:
    found = settings[name]
    return None if found is None or found in DTYPES else f"{name} is {found!r:.80}, not {', '.join(DTYPES)}"


def _rope(name: str, settings: Settings, architecture: Architecture) -> str | None:
    return _one_rope(name, settings[name], settings, architecture)


def _rope_parameters(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Check the RoPE of all layers, or of each kind of layers where the class has one for each."""
    ropes = settings[name]
    if not architecture.layer_ropes or ropes is None:
        return _one_rope(name, ropes, settings, architecture)
    if not isinstance(ropes, dict) or not set(ropes) <= set(LAYER_TYPES):
        return f"{name} is {ropes!r:.80}, not an object of {' and '.join(LAYER_TYPES)}"
    problems = (_one_rope(f"{name}: {kind}", rope, settings, architecture) for kind, rope in ropes.items())
    return next((problem for problem in problems if problem is not None), None)


def _one_rope(name: str, rope: Any, settings: Settings, architecture: Architecture) -> str | None:
    if rope is None or rope == {}:
        return None
    if not isinstance(rope, dict):
        return f"{name} is {rope!r:.80}, not an object"
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in architecture.ropes:
        return f"{name}: rope_type is {kind!r:.80}, not {', '.join(architecture.ropes)}"
    if architecture.layer_ropes and "type" in rope:
        return f"{name}: type is {kind!r:.80}, which transformers reads only under the name rope_type here"
    nested = next((key for key, value in rope.items() if isinstance(value, dict)), None)
    if nested is not None:
        return f"{name} has its own {nested!r:.80}, RoPE of some layers"
    problem = _nested_rotary("partial_rotary_factor", rope, settings, architecture)
    if problem is not None:
        return f"{name}: {problem}"
    other = next((key for key in ROPE_OF_VLLM if rope.get(key)), None)
    if other is not None:
        return f"{name}: {other} is {rope[other]!r:.80}, which vLLM alone reads"
    return _rope_numbers(name, rope, str(kind))


def _partial_rotary(name: str, settings: Settings, architecture: Architecture) -> str | None:
    found, lowest = settings[name], 0 if architecture.partial_rotary else 1
    if found is None or (_is_positive(found) and lowest <= found <= 1):
        return None
    return f"{name} is {found!r:.80}, not {'at most ' * architecture.partial_rotary}1.0"


def _nested_rotary(name: str, rope: Settings, settings: Settings, architecture: Architecture) -> str | None:
    """Refuse a field that differs from the one of the same name outside: only one of them counts."""
    if name not in rope:
        return None
    if rope[name] is None or settings.get(name, rope[name]) != rope[name]:
        return f"{name} is {rope[name]!r:.80}, and {settings.get(name)!r:.80} outside"
    return _partial_rotary(name, rope, architecture)


def _rope_numbers(name: str, rope: Settings, kind: str) -> str | None:
    for key in (*ROPE_NUMBERS[kind], *(key for key in ROPE_OPTIONS if key in rope)):
        if not _is_positive(rope.get(key)):
            return f"{name}: {key} of {kind} is {rope.get(key)!r:.80}, not a number above 0"
    if kind == "linear" and type(rope["factor"]) is int:
        return f"{name}: factor is {rope['factor']}, which vLLM takes as {rope['factor']}.0 alone"
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        return f"{name}: low_freq_factor {rope['low_freq_factor']} is not below high_freq_factor"
    return None


def _has_windows(settings: Settings) -> bool:
    """Return whether windows are switched on: some classes have a field for it beside `sliding_window`."""
    return settings.get("sliding_window") is not None and settings.get("use_sliding_window") is not False


def _window(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Refuse a window that one of both ignores: on Llama vLLM applies it and transformers does not."""
    window, longest = settings[name], settings.get("max_position_embeddings")
    if not _has_windows(settings) and architecture.windows != "pattern":
        return None
    if type(window) is not int or window < 1:
        none = "" if architecture.windows == "pattern" else " (null switches it off)"
        return f"{name} is {window!r:.80}, expected a number of tokens{none}"
    if isinstance(longest, int) and window >= longest:
        return None
    if architecture.windows in ("layers", "pattern") or (
        architecture.windows == "all" and settings.get("layer_types") is None
    ):
        return None
    return f"{name} {window} is below max_position_embeddings {longest!r:.80} (null switches it off)"


def _layer_types(name: str, settings: Settings, architecture: Architecture) -> str | None:
    kinds, layers = settings[name], settings.get("num_hidden_layers")
    full, sliding = LAYER_TYPES
    known = [full]
    if architecture.windows in ("layers", "pattern") and _has_windows(settings):
        known.append(sliding)
    if kinds is None:
        return None
    if "attention_sinks" in architecture.defaults and settings["attention_sinks"] is not False:
        return f"{name} is given, from which vLLM concludes that the class has attention sinks"
    if not (isinstance(kinds, list) and set(map(str, kinds)) <= set(known)):
        return f"{name} is {kinds!r:.80}, not {' or '.join(known)} throughout"
    return None if len(kinds) == layers else f"{name} names {len(kinds)} layers, num_hidden_layers is {layers!r:.80}"


def _switch(name: str, settings: Settings, architecture: Architecture) -> str | None:
    known = name not in architecture.defaults or isinstance(settings[name], bool)
    return None if known else f"{name} is {settings[name]!r:.80}, not true or false"


def _first_window(name: str, settings: Settings, architecture: Architecture) -> str | None:
    found = settings[name]
    known = name not in architecture.defaults or (type(found) is int and found >= 0)
    return None if known else f"{name} is {found!r:.80}, not a number of layers"


def _no_rope_layers(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Check the flags of layers with RoPE, which only the classes with a default for them read."""
    flags, layers = settings[name], settings.get("num_hidden_layers")
    if name not in architecture.defaults or flags is None:
        return None
    known = isinstance(flags, list) and all(type(flag) in (int, bool) and flag in (0, 1) for flag in flags)
    if known and isinstance(layers, int) and len(flags) >= layers:
        return None
    return f"{name} is {flags!r:.80}, not a 0 or 1 for each of {layers!r:.80} layers"


def _interval(name: str, settings: Settings, architecture: Architecture) -> str | None:
    found = settings[name]
    known = name not in architecture.defaults or (type(found) is int and found > 0)
    return None if known else f"{name} is {found!r:.80}, not a number of layers"


def _tied(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Refuse what vLLM's class does not serve: a head of its own, or an embedding that is the head."""
    refused = {"either": (), "never": (True,), "always": (False, None)}[architecture.tied]
    return f"{name} is {_json(settings[name])}" if settings[name] in refused else None


def _experts(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Accept a number of experts of mixtures alone; transformers has two names for it."""
    found = settings[name]
    if architecture.experts is None:
        return None if found in (0, None) else f"{name} is {found!r:.80}, not 0"
    if found != settings.get("num_experts", found):
        return f"{name} is {found!r:.80}, num_experts {settings['num_experts']!r:.80}"
    return None if type(found) is int and found > 0 else f"{name} is {found!r:.80}, not a number of experts"


def _expert_size(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Require a size that `ModelShape` accepts, under the name by which the class reads it."""
    names, found = architecture.experts, settings[name]
    if names is None or name not in (names.size, names.shared_size):
        return None
    return None if type(found) is int and 1 <= found <= 2**17 else f"{name} is {found!r:.80}, not a size"


def _shared_size(name: str, settings: Settings, architecture: Architecture) -> str | None:
    """Refuse a shared expert where transformers has none, and vLLM may."""
    names, found = architecture.experts, settings[name]
    if names is not None and names.shared_size is not None:
        return _expert_size(name, settings, architecture)
    return None if names is None or found == 0 else f"{name} is {found!r:.80}, not 0"


def _of_mixtures(check: Check) -> Check:
    """Check a field in mixtures of experts alone; other classes do not read it."""

    def checked(name: str, settings: Settings, architecture: Architecture) -> str | None:
        return None if architecture.experts is None else check(name, settings, architecture)

    return checked


FIELDS: dict[str, Check] = {
    "architectures": _unread,  # `architecture_name` has read it
    "model_type": _model_type,
    # weights and their shapes
    "vocab_size": _size,
    "hidden_size": _size,
    "intermediate_size": _size,
    "num_hidden_layers": _size,
    "num_attention_heads": _size,
    "num_key_value_heads": _size,
    "tie_word_embeddings": _tied,
    "head_dim": _head_dim,
    "hidden_size_per_head": _only(None),
    "num_kv_heads": _kv_heads,
    "n_head_kv": _kv_heads,
    "attention_bias": _bias,
    "mlp_bias": _bias,
    "qkv_bias": _qkv_bias,
    "bias": _only(False, None),
    "qk_norm": _only(False, None),
    "dtype": _dtype,
    "torch_dtype": _dtype,
    "compression_config": _only(None),
    "per_layer_config": _only(None),
    "block_configs": _only(None),
    # the function
    "hidden_act": _activation,
    "hidden_activation": _activation,
    "rms_norm_eps": _positive,
    "logit_scale": _only(1.0, 1),
    **dict.fromkeys(MULTIPLIERS, _own_factor),
    "query_pre_attn_scalar": _own_factor,
    "final_logit_softcapping": _soft_cap,
    "head_dtype": _only(None),
    "ada_rms_norm_t_cond": _only(False, None),
    "is_encoder_decoder": _only(False, None),
    "pad_token_id": _padding,
    # positions and attention
    "max_position_embeddings": _positions,
    "original_max_position_embeddings": _positions,
    "rope_theta": _positive,
    "rope_scaling": _rope,
    "rope_parameters": _rope_parameters,
    "rope_local_base_freq": _own_factor,
    "rotary_emb_base": _only(None),
    "partial_rotary_factor": _partial_rotary,
    "rotary_pct": _only(1.0, 1, None),
    "rotary_emb_fraction": _only(1.0, 1, None),
    "no_rope_layers": _no_rope_layers,
    "no_rope_layer_interval": _interval,
    "sliding_window_pattern": _interval,
    "is_causal": _only(True),
    "use_bidirectional_attention": _only(False, None),
    "attention_sinks": _only(False, None),
    "layer_rope_theta": _only(None),
    "attn_logit_softcapping": _soft_cap,
    "clip_qkv": _only(None),
    "kv_lora_rank": _only(None),
    "layer_types": _layer_types,
    "target_layer_count": _only(None),
    "use_sliding_window": _switch,
    "sliding_window": _window,
    "max_window_layers": _first_window,
    "dual_chunk_attention_config": _only(None),
    "llama_4_scaling": _only(None),
    "attn_implementation": _only("eager", "sdpa", None),
    # fields by which vLLM detects other kinds of models
    "text_config": _only(None),
    "text_encoder": _only(None),
    "decoder": _only(None),
    "generator": _only(None),
    "canvas_length": _only(None),
    # mixtures of experts
    "num_experts": _experts,
    "num_local_experts": _experts,
    "n_routed_experts": _only(0, None),
    "num_experts_per_tok": _size,
    "moe_intermediate_size": _expert_size,
    "shared_expert_intermediate_size": _shared_size,
    "norm_topk_prob": _of_mixtures(_only(True, False)),
    "decoder_sparse_step": _of_mixtures(_only(1)),
    "mlp_only_layers": _of_mixtures(_only([], None)),
    "router_aux_loss_coef": _unread,
    "router_jitter_noise": _unread,
    "output_router_logits": _unread,
    # training, generation and records
    "attention_dropout": _unread,
    "resid_pdrop": _unread,
    "embd_pdrop": _unread,
    "initializer_range": _unread,
    "pretraining_tp": _unread,
    "use_cache": _unread,
    "chunk_size_feed_forward": _unread,
    "output_hidden_states": _unread,
    "return_dict": _unread,
    "bos_token_id": _unread,
    "eos_token_id": _unread,
    "id2label": _unread,
    "label2id": _unread,
    "problem_type": _unread,
    "transformers_version": _unread,
}
"""Checks by field: all fields that transformers' config classes or vLLM's model classes read."""
