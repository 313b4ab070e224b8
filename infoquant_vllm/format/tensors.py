"""List the tensors of a checkpoint, with shapes and dtypes, from its config and the model's sizes."""

import math
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from infoquant_vllm.format.architectures import ARCHITECTURES, NORMS, SITE_NORMS, SITES, Experts
from infoquant_vllm.format.errors import FormatError
from infoquant_vllm.format.hadamard import hadamard_dense
from infoquant_vllm.format.model_config import architecture_name
from infoquant_vllm.format.schema import ActivationArgs, KVCacheArgs, LinearScheme, QuantizationConfigData, Size
from infoquant_vllm.format.tensor_parallel import check_tp_divisible

MAX_EXPERTS = 2**16  # in all layers


class TensorSpec(BaseModel):
    """Describe one tensor: its shape and safetensors dtype ("U8", "F32", ...; None: any float dtype)."""

    model_config = ConfigDict(frozen=True)

    shape: tuple[int, ...]
    dtype: str | None = None


class ModelShape(BaseModel):
    """Hold the model class and the sizes that the format depends on, from config.json."""

    model_config = ConfigDict(frozen=True, strict=True)

    architecture: str
    """A key of `ARCHITECTURES`."""
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=1024)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    attn_logit_softcapping: Annotated[float, Field(gt=0)] | None = None
    """Bound of attention's scores, which no mean key may be subtracted from then; None: there is none."""
    num_experts: Annotated[int, Field(ge=0, le=MAX_EXPERTS)] = 0
    num_experts_per_tok: Annotated[int, Field(ge=0)] = 0
    expert_size: Annotated[int, Field(ge=0, le=2**17)] = 0
    """Features between the linears of an expert; 0 without a mixture of experts."""
    shared_expert_size: Annotated[int, Field(ge=0, le=2**17)] = 0

    @model_validator(mode="after")
    def _query_heads_share_kv_heads(self) -> "ModelShape":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        return self

    @model_validator(mode="after")
    def _rotary_features_are_pairs(self) -> "ModelShape":
        if self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim} is {self.rotary_dim}, "
                "not an even number"
            )
        return self

    @model_validator(mode="after")
    def _experts_are_chosen_among_all(self) -> "ModelShape":
        if self.num_experts * self.num_hidden_layers > MAX_EXPERTS:
            raise ValueError(f"num_experts {self.num_experts} in each of num_hidden_layers {self.num_hidden_layers}")
        if self.experts is not None and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} of num_experts {self.num_experts}")
        if self.experts is not None and not self.expert_size:
            raise ValueError(f"{self.experts.size} is 0")
        if self.experts is not None and self.experts.shared_size and not self.shared_expert_size:
            raise ValueError(f"{self.experts.shared_size} is 0")
        return self

    @classmethod
    def from_hf(cls, config: dict[str, Any], source: str = "config.json") -> "ModelShape":
        """Read the sizes from a Hugging Face config; raise FormatError naming the wrong field."""
        name = architecture_name(config, source)
        heads = config.get("num_attention_heads")
        defaults: dict[str, Any] = {"architecture": name, "num_key_value_heads": heads}
        if isinstance(heads, int) and heads > 0 and isinstance(config.get("hidden_size"), int):
            defaults["head_dim"] = config["hidden_size"] // heads
        unnamed = {key: value for key, value in ARCHITECTURES[name].defaults.items() if key not in config}
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        defaults["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0)
        given = {key: value for key, value in config.items() if value is not None and key != "architecture"}
        settings = defaults | unnamed | given
        try:
            return cls.model_validate(settings | _expert_fields(settings, ARCHITECTURES[name].experts))
        except ValidationError as error:
            raise FormatError.from_validation(source, error) from None

    @property
    def rotary_dim(self) -> int:
        """Return how many features of a head RoPE rotates: the first ones, i with i + rotary_dim / 2."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def norm_offset(self) -> int:
        """Return what the gain of an RMSNorm is more than its weight."""
        return ARCHITECTURES[self.architecture].norm_offset

    @property
    def lm_head_module(self) -> str:
        """Return the module that holds the lm_head matrix [vocab_size, hidden_size]; in a tied model, the embedding."""
        return "model.embed_tokens" if self.tie_word_embeddings else "lm_head"

    @property
    def quantizes_lm_head(self) -> bool:
        """Return whether vLLM's class lets lm_head be quantized or rotated; in a tied model, the embedding."""
        return not (ARCHITECTURES[self.architecture].plain_embedding and self.tie_word_embeddings)

    @property
    def folds_r1(self) -> bool:
        """Return whether the residual stream can be rotated.

        It cannot where norms follow linears, nor where a tied embedding cannot: R1 becomes a Hadamard transform of each
        input that reads the stream.
        """
        return self.quantizes_lm_head and not ARCHITECTURES[self.architecture].norms_behind

    @property
    def experts(self) -> Experts | None:
        """Return the names of the mixture of experts, None for a dense model."""
        return ARCHITECTURES[self.architecture].experts

    @cached_property
    def sites(self) -> dict[str, tuple[str, ...]]:
        """Return the linears of a decoder layer by the input that they share, by their names inside the layer.

        The last part of a key is one of SITES. Each expert has a `gate_up` of its own, whose input is the same tensor:
        the tokens are different ones.
        """
        names = self.experts
        if names is None:
            return SITES
        found = {site: linears for site, linears in SITES.items() if not linears[0].startswith("mlp.")}
        for index in range(self.num_experts):
            expert = names.expert(index)
            found[f"{expert}.gate_up"] = (f"{expert}.{names.gate}", f"{expert}.{names.up}")
            found[f"{expert}.down"] = (f"{expert}.{names.down}",)
        if self.shared_expert_size:
            shared = f"{names.block}.shared_expert"
            found[f"{shared}.gate_up"] = (f"{shared}.gate_proj", f"{shared}.up_proj")
            found[f"{shared}.down"] = (f"{shared}.down_proj",)
        return found

    @cached_property
    def shared_inputs(self) -> list[tuple[str, ...]]:
        """Return the linears inside a layer whose input is quantized once: those of a site, or of all experts."""
        if self.experts is None:
            return list(self.sites.values())
        block = f"{self.experts.block}.experts."
        together = [site for site in self.sites if site.startswith(block) and site.endswith("gate_up")]
        others = [linears for site, linears in self.sites.items() if site not in together]
        return [*others, tuple(linear for site in together for linear in self.sites[site])]

    @property
    def kinds_of_sites(self) -> dict[str, str]:
        """Return a site for each kind of sites that may be quantized differently, by a short name.

        The experts that a router chooses are alike, and the first stands for all of them.
        """
        if self.experts is None:
            return {site: site for site in self.sites}
        first, shared = self.experts.expert(0), f"{self.experts.block}.shared_expert"
        short = {"qkv": "qkv", "o": "o", "gate_up": f"{first}.gate_up", "down": f"{first}.down"}
        if self.shared_expert_size:
            short |= {"shared_gate_up": f"{shared}.gate_up", "shared_down": f"{shared}.down"}
        return short

    def sites_like(self, site: str) -> list[str]:
        """Return the sites that are quantized as `site` is: itself, and those of the other experts."""
        if ".experts." not in site:
            return [site]
        kind = site.rpartition(".")[2]
        return [other for other in self.sites if ".experts." in other and other.endswith(f".{kind}")]

    def features(self, site: str) -> int:
        """Return the number of features of a site's input."""
        return self.layer_linears[self.sites[site][0]][1]

    @cached_property
    def layer_linears(self) -> dict[str, tuple[int, int]]:
        """Return the quantized linears of a decoder layer: name inside the layer to (out_features, in_features)."""
        hidden = self.hidden_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes = {"qkv": [(queries, hidden), (keys, hidden), (keys, hidden)], "o": [(hidden, queries)]}
        found: dict[str, tuple[int, int]] = {}
        for site, linears in self.sites.items():
            place, kind = site.rpartition(".")[::2]
            inner = self.shared_expert_size if place.endswith("shared_expert") else self.expert_size
            inner = inner if self.experts is not None else self.intermediate_size
            sizes = shapes.get(kind) or {"gate_up": [(inner, hidden)] * 2, "down": [(hidden, inner)]}[kind]
            found |= dict(zip(linears, sizes, strict=True))
        return found

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return every linear of the decoder layers: Hugging Face name to (out_features, in_features)."""
        return {
            f"model.layers.{layer}.{name}": shape
            for layer in range(self.num_hidden_layers)
            for name, shape in self.layer_linears.items()
        }

    @cached_property
    def gates(self) -> dict[str, tuple[int, int]]:
        """Return the unquantized linears that weight experts: name inside a layer to (out_features, in_features)."""
        if self.experts is None:
            return {}
        rows = [self.num_experts] + ([1] if self.shared_expert_size else [])
        return {gate: (count, self.hidden_size) for gate, count in zip(self.experts.gates, rows, strict=False)}

    @cached_property
    def norm_of(self) -> dict[str, str]:
        """Return the RMSNorm in front of each linear that reads the residual stream, whose gain folds into the linear.

        By names inside a layer.
        """
        if not self.folds_r1:
            return {}
        kinds = {linear: site.rpartition(".")[2] for site, linears in self.sites.items() for linear in linears}
        readers = {linear: SITE_NORMS[kind] for linear, kind in kinds.items() if kind in SITE_NORMS}
        return readers | dict.fromkeys(self.gates, SITE_NORMS["gate_up"])

    def has_bias(self, module: str) -> bool:
        """Return whether the linear of that name has a bias."""
        if ".self_attn." not in module:
            return self.mlp_bias
        if ARCHITECTURES[self.architecture].qkv_bias:
            return not module.endswith(".o_proj")
        return self.attention_bias

    def norms(self) -> dict[str, int]:
        """Return every RMSNorm: Hugging Face name to number of features."""
        architecture = ARCHITECTURES[self.architecture]
        sizes = dict.fromkeys(NORMS[architecture.norms], self.hidden_size)
        if architecture.qk_norm != "none":
            whole = architecture.qk_norm == "projection"
            sizes["self_attn.q_norm"] = self.head_dim * (self.num_attention_heads if whole else 1)
            sizes["self_attn.k_norm"] = self.head_dim * (self.num_key_value_heads if whole else 1)
        layers = {
            f"model.layers.{layer}.{name}": size
            for layer in range(self.num_hidden_layers)
            for name, size in sizes.items()
        }
        return layers | {"model.norm": self.hidden_size}


def activation_segments(args: ActivationArgs, in_features: int) -> int:
    """Return the number of scales per token for an input of `in_features`."""
    return 1 if args.segment_size is None else in_features // args.segment_size


def activation_groups(args: ActivationArgs, in_features: int) -> int:
    """Return the number of zero-points per token for an input of `in_features`."""
    return activation_segments(args, in_features) if args.group_size is None else in_features // args.group_size


def linear_tensors(scheme: LinearScheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """Return the tensors of one quantized linear by local name; raise FormatError for sizes that do not divide."""
    weights, activations, transform = scheme.weights, scheme.input_activations, scheme.input_transform
    check_tp_divisible(scheme, in_features)
    if transform.type == "hadamard" and transform.block_size is not None:
        hadamard_dense(transform.block_size)
    if transform.factors is not None and math.prod(transform.factors) != in_features:
        raise FormatError(f"input_transform factors {transform.factors} do not multiply to {in_features}")
    groups = 1 if weights.group_size is None else in_features // weights.group_size
    tensors = {
        "weight_packed": TensorSpec(shape=(out_features, in_features * weights.num_bits // 8), dtype="U8"),
        "weight_scale": TensorSpec(shape=(out_features, 1), dtype="F32"),
    }
    if weights.group_size is not None:
        tensors["weight_multiplier"] = TensorSpec(shape=(out_features, groups), dtype="U8")
    if not weights.symmetric:
        tensors["weight_zero_point"] = TensorSpec(shape=(out_features, groups), dtype="U8")
    if activations.num_bits != 16:
        tensors["input_clip_ratio"] = TensorSpec(shape=(activation_groups(activations, in_features), 2), dtype="F32")
    if activations.mean:
        tensors["input_mean"] = TensorSpec(shape=(in_features,), dtype="F32")
        tensors["output_mean"] = TensorSpec(shape=(out_features,), dtype="F32")
    if transform.type == "blocks" and transform.block_size is not None:
        block = transform.block_size
        tensors["input_blocks"] = TensorSpec(shape=(in_features // block, block, block), dtype="F32")
    if transform.factors is not None:
        left, right = transform.factors
        tensors["input_left"] = TensorSpec(shape=(left, left), dtype="F32")
        tensors["input_right"] = TensorSpec(shape=(right, right), dtype="F32")
    return tensors


def kv_bytes_per_token_head(head_size: int, num_bits: tuple[int, int]) -> int:
    """Return the KV-cache bytes per token and KV head: codes, and a float16 scale and zero for key and value.

    num_bits: bits of keys and of values
    """
    return head_size * sum(num_bits) // 8 + 8


def cache_tensors(args: KVCacheArgs, shape: ModelShape) -> dict[str, TensorSpec]:
    """Return the tensors of one layer's KV cache by local name."""
    heads = shape.num_key_value_heads
    tensors = {name: TensorSpec(shape=(heads, 2), dtype="F32") for name in ("key_clip_ratio", "value_clip_ratio")}
    if args.key_mean and shape.attn_logit_softcapping is not None:
        raise FormatError(
            f"kv_cache: key_mean is true, but attn_logit_softcapping {shape.attn_logit_softcapping} bounds the scores, "
            "which must not be shifted before"
        )
    if args.key_mean:
        tensors["key_mean"] = TensorSpec(shape=(heads, shape.head_dim), dtype="F32")
    if args.key_feedback:
        tensors["key_feedback"] = TensorSpec(shape=(heads, shape.head_dim, shape.head_dim), dtype="F32")
    return tensors


def expected_tensors(config: QuantizationConfigData, shape: ModelShape) -> dict[str, TensorSpec]:
    """Return all tensors that a checkpoint of this config must hold; it may hold no others."""
    hidden, vocab = shape.hidden_size, shape.vocab_size
    matrices, scheme = ("model.embed_tokens", shape.lm_head_module), config.lm_head_scheme
    tensors = {f"{norm}.weight": TensorSpec(shape=(size,)) for norm, size in shape.norms().items()}
    tensors |= {f"{module}.weight": TensorSpec(shape=(vocab, hidden)) for module in matrices}
    if (scheme is not None or config.online_r1) and not shape.quantizes_lm_head:
        asked = "online_r1 is true" if config.online_r1 else f"lm_head_bits is {config.lm_head_bits}"
        raise FormatError(f"{asked}, but vLLM quantizes no tied embedding of {shape.architecture}")
    if scheme is not None:
        del tensors[f"{shape.lm_head_module}.weight"]
        local = linear_tensors(scheme, vocab, hidden)
        tensors |= {f"{shape.lm_head_module}.{name}": spec for name, spec in local.items()}
    if config.online_r1:
        if not shape.tie_word_embeddings:
            raise FormatError("online_r1 is true but tie_word_embeddings is false")
        tensors["model.embed_tokens.r1"] = TensorSpec(shape=(hidden, hidden), dtype="F32")
        tensors["model.embed_tokens.final_norm_weight"] = TensorSpec(shape=(hidden,), dtype="F32")
    if config.kv_cache is not None:
        for layer in range(shape.num_hidden_layers):
            local = cache_tensors(config.kv_cache, shape)
            tensors |= {f"model.layers.{layer}.self_attn.attn.{name}": spec for name, spec in local.items()}
    for module, (out_features, in_features) in shape.linears().items():
        scheme = config.scheme(module)
        if scheme is None:
            tensors[f"{module}.weight"] = TensorSpec(shape=(out_features, in_features))
        else:
            head = scheme.input_activations
            if head.strategy == "head" and head.group_size != shape.head_dim:
                raise FormatError(
                    f"{module}: strategy 'head' has group_size {head.group_size}, head_dim is {shape.head_dim}"
                )
            try:
                local = linear_tensors(scheme, out_features, in_features)
            except FormatError as error:
                raise FormatError(f"{module}: {error}") from None
            tensors |= {f"{module}.{name}": spec for name, spec in local.items()}
        if shape.has_bias(module):
            tensors[f"{module}.bias"] = TensorSpec(shape=(out_features,))
    for layer in range(shape.num_hidden_layers):
        for gate, size in shape.gates.items():
            module = f"model.layers.{layer}.{gate}"
            if config.scheme(module) is not None:
                raise FormatError(f"{module}: a group of config_groups names it, but routers are not quantized")
            tensors[f"{module}.weight"] = TensorSpec(shape=size)
    return tensors


def _expert_fields(settings: dict[str, Any], names: Experts | None) -> dict[str, Any]:
    """Return the fields of a `ModelShape` for a mixture of experts, from config.json with its defaults."""
    if names is None:
        return dict.fromkeys(("num_experts", "num_experts_per_tok", "expert_size", "shared_expert_size"), 0)
    return {
        "num_experts": settings.get("num_local_experts", settings.get("num_experts", names.count)),
        "expert_size": settings.get(names.size),
        "shared_expert_size": 0 if names.shared_size is None else settings.get(names.shared_size),
    }
