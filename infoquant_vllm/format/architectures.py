"""The model classes whose checkpoints the format describes, and where they differ from Llama's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infoquant_vllm.format.errors import FormatError


@dataclass(frozen=True)
class Architecture:
    """What a class of transformers and vLLM makes of config.json; the defaults are what Llama needs least.

    bias_fields: those of `attention_bias` and `mlp_bias` that add biases to all linears of their part
    qkv_bias: q, k and v carry a bias whatever the config says, o none
    qk_norm: RMSNorms over each head of queries and of keys before RoPE, `q_norm` and `k_norm` [head_dim]
    windows: `sliding_window` is that of every layer
    free_head_dim: `head_dim` may be another than hidden_size / num_attention_heads
    defaults: what a field stands for where config.json does not name it
    """

    bias_fields: tuple[str, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: bool = False
    free_head_dim: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(bias_fields=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Architecture(
        windows=True, defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072}
    ),
    "Qwen2ForCausalLM": Architecture(
        qkv_bias=True, free_head_dim=False, defaults={"num_key_value_heads": 32, "use_sliding_window": False}
    ),
    "Qwen3ForCausalLM": Architecture(
        qk_norm=True, defaults={"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False}
    ),
}
"""By the name in config.json. A class that is added takes a line here and one in `offline/architectures.py`."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those that transformers and vLLM compute alike; they do not agree on dynamic."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Fields of mixtures of experts, none of which is known."""


def architecture_name(config: dict[str, Any], source: str) -> str:
    """The class that config.json names; raises FormatError for one that is not known, or a use of it that is not."""
    found = config.get("architectures")
    if not isinstance(found, list) or len(found) != 1 or found[0] not in tuple(ARCHITECTURES):
        experts = next((f", a mixture of {config[key]!r:.20} experts" for key in EXPERTS if config.get(key)), "")
        raise FormatError(
            f"{source}: architectures is {found!r:.200}{experts}; this release knows {', '.join(ARCHITECTURES)}"
        )
    name: str = found[0]
    problem = _not_served(ARCHITECTURES[name], config)
    if problem is not None:
        raise FormatError(f"{source}: {problem}; this release does not serve that with {name}")
    return name


def _not_served(architecture: Architecture, config: dict[str, Any]) -> str | None:
    """What transformers and vLLM would not compute alike, or the quantised KV cache not at all."""
    settings = dict(architecture.defaults) | config
    for name in ("attention_bias", "mlp_bias"):
        if settings.get(name) and name not in architecture.bias_fields:
            return f"{name} is {settings[name]!r}"
    if settings.get("dual_chunk_attention_config") is not None:
        return "dual_chunk_attention_config is set (attention in chunks)"
    if not architecture.free_head_dim and not _is_share_of_hidden(settings):
        return f"head_dim {settings['head_dim']!r} is not hidden_size / num_attention_heads"
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind not in ROPE_TYPES:
        return f"rope_type is {kind!r:.80}, not {', '.join(ROPE_TYPES)}"
    return _sliding_window(settings, architecture)


def _is_share_of_hidden(settings: dict[str, Any]) -> bool:
    hidden, heads, head_dim = (settings.get(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    if head_dim is None:
        return True
    return isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and head_dim == hidden // heads


def _sliding_window(settings: dict[str, Any], architecture: Architecture) -> str | None:
    """The words for a window that not every layer has, or that transformers and vLLM would not both apply."""
    kinds = settings.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and set(map(str, kinds)) <= {"full_attention"}):
        return f"layer_types is {kinds!r:.80}, not full_attention throughout"
    if "use_sliding_window" in architecture.defaults:
        return "use_sliding_window is true" if settings["use_sliding_window"] else None
    window, longest = settings.get("sliding_window"), settings.get("max_position_embeddings")
    if window is None:
        return None
    if type(window) is not int or window < 1:
        return f"sliding_window is {window!r}, expected a number of tokens (null switches it off)"
    if (isinstance(longest, int) and window >= longest) or (architecture.windows and kinds is None):
        return None
    return f"sliding_window {window} is below max_position_embeddings {longest!r} (null switches it off)"
