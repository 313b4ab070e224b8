"""A mixture of experts on a GPU: six launches whatever the tokens choose; semantics: kernels/torch/experts.py.

Tokens are dealt to experts, their inputs are quantized once, one product makes gate and up of all experts; one launch
does SwiGLU, the transform and the quantizer of the down projections, one their product, and the last one adds.
Nothing waits for the GPU and launches depend on shapes alone, so that CUDA graphs capture them.
"""

from typing import NamedTuple

import torch
import triton

from infoquant_vllm.kernels.operands import ExpertChoice, ExpertLinear
from infoquant_vllm.kernels.triton import common
from infoquant_vllm.kernels.triton.grouped import align_kernel, combine_kernel, grouped_gemm_kernel
from infoquant_vllm.kernels.triton.linear import Plan, plan
from infoquant_vllm.kernels.triton.rotate_quantize import Codes, rotate_quantize
from infoquant_vllm.kernels.triton.tiles import grouped_tile
from infoquant_vllm.kernels.triton.weights import stored_layout

CHUNK, FEW_CHUNK = 2048, 512  # routed rows that a program of `align` looks at together, and where there are few
PER_WARP = 256  # of them
COMBINED = 512  # channels of a program that adds a token's outputs


class Slots(NamedTuple):
    """Routed rows in tiles of one expert each, see kernels/triton/grouped.py.

    rows: int32 [slots, height], the routed rows, and `routed` where there are none
    experts: int32 [slots], -1 behind the last slot with rows
    routed: number of all routed rows
    """

    rows: torch.Tensor
    experts: torch.Tensor
    routed: int


def experts(x: torch.Tensor, choice: ExpertChoice, gate_up: ExpertLinear, down: ExpertLinear) -> torch.Tensor:
    """Compute what the reference does, from weights that `prepare_experts` makes with `prepare_linear`.

    Products are the reference's bits. SwiGLU takes its exponentials in float32, where the reference takes float64.
    """
    if len(x) == 0:
        return torch.empty_like(x)
    choice = ExpertChoice(*(part.contiguous() for part in choice))
    rows, intermediate = choice.experts.numel(), gate_up.weight.scale.shape[1] // 2
    first, second = grouped_plan(gate_up, x.shape[1], rows), grouped_plan(down, intermediate, rows)
    slots = align(choice.experts, len(gate_up.weight.scale), _height(gate_up, first))
    codes = _quantized(x, gate_up, first)
    inner = grouped_gemm(codes, gate_up, first, slots, x.dtype)
    codes = _quantized(inner, down, second, choice.experts)
    del inner  # which takes as much as what comes next
    if _height(down, second) != slots.rows.shape[1]:
        slots = align(choice.experts, len(down.weight.scale), _height(down, second))
    return combine(grouped_gemm(codes, down, second, slots, x.dtype), choice)


def grouped_plan(linear: ExpertLinear, features: int, rows: int) -> Plan:
    """Plan the product of all experts' linears of `features` for so many routed rows."""
    inputs, weight = linear
    count, channels, _ = weight.scale.shape
    runs = 0 if weight.multiplier is None else weight.multiplier.shape[1]
    sizes = weight.packed.shape[1], channels, features, inputs.segments, runs
    _, shape = stored_layout(*sizes)
    arch, int16 = common.architecture(weight.packed.device), inputs.clip_ratio is None
    per_expert = triton.cdiv(rows, count) * (2 if int16 else 1)
    return plan(arch, 1, sizes, int16, grouped_tile(per_expert, shape))


def _height(linear: ExpertLinear, made: Plan) -> int:
    """Return the routed rows of a slot; 16-bit inputs have two rows of bytes each."""
    return made.tile.block_m // (2 if linear.inputs.clip_ratio is None else 1)


def _quantized(x: torch.Tensor, linear: ExpertLinear, made: Plan, chosen: torch.Tensor | None = None) -> Codes:
    with_sums = linear.weight.zero_point is not None
    return rotate_quantize(x, linear.inputs, made.values_stride // linear.inputs.segments, with_sums, chosen)


def align(chosen: torch.Tensor, count: int, height: int) -> Slots:
    """Deal routed rows, whose experts of `count` are chosen [tokens, experts of a token], to slots of `height` rows.

    There are slots for whatever is chosen: an expert with any rows has one, and another for each `height` rows more.
    """
    rows, most = chosen.numel(), min(chosen.numel(), count)
    number = most + (rows - most) // height
    slots = Slots(
        torch.empty(number, height, dtype=torch.int32, device=chosen.device),
        torch.empty(number, dtype=torch.int32, device=chosen.device),
        rows,
    )
    bins, chunk = triton.next_power_of_2(count + 1), FEW_CHUNK if rows <= FEW_CHUNK else CHUNK
    align_kernel[(count,)](
        chosen, *slots, count, number, height, BINS=bins, CHUNK=chunk, num_warps=max(1, chunk // PER_WARP)
    )
    return slots


def grouped_gemm(codes: Codes, linear: ExpertLinear, made: Plan, slots: Slots, dtype: torch.dtype) -> torch.Tensor:
    """Multiply quantized rows, of tokens or of routed rows, by their experts' weights: [routed rows, N] in `dtype`.

    Routed rows without a slot are not written.
    """
    weight, held = linear.weight, len(codes.values)
    out = torch.empty(slots.routed, weight.scale.shape[1], dtype=dtype, device=weight.packed.device)
    chosen = slots.routed * (2 if linear.inputs.clip_ratio is None else 1) // held
    channels, steps, _, *strides = made.sizes
    grouped_gemm_kernel[(made.programs * len(slots.rows),)](
        *codes,
        *weight,
        *slots[:2],
        out,
        held,
        slots.routed,
        chosen,
        weight.packed.shape[1],
        channels,
        steps,
        *strides,
        **made.constants,
    )
    return out


def combine(routed: torch.Tensor, choice: ExpertChoice) -> torch.Tensor:
    """Add each token's routed rows, times their weights: [tokens, N]."""
    (tokens, chosen), channels = choice.experts.shape, routed.shape[1]
    out = torch.empty(tokens, channels, dtype=routed.dtype, device=routed.device)
    combine_kernel[tokens, triton.cdiv(channels, COMBINED)](
        routed, *choice, out, channels, CHOSEN=chosen, BLOCK_N=COMBINED, enable_fp_fusion=False, num_warps=4
    )
    return out
