"""Mixtures of experts: each expert's quantized linears on the tokens that a router sends to it."""

from collections.abc import Callable
from typing import Any

import torch

from infoquant_vllm.kernels.operands import ExpertChoice, ExpertLinear, InputQuant, PackedWeight
from infoquant_vllm.kernels.torch.elementwise import silu_and_mul
from infoquant_vllm.kernels.torch.linear import linear

Linear = Callable[[torch.Tensor, InputQuant, PackedWeight, torch.Tensor | None], torch.Tensor]


def prepare_experts(weight: PackedWeight, prepare: Callable[[PackedWeight], PackedWeight]) -> PackedWeight:
    """Convert a checkpoint's weights of all experts, stacked, to what `experts` reads.

    prepare: a backend's `prepare_linear` for one of them
    """
    prepared = zip(*(prepare(_weight_of(expert, weight)) for expert in range(len(weight.packed))), strict=True)
    return PackedWeight(*(_stack(parts) for parts in prepared))


def experts(
    x: torch.Tensor,
    choice: ExpertChoice,
    gate_up: ExpertLinear,
    down: ExpertLinear,
    one_linear: Linear = linear,
    activation: Callable[[torch.Tensor], torch.Tensor] = silu_and_mul,
) -> torch.Tensor:
    """Map x [tokens, hidden] through the chosen experts; return the weighted sums of their outputs, like x.

    Every expert computes what `linear` computes with its weights. A token's outputs are in the dtype of x, weighted
    and added in float32 in the order of `choice`, and rounded once.

    gate_up: [experts, 2 * intermediate, hidden], gate before up, which read one input
    down: [experts, hidden, intermediate]
    one_linear, activation: of the backend
    """
    outputs = x.new_zeros((*choice.experts.shape, x.shape[1]))
    for expert in choice.experts.unique().tolist():
        if expert < 0:
            continue
        token, place = (choice.experts == expert).nonzero(as_tuple=True)
        inner = activation(one_linear(x[token], *_of(expert, gate_up), None))
        outputs[token, place] = one_linear(inner, *_of(expert, down), None)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for weights, out in zip(choice.weights.unbind(1), outputs.unbind(1), strict=True):
        total += weights[:, None] * out.float()
    return total.to(x.dtype)


def _of(expert: int, linears: ExpertLinear) -> tuple[InputQuant, PackedWeight]:
    """Return the operands of one expert's linear."""
    inputs, weight = linears
    if inputs.clip_ratio is not None and inputs.clip_ratio.dim() == 3:
        inputs = inputs._replace(clip_ratio=inputs.clip_ratio[expert])
    return inputs, _weight_of(expert, weight)


def _weight_of(expert: int, weight: PackedWeight) -> PackedWeight:
    return PackedWeight(*(None if part is None else part[expert] for part in weight))  # type: ignore[arg-type]


def _stack(parts: tuple[torch.Tensor | None, ...]) -> Any:
    """Stack tensors of all experts; None where there are none."""
    found = [part for part in parts if part is not None]
    return torch.stack(found) if found else None
