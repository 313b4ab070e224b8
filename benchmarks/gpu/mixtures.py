"""W4A4 mixtures of experts of random weights."""

from typing import NamedTuple

import torch

from benchmarks.gpu.sites import moved
from infoquant_vllm.kernels.operands import ExpertChoice, ExpertLinear, InputQuant, PackedWeight
from infoquant_vllm.kernels.torch.experts import prepare_experts
from infoquant_vllm.kernels.triton.linear import prepare_linear, prepare_matrices


class Mixture(NamedTuple):
    """Sizes of a mixture, and the features of a group of its weights (0: all), with those of 32 of its inputs."""

    hidden: int
    intermediate: int
    experts: int
    chosen: int
    weight_group: int = 0

    def choice(self, tokens: int, device: str) -> ExpertChoice:
        """Return different experts for each token, at random."""
        order = torch.rand(tokens, self.experts, device=device).topk(self.chosen).indices.to(torch.int32)
        return ExpertChoice(torch.rand(tokens, self.chosen, device=device), order)

    def linears(self, device: str) -> tuple[ExpertLinear, ExpertLinear]:
        """Return random linears of all experts as a checkpoint holds them: gate and up, and down behind a Hadamard."""
        hidden, inner = self.hidden, self.intermediate
        return self._linear(2 * inner, hidden, 0, device), self._linear(hidden, inner, inner, device)

    def _linear(self, channels: int, features: int, hadamard: int, device: str) -> ExpertLinear:
        groups = features // 32 if self.weight_group else 1
        clip = torch.full((self.experts, groups, 2) if hadamard else (groups, 2), 0.9, device=device)
        packed = torch.randint(0, 256, (self.experts, channels, features // 2), dtype=torch.uint8, device=device)
        scale = torch.rand(self.experts, channels, 1, device=device) / 100 + 0.01
        qparams = None, None
        if self.weight_group:
            shape = 2, self.experts, channels, features // self.weight_group
            qparams = tuple(torch.randint(1, 9, shape, dtype=torch.uint8, device=device))
        return ExpertLinear(InputQuant([], hadamard, clip, 4, symmetric=False), PackedWeight(packed, scale, *qparams))


def prepared(linear: ExpertLinear, device: str) -> ExpertLinear:
    """Return a linear on a device, as our kernels read it."""
    inputs, clip = linear.inputs, linear.inputs.clip_ratio
    matrices = [matrix.to(device) for matrix in prepare_matrices([], inputs.hadamard)]
    inputs = inputs._replace(matrices=matrices, clip_ratio=None if clip is None else clip.to(device))
    return ExpertLinear(
        inputs, prepare_experts(moved(linear.weight, device), lambda each: prepare_linear(each, 4, inputs.segments))
    )
