"""Operands of the kernels, grouped: what every backend's `linear`, `kv_store` and `kv_attention` take."""

from typing import NamedTuple

import torch


class InputQuant(NamedTuple):
    """Input transform and activation quantizer of a linear with K input features.

    matrices: one float32 [blocks, b, b], a matrix per block, or two whose Kronecker product is [K, K]; as
        `prepare_matrices` returns them
    hadamard: size of the blocks of an online Hadamard transform (R4), or 0
    clip_ratio: float32 [groups, 2], factors on the minimum and maximum of each group; None: int16 activations
    num_bits: of the activations
    symmetric: zero-points are 2^(num_bits - 1)
    segments: of a token, each with its own float32 scale: one, or one for each shard of features that a TP rank might
        serve. Divides the groups; if a segment has several groups, num_bits is 4
    mean: float32 [K], subtracted from the transformed input before it is quantized; None: nothing is
    """

    matrices: list[torch.Tensor]
    hadamard: int
    clip_ratio: torch.Tensor | None
    num_bits: int
    symmetric: bool
    segments: int = 1
    mean: torch.Tensor | None = None


class PackedWeight(NamedTuple):
    """Quantized weight [N, K] of a linear, as a checkpoint has it or as a backend's `prepare_linear` laid it out.

    The integer weight is (code - zero_point) * multiplier, within -127 .. 127; times `scale` it is the weight.

    packed: codes
    scale: float32 [N, 1]
    multiplier: uint8 [N, groups]; None: 1
    zero_point: uint8 [N, groups]; None: signed codes
    """

    packed: torch.Tensor
    scale: torch.Tensor
    multiplier: torch.Tensor | None
    zero_point: torch.Tensor | None


class ExpertChoice(NamedTuple):
    """Which experts of a mixture each token goes to.

    weights: float32 [tokens, chosen], factors on the experts' outputs
    experts: int32 [tokens, chosen], places in stacked weights; below 0: an expert of another rank
    """

    weights: torch.Tensor
    experts: torch.Tensor


class ExpertLinear(NamedTuple):
    """One linear of all experts of a mixture.

    inputs: as of one linear; `clip_ratio` is [experts, groups, 2] where each expert has its own
    weight: as of one linear, each tensor with the experts as an additional first dimension
    """

    inputs: InputQuant
    weight: PackedWeight


class KVScheme(NamedTuple):
    """How keys and values are stored.

    num_bits: of keys and of values, each 4 or 8
    hadamard: keys and queries go through a Hadamard transform of head_size (R3)
    """

    num_bits: tuple[int, int]
    hadamard: bool


class KVCalibration(NamedTuple):
    """Calibrated tensors of one layer's KV cache.

    key_clip_ratio, value_clip_ratio: float32 [kv_heads, 2], factors on the minimum and maximum of a token
    key_mean: float32 [kv_heads, head_size], subtracted from keys before R3; None: nothing is
    key_feedback: float32 [kv_heads, head_size, head_size], see `round_with_feedback`; None: keys are rounded to nearest
    """

    key_clip_ratio: torch.Tensor
    value_clip_ratio: torch.Tensor
    key_mean: torch.Tensor | None
    key_feedback: torch.Tensor | None = None


class Sequences(NamedTuple):
    """Sequences of a batch in a paged cache; sequence i has queries query_starts[i] .. query_starts[i + 1], its last.

    query_starts: int32 [sequences + 1]
    seq_lens: int32 [sequences], tokens in the cache, those of the queries included
    block_table: int32 [sequences, blocks]
    """

    query_starts: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


class ScoreParams(NamedTuple):
    """From the products of queries and keys to scores.

    scale: factor on every product
    window: tokens that a query sees, itself among them; None: all before it
    soft_cap: a score s counts as soft_cap * tanh(s / soft_cap) (Gemma 2, 2024, section 2); None: as it is
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
