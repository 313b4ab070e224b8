"""PSOT, Peak Suppression Orthogonal Transformation (InfoQuant, arXiv 2605.26175), and its shared form.

PSOT learns one rotation per layer and input, by gradient descent over orthogonal matrices, that suppresses the
peaks of the rotated activations (`peak_norm`). The shared form learns a single R1 for the residual stream
from the inputs of all layers, with a smooth form of the squared quantization range as its loss: it folds into the
weights and costs nothing at run time.
"""

from collections.abc import Callable, Iterable

import torch

from offline.algorithms.schedule import cosine
from offline.algorithms.stiefel import cayley_step, retract

RANGE_NORM = 8
"""Norm that stands for a maximum in `smooth_range`: 6 to 10 leave the same rounding error, 24 leaves 5% more."""

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")

Loss = Callable[[torch.Tensor, slice], torch.Tensor]
"""Loss of rotations [matrices, size, size] on a slice of the sequences."""


class SharedRotation:
    """An orthogonal matrix start @ cayley(P) whose P Adam learns, from 0 on, with a cosine schedule.

    inputs: [tokens, hidden] float32 or bfloat16, normalized inputs of all layers without the norms' gains
    start: [hidden, hidden] float64, a random Hadamard matrix
    groups: number of ranges that a token is quantized with
    """

    def __init__(self, inputs: torch.Tensor, start: torch.Tensor, groups: int, learning_rate: float, steps: int):
        hidden = len(start)
        self._inputs, self._start, self._groups = inputs, start, groups
        self._base = start.to(inputs.device, torch.float32)
        self._learning_rate, self._steps, self.done = learning_rate, steps, 0
        self._parameter = torch.zeros(hidden, hidden, device=inputs.device, requires_grad=True)
        self._optimizer = torch.optim.Adam([self._parameter], lr=learning_rate, betas=(0.9, 0.99))

    def step(self, rows: torch.Tensor) -> float:
        """Take a step on the inputs at `rows` [batch] int64; returns the loss before it."""
        self._optimizer.param_groups[0]["lr"] = self._learning_rate * cosine(self.done, self._steps)
        batch = self._inputs[rows.to(self._inputs.device)].float()
        rotated = (batch @ self._base) @ cayley(self._parameter)
        loss = smooth_range(rotated.unflatten(1, (self._groups, -1)))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.done += 1
        return loss.item()

    def state(self) -> dict[str, torch.Tensor]:
        """Return the parameter and Adam's moments after at least one step."""
        moments = self._optimizer.state[self._parameter]
        return {"parameter": self._parameter, **{name: moments[name] for name in ADAM_STATE}}

    def load_state(self, state: dict[str, torch.Tensor], done: int) -> None:
        """Continue after `done` steps with a `state` that was saved then."""
        with torch.no_grad():
            self._parameter.copy_(state["parameter"])
        moments = {name: state[name].clone().to(self._parameter.device) for name in ADAM_STATE if name != "step"}
        self._optimizer.state[self._parameter] = {"step": state["step"].clone(), **moments}
        self.done = done

    @torch.no_grad()
    def matrix(self) -> torch.Tensor:
        """Return the rotation as learned so far, [hidden, hidden] float64."""
        return self._start @ cayley(self._parameter.double()).cpu()


def cayley(parameter: torch.Tensor) -> torch.Tensor:
    """Return (I + A)^-1 (I - A) with A = P - P^T: a rotation for any square P, the identity for P = 0."""
    skew = parameter - parameter.T
    eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + skew, eye - skew)


def smooth_range(y: torch.Tensor) -> torch.Tensor:
    """Return the mean of (|max(y, 0)| + |max(-y, 0)|)^2, of RANGE_NORM-norms over the last axis of y [..., values].

    The squared error of a uniform quantizer is proportional to the squared range, of which this is a smooth form: a
    maximum has a gradient at one value, a norm at every large value. Learned on the norms, the range ends smaller too.
    """
    above, below = (
        side.clamp(min=0).pow(RANGE_NORM).sum(-1).clamp(min=torch.finfo(y.dtype).tiny).pow(1 / RANGE_NORM)
        for side in (y, -y)
    )
    return (above + below).square().mean()


def learn_rotations(
    start: torch.Tensor,
    loss: Loss,
    batches: list[slice],
    rates: Iterable[float],
    generator: torch.Generator,
    device: torch.device,
) -> tuple[torch.Tensor, float]:
    """Learn rotations from `start` [matrices, size, size] float64; one epoch over `batches` for each of `rates`.

    Returns the rotations, float64 on the CPU, and the last epoch's loss as a share of the first one's. Inputs that
    are all zero have no peaks: their loss is 0, and the rotations stay as they are.
    """
    rotations, losses = start.to(device, torch.float32), []
    for rate in rates:
        total = 0.0
        for batch in batches:
            rotations.requires_grad_()
            value = loss(rotations, batch)
            (gradient,) = torch.autograd.grad(value, rotations)
            rotations = cayley_step(rotations.detach(), gradient, rate, generator)
            total += value.item()
        losses.append(total)
    return retract(rotations.double()).cpu(), losses[-1] / losses[0] if losses[0] > 0 else 1.0


def input_loss(x: torch.Tensor, weights: torch.Tensor, temperature: float) -> Loss:
    """Return the loss of the rotations of an input x [sequences, length, blocks, 1, size], peaks over all features.

    weights: [sequences, length], of the tokens
    """

    def loss(rotations: torch.Tensor, sequences: slice) -> torch.Tensor:
        rotated = rotate(x[sequences].to(rotations.device), rotations)
        return peak_norm(center(rotated).flatten(2), weights[sequences].to(rotations.device), temperature)

    return loss


def head_loss(
    outputs: tuple[torch.Tensor, torch.Tensor], values: tuple[torch.Tensor, torch.Tensor], temperature: float
) -> Loss:
    """Return the loss of the rotations of the values, peaks per head: in o_proj's inputs and in the values, equally.

    outputs, values: activations [sequences, length, kv_heads, heads of each, head_dim] and token weights
        [sequences, length]
    """

    def loss(rotations: torch.Tensor, sequences: slice) -> torch.Tensor:
        first, second = (
            peak_norm(
                center(rotate(x[sequences].to(rotations.device), rotations)),
                weights[sequences, :, None, None].to(rotations.device),
                temperature,
            )
            for x, weights in (outputs, values)
        )
        return first + second * torch.where(second > 0, first / second, 1.0).detach()

    return loss


def rotate(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Multiply x [..., matrices, rows, size] by rotations [matrices, size, size]."""
    return torch.einsum("...krd,kde->...kre", x, rotations)


def center(x: torch.Tensor) -> torch.Tensor:
    """Subtract the mean over the last axis."""
    return x - x.mean(-1, keepdim=True)


def peak_norm(y: torch.Tensor, weights: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the Frobenius norm of p A w, with A = |y| and p = softmax(A / temperature) over the last axis of y.

    y: [..., features]
    weights: [...], of whole rows
    """
    magnitude = y.abs()
    return ((magnitude / temperature).softmax(-1) * magnitude * weights[..., None]).norm()
