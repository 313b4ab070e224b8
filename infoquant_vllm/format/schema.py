"""Define and validate `quantization_config` of config.json."""

from collections import Counter
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from infoquant_vllm.format.errors import FormatError

QUANT_METHOD = "infoquant"
FORMAT_VERSION = 3
MAX_VALUE = 127
"""Largest magnitude of an int8 value that a kernel multiplies: (code - zero_point) * multiplier."""

Bits = Literal[4, 8]
Size = Annotated[int, Field(ge=1, le=2**17)]
Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.]+$")]


class StrictModel(BaseModel):
    """Immutable model that refuses unknown fields and values of other types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightArgs(StrictModel):
    """Describe weights: `weight_packed` with `weight_scale` [N, 1], and `weight_zero_point` [N, G] if asymmetric.

    Groups have integer multipliers of their row's scale, `weight_multiplier` [N, G], and 4 bits.
    """

    num_bits: Bits
    symmetric: bool = True
    strategy: Literal["channel", "group"] = "channel"
    group_size: Size | None = None

    @model_validator(mode="after")
    def _group_size_goes_with_strategy(self) -> "WeightArgs":
        _check_group_size(self.strategy == "group", self.strategy, self.group_size, self.num_bits)
        return self


class ActivationArgs(StrictModel):
    """Describe dynamic activation quantization: one scale per token, or per segment of its features.

    segment_size: features that share a scale; None: all. A TP rank serves whole segments
    group_size: features that share a zero-point and an integer multiplier of the scale, within a segment, with 4 bits;
        None: those of a segment share a zero-point, and nothing multiplies their scale

    mean: `input_mean` [K] is subtracted from the input after its transform, before anything else; the product with the
        mean, `output_mean` [N], is added to the output with the bias

    `input_clip_ratio` [activation groups, 2] multiplies (min, max). 16-bit activations are symmetric per token, the
    largest magnitude at 32767 steps, without segments, groups, mean and clip ratio.
    """

    num_bits: Literal[4, 8, 16]
    symmetric: bool = False
    strategy: Literal["token", "head", "group"] = "token"
    group_size: Size | None = None
    segment_size: Size | None = None
    mean: bool = False

    @model_validator(mode="after")
    def _group_size_goes_with_strategy(self) -> "ActivationArgs":
        _check_group_size(self.strategy != "token", self.strategy, self.group_size, self.num_bits)
        return self

    @model_validator(mode="after")
    def _quantized_inputs_have_means(self) -> "ActivationArgs":
        if self.mean and self.num_bits == 16:
            raise ValueError("mean does not go with num_bits 16")
        return self

    @model_validator(mode="after")
    def _segments_hold_whole_groups(self) -> "ActivationArgs":
        if self.segment_size is not None and self.num_bits == 16:
            raise ValueError(f"segment_size {self.segment_size} does not go with num_bits 16")
        if self.segment_size is not None and self.segment_size % (self.group_size or 1):
            raise ValueError(f"group_size {self.group_size} does not divide segment_size {self.segment_size}")
        return self


class InputTransform(StrictModel):
    """Describe the online rotation of a linear's input before it is quantized, y = x @ R (R4 on down_proj).

    - hadamard: R is block-diagonal, of `hadamard(block_size)`
    - blocks: R is block-diagonal, of `input_blocks` [K / block_size, block_size, block_size]
    - kronecker: R = `input_left` [a, a] (x) `input_right` [b, b] with factors = (a, b), a * b = K
    """

    type: Literal["none", "hadamard", "blocks", "kronecker"] = "none"
    block_size: Size | None = None
    factors: tuple[Size, Size] | None = Field(default=None, strict=False)

    @model_validator(mode="after")
    def _sizes_go_with_type(self) -> "InputTransform":
        if (self.type in ("hadamard", "blocks")) != (self.block_size is not None):
            raise ValueError(f"block_size {self.block_size} does not go with type '{self.type}'")
        if (self.type == "kronecker") != (self.factors is not None):
            raise ValueError(f"factors {self.factors} do not go with type '{self.type}'")
        return self


class LinearScheme(StrictModel):
    """Describe how one linear layer is quantized."""

    weights: WeightArgs
    input_activations: ActivationArgs
    input_transform: InputTransform = InputTransform()


class ConfigGroup(LinearScheme):
    """Assign a scheme to linears: full module names, or suffixes ("mlp.down_proj")."""

    targets: Annotated[list[Name], Field(min_length=1, max_length=100_000)]


class KVCacheArgs(StrictModel):
    """Describe the KV cache: asymmetric codes per token and KV head.

    `key_transform` hadamard is R3, applied to queries and keys after RoPE. `self_attn.attn.key_clip_ratio` and
    `.value_clip_ratio` [num_kv_heads, 2] multiply (min, max). With `key_mean`, the tensor `self_attn.attn.key_mean`
    [num_kv_heads, head_dim] is subtracted from every key after RoPE and before R3. That shifts all scores of a query
    by one constant, so attention is unchanged, unless a soft cap bounds the scores, which goes with no mean. With
    `key_feedback` keys are rounded with error feedback: the error of feature i times row i of
    `self_attn.attn.key_feedback` [num_kv_heads, head_dim, head_dim], of which only entries above the diagonal are read,
    is added to the features after it.
    """

    key_bits: Bits
    value_bits: Bits
    key_transform: Literal["none", "hadamard"] = "none"
    key_mean: bool = False
    key_feedback: bool = False

    @property
    def num_bits(self) -> tuple[int, int]:
        """Return the bits of keys and of values."""
        return self.key_bits, self.value_bits


class QuantizationConfigData(StrictModel):
    """Hold `quantization_config` of config.json.

    rotated_hidden_states: R1 rotates the residual stream, and the gain of the final norm is folded away;
        `projection.py` maps hidden states back. True if a checkpoint does not say.
    online_r1: the embedding is tied to lm_head and not rotated; the server applies R1 at both ends
    lm_head_bits: bits of lm_head, which in a tied model is the embedding too (see `lm_head_scheme`)
    """

    quant_method: Literal["infoquant"]
    format_version: int
    config_groups: Annotated[dict[Name, ConfigGroup], Field(max_length=100_000)]
    ignore: Annotated[list[Name], Field(max_length=100_000)] = []
    kv_cache: KVCacheArgs | None = None
    rotated_hidden_states: bool = True
    online_r1: bool = False
    lm_head_bits: Literal[8] | None = None

    @model_validator(mode="after")
    def _each_target_is_named_once(self) -> "QuantizationConfigData":
        names = Counter([*self.ignore, *(t for group in self.config_groups.values() for t in group.targets)])
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]} is named by more than one group, or by a group and ignore")
        if self.lm_head_bits is not None and "lm_head" in names:
            raise ValueError(f"lm_head_bits {self.lm_head_bits} quantizes lm_head, which ignore or a group names")
        return self

    @model_validator(mode="after")
    def _a_rotated_embedding_rotates_the_stream(self) -> "QuantizationConfigData":
        if self.online_r1 and not self.rotated_hidden_states:
            raise ValueError("online_r1 is true but rotated_hidden_states is false")
        return self

    @property
    def lm_head_scheme(self) -> LinearScheme | None:
        """Return lm_head as a linear with 16-bit inputs and a symmetric scale per row; None if unquantized."""
        if self.lm_head_bits is None:
            return None
        weights, inputs = WeightArgs(num_bits=self.lm_head_bits), ActivationArgs(num_bits=16)
        return LinearScheme(weights=weights, input_activations=inputs)

    def scheme(self, module: str) -> LinearScheme | None:
        """Return the scheme of a linear by its Hugging Face name, or None if `ignore` lists it.

        The longest matching target wins. Raises FormatError for a linear that no entry names.
        """
        parts = module.split(".")
        for start in range(len(parts)):
            end = ".".join(parts[start:])
            if end in self._schemes:
                return self._schemes[end]
        raise FormatError(f"{module}: no target of config_groups names it, nor does ignore")

    @cached_property
    def _schemes(self) -> dict[str, LinearScheme | None]:
        schemes: dict[str, LinearScheme | None] = dict.fromkeys(self.ignore)
        for group in self.config_groups.values():
            scheme = LinearScheme(
                weights=group.weights,
                input_activations=group.input_activations,
                input_transform=group.input_transform,
            )
            schemes |= dict.fromkeys(group.targets, scheme)
        return schemes


def parse_config(data: Any, source: str = "quantization_config") -> QuantizationConfigData:
    """Validate `quantization_config`; raise FormatError naming every wrong field of `source`."""
    if not isinstance(data, dict):
        raise FormatError(f"{source}: a JSON object was expected, found {type(data).__name__}")
    method, version = data.get("quant_method"), data.get("format_version")
    if method != QUANT_METHOD:
        raise FormatError(f"{source}: quant_method is {method!r}, expected '{QUANT_METHOD}'")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{source}: format_version is {version!r}, this release reads {FORMAT_VERSION}; "
            "install a release of infoquant-vllm that reads it, or quantize the model again"
        )
    try:
        return QuantizationConfigData.model_validate(data)
    except ValidationError as error:
        raise FormatError.from_validation(source, error) from None


def _check_group_size(wanted: bool, strategy: str, group_size: int | None, num_bits: int) -> None:
    if wanted != (group_size is not None):
        raise ValueError(f"group_size {group_size} does not go with strategy '{strategy}'")
    if wanted and num_bits != 4:
        raise ValueError(f"strategy '{strategy}' needs num_bits 4, found {num_bits}")
