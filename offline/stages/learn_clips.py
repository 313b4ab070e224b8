"""Learned activation clipping (InfoQuant, arXiv 2605.26175), one layer at a time.

The clip factors of a quantized layer are trained so that it makes of unquantized hidden states what
the unquantized layer makes of them.
"""

import math

import torch

from infoquant_vllm.format import ModelShape
from offline.model.hidden_states import HiddenStates
from offline.recipe import LearnedClips, Recipe
from offline.training.fake_quant_layer import ClippedLayer

WARM_UP_FROM = 0.01
COSINE_TO = 1e-3
SMALLEST_ERROR = 1e-30


def learn_clips(
    tensors: dict[str, torch.Tensor],
    hidden: HiddenStates,
    before: torch.Tensor,
    args: LearnedClips,
    recipe: Recipe,
    shape: ModelShape,
) -> dict[str, torch.Tensor]:
    """Learn `input_clip_ratio` and `value_clip_ratio` of a layer, named as by `quantize_layer`.

    tensors: the layer's, from `quantize_layer`
    hidden: the hidden states behind that layer
    before: [sequences, length, hidden] float32, those of the first sequences that entered the layer
    """
    layer, rotary = hidden.copy_layer()
    quantized = ClippedLayer(layer, tensors, recipe, shape).to(rotary[0].device)
    train_clips(quantized, rotary, before, hidden.values[: len(before)], args)
    return quantized.clips()


def train_clips(
    quantized: ClippedLayer,
    rotary: tuple[torch.Tensor, torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    args: LearnedClips,
) -> None:
    """Bring a layer's outputs for inputs [sequences, length, hidden] close to `targets`, by its clips."""
    batches = list(zip(inputs.split(args.batch_sequences), targets.split(args.batch_sequences), strict=True))
    parameters = [parameter for parameter in quantized.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, args.warmup_steps, args.epochs * len(batches))
    )
    for x, target in batches * args.epochs:
        error = (quantized(x.to(rotary[0].device), rotary) - target.to(rotary[0].device)).square().mean()
        optimizer.zero_grad()
        (error / error.detach().clamp(min=SMALLEST_ERROR)).backward()
        optimizer.step()
        schedule.step()


def rate_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Share of the learning rate: up from 0.01 by line over the warm-up, times a cosine down to 0.001."""
    warm_up = min(1.0, WARM_UP_FROM + (1 - WARM_UP_FROM) * step / warmup_steps)
    return warm_up * (COSINE_TO + (1 - COSINE_TO) * 0.5 * (1 + math.cos(math.pi * step / steps)))
