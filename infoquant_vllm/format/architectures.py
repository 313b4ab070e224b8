"""List the model classes that the format covers, and the linears of a decoder layer.

To add a class, add a row to ARCHITECTURES under the name that transformers and vLLM give it. Its decoder layer
must have the linears of SITES and norms of NORMS; `model_config` says which uses of its
fields are served, and `tests/common/tiny.py` needs a tiny model of it, over which the tests run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SITES: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linears of a decoder layer by the input that they share, which is transformed and quantized once."""
FUSED = {"self_attn.qkv_proj": SITES["qkv"], "mlp.gate_up_proj": SITES["gate_up"]}
"""Linears that vLLM holds as one, and so do the sources of some classes; a checkpoint never does."""
SITE_NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
"""RMSNorms whose output is a site's input: linears of these sites read the residual stream."""
NORMS = {
    "before": tuple(SITE_NORMS.values()),
    "behind": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "around": (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}
"""RMSNorms of a decoder layer by their places: of the inputs of attention and MLP, of their outputs, or of both."""
ROW_PARALLEL_SITES = tuple(site for site in SITES if site not in SITE_NORMS)
"""Sites whose linears write to the residual stream. Tensor parallelism shards their input features over the ranks;
the inputs of the other sites are whole on every rank."""
LAYER_TYPES = ("full_attention", "sliding_attention")
"""Kinds of decoder layers in `layer_types`: those that attend over all tokens before, and those with a window."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types that transformers and vLLM compute alike in most classes; they differ on dynamic."""


@dataclass(frozen=True)
class Experts:
    """Describe the mixture of experts in the place of a decoder layer's MLP, by the names in its files.

    block: the mixture, inside the decoder layer; it holds `gate`, the router, and `experts.0`, `experts.1`, ...
    gate, up, down: linears of an expert
    count: number of experts where config.json has none
    size: field of config.json with the features between them
    shared_size: the same of a shared expert, that every token passes besides those the router chooses; its output is
        scaled by another unquantized linear
    fused: the source holds the linears of all experts as tensors, by their names in the block: gate and up together
        [experts, 2 * size, hidden], and down [experts, hidden, size]; a checkpoint never does
    router: name of the router in the block, in the source; a checkpoint has it as `gate`
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    count: int = 128
    size: str = "moe_intermediate_size"
    shared_size: str | None = None
    fused: tuple[str, str] | None = None
    router: str = "gate"

    @property
    def gates(self) -> tuple[str, ...]:
        """The linears that weight experts, inside the decoder layer, the router first; they stay unquantized."""
        shared = () if self.shared_size is None else (f"{self.block}.shared_expert_gate",)
        return f"{self.block}.gate", *shared

    def expert(self, index: int) -> str:
        """Return the name of an expert inside the decoder layer."""
        return f"{self.block}.experts.{index}"


@dataclass(frozen=True)
class Architecture:
    """Describe how transformers and vLLM read config.json for one model class.

    model_type: `model_type` of the class's config
    bias_fields: the fields among `attention_bias` and `mlp_bias` that add biases to all linears of their block
    qkv_bias: q, k and v always have a bias, o never has one
    qk_norm: the queries and keys that an RMSNorm before RoPE sees at once, by `q_norm` and `k_norm`: those of a head
        [head_dim], or of the projection [heads * head_dim]; none if there are no such norms
    norms: the places of the norms, a key of NORMS
    norm_offset: added to the weight of a norm, it is the gain
    activation: the field that names the activation of the gate, and the activation that it has to name
    fused: the source holds the linears of FUSED as one, with their rows in that order
    windows: the layers that `sliding_window` applies to: none (transformers does not read it), all, or those that
        `layer_types` names; Qwen's `max_window_layers` stands for it, or Gemma's own pattern (pattern)
    partial_rotary: `partial_rotary_factor` may leave features of a head without RoPE
    ropes: the RoPE types that transformers and vLLM compute alike
    layer_ropes: layers with a window have a RoPE of their own; `rope_parameters` holds one by each of LAYER_TYPES
    free_head_dim: `head_dim` may differ from hidden_size / num_attention_heads
    experts: names of the mixture of experts that each layer has in place of its MLP
    tied: whether vLLM's class serves models whose embedding is their lm_head: either, never, or these alone (always)
    plain_embedding: vLLM's class quantizes no embedding, so a tied one is neither rotated nor in 8 bits
    defaults: values of fields that config.json leaves out
    fixed: values of fields that vLLM's class does not read, and computes with
    """

    model_type: str
    bias_fields: tuple[str, ...] = ()
    qkv_bias: bool = False
    qk_norm: Literal["none", "head", "projection"] = "none"
    norms: Literal["before", "behind", "around"] = "before"
    norm_offset: int = 0
    activation: tuple[str, str] = ("hidden_act", "silu")
    fused: bool = False
    partial_rotary: bool = False
    ropes: tuple[str, ...] = ROPE_TYPES
    layer_ropes: bool = False
    windows: Literal["none", "all", "layers", "pattern"] = "none"
    free_head_dim: bool = True
    experts: Experts | None = None
    tied: Literal["either", "never", "always"] = "either"
    plain_embedding: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def norms_behind(self) -> bool:
        """Return whether norms follow attention and MLP: their gains do not fold into the linears before them."""
        return self.norms != "before"

    @property
    def rope_inputs(self) -> tuple[str, str]:
        """The last modules before RoPE that scale single features of queries and of keys.

        A norm is such a module: it cancels a scale of all features before it, and mixes others.
        """
        kind = "proj" if self.qk_norm == "none" else "norm"
        return f"self_attn.q_{kind}", f"self_attn.k_{kind}"


MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
"""Granite's factors on embeddings, scores, what layers add to the residual stream, and (its inverse) on logits."""
QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32_768,
}
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", bias_fields=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Architecture(
        "mistral",
        windows="all",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072},
    ),
    "MinistralForCausalLM": Architecture(
        "ministral",
        windows="layers",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": None,
            "sliding_window": 4096,
            "max_position_embeddings": 131_072,
        },
    ),
    "GraniteForCausalLM": Architecture(
        "granite",
        bias_fields=("attention_bias", "mlp_bias"),
        defaults=dict.fromkeys(MULTIPLIERS, 1.0) | {"attention_sinks": None},
    ),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        bias_fields=("attention_bias",),
        norms="around",
        norm_offset=1,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        windows="pattern",
        tied="always",
        plain_embedding=True,
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3_text",
        bias_fields=("attention_bias",),
        qk_norm="head",
        norms="around",
        norm_offset=1,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        ropes=("default", "linear"),
        layer_ropes=True,
        windows="pattern",
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_local_base_freq": 10_000.0,
            "query_pre_attn_scalar": 256,
        },
    ),
    "Olmo2ForCausalLM": Architecture(
        "olmo2",
        bias_fields=("attention_bias",),
        qk_norm="projection",
        norms="behind",
        defaults={"max_position_embeddings": 2048, "pad_token_id": 1},
    ),
    "Phi3ForCausalLM": Architecture(
        "phi3",
        fused=True,
        windows="all",
        partial_rotary=True,
        ropes=("default",),
        free_head_dim=False,
        defaults={"max_position_embeddings": 4096, "pad_token_id": 32_000},
    ),
    "Qwen2ForCausalLM": Architecture(
        "qwen2",
        qkv_bias=True,
        windows="layers",
        free_head_dim=False,
        defaults=QWEN_DEFAULTS,
    ),
    "Qwen3ForCausalLM": Architecture(
        "qwen3", qk_norm="head", windows="layers", defaults=QWEN_DEFAULTS | {"head_dim": 128}
    ),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        bias_fields=("attention_bias", "mlp_bias"),
        windows="layers",
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
            "pad_token_id": 128_004,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
        },
    ),
    "GraniteMoeForCausalLM": Architecture(
        "granitemoe",
        free_head_dim=False,
        experts=Experts(
            "block_sparse_moe",
            count=8,
            size="intermediate_size",
            fused=("input_linear.weight", "output_linear.weight"),
            router="router.layer",
        ),
        plain_embedding=True,
        defaults=dict.fromkeys(MULTIPLIERS, 1.0)
        | {"attention_sinks": None, "num_experts_per_tok": 2, "max_position_embeddings": 2048},
    ),
    "MixtralForCausalLM": Architecture(
        "mixtral",
        experts=Experts("block_sparse_moe", "w1", "w3", "w2", count=8, size="intermediate_size"),
        tied="never",
        defaults={
            "num_key_value_heads": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 131_072,
        },
    ),
    "OlmoeForCausalLM": Architecture(
        "olmoe",
        qk_norm="projection",
        free_head_dim=False,
        experts=Experts(count=64, size="intermediate_size"),
        tied="never",
        defaults={
            "num_experts_per_tok": 8,
            "max_position_embeddings": 4096,
            "pad_token_id": 1,
            "rms_norm_eps": 1e-5,
            "norm_topk_prob": False,
        },
        fixed={"rms_norm_eps": 1e-5, "norm_topk_prob": False},
    ),
    "Qwen2MoeForCausalLM": Architecture(
        "qwen2_moe",
        qkv_bias=True,
        free_head_dim=False,
        experts=Experts(count=60, shared_size="shared_expert_intermediate_size"),
        defaults={
            "num_key_value_heads": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "use_sliding_window": False,
        },
    ),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe",
        qk_norm="head",
        experts=Experts(),
        defaults={
            "num_key_value_heads": 4,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "use_sliding_window": False,
        },
    ),
}
"""Architectures by their name in config.json."""
