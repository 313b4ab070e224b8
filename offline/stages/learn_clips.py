"""Learn the clip ratios of activations and values (InfoQuant, arXiv 2605.26175), one layer at a time.

The clip ratios of a quantized layer are trained so that its outputs for unquantized hidden states are those
of the unquantized layer.
"""

import torch

from infoquant_vllm.format import QuantizationConfigData
from offline.algorithms.schedule import floored_warmup_cosine
from offline.model.hidden_states import HiddenStates, Rotary
from offline.recipe import LearnedClips
from offline.training.fake_quant_layer import LEARNED_CLIPS, FakeQuantLayer

SMALLEST_ERROR = 1e-30


def learn_clips(
    layer: int,
    tensors: dict[str, torch.Tensor],
    hidden: HiddenStates,
    before: torch.Tensor,
    args: LearnedClips,
    config: QuantizationConfigData,
) -> dict[str, torch.Tensor]:
    """Return `input_clip_ratio` and `value_clip_ratio` of a layer, named as by `quantize_layer`.

    tensors: of the layer, from `quantize_layer`
    hidden: the outputs of that layer
    before: [sequences, length, hidden] float32, those of the first sequences that entered the layer
    """
    module, rotary = hidden.copy_layer()
    quantized = FakeQuantLayer(layer, module, tensors, config, LEARNED_CLIPS).to(rotary[0].device)
    train_clips(quantized, rotary, before, hidden.values[: len(before)], args)
    return quantized.clips()


def train_clips(
    quantized: FakeQuantLayer, rotary: Rotary, inputs: torch.Tensor, targets: torch.Tensor, args: LearnedClips
) -> None:
    """Train the clip ratios of a layer on inputs and targets [sequences, length, hidden], by AdamW."""
    batches = list(zip(inputs.split(args.batch_sequences), targets.split(args.batch_sequences), strict=True))
    parameters = [parameter for parameter in quantized.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: floored_warmup_cosine(step, args.warmup_steps, args.epochs * len(batches))
    )
    for x, target in batches * args.epochs:
        error = (quantized(x.to(rotary[0].device), rotary) - target.to(rotary[0].device)).square().mean()
        optimizer.zero_grad()
        (error / error.detach().clamp(min=SMALLEST_ERROR)).backward()
        optimizer.step()
        schedule.step()
