"""Whether a checkpoint is whole, sane and, with its source at hand, still the same model."""

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from infoquant_vllm.format import SITES, Checkpoint, FormatError, WeightArgs, read_json
from offline.algorithms.fake_quantize import integer_weights
from offline.algorithms.rotations import orthogonality_error
from offline.errors import CheckError
from offline.evaluate.compare_to_source import Comparison
from offline.model.source import Source
from offline.output.report import REPORT_FILE, Report
from offline.output.sentence_modules import check_projection
from offline.progress import ProgressReport, silent

LARGEST_ORTHOGONALITY_ERROR = 1e-4
LARGEST_CONDITION = 1e4
INPUT_TENSORS = ("input_clip_ratio", "input_blocks", "input_left", "input_right")
SMALLEST_FULL_SHARE = 0.99
SCALE_OF_ZEROS = 1e-11
"""Above the scale of a row of zeros, which is 1e-12 times what distillation makes of it."""


class Check(BaseModel):
    """One check and what it found."""

    model_config = ConfigDict(frozen=True)

    name: str
    passed: bool
    detail: str


class Verification(BaseModel):
    """All checks of one checkpoint; a later one that an earlier failure makes senseless is left out."""

    model_config = ConfigDict(frozen=True)

    checkpoint: str
    against: str | None
    passed: bool
    checks: list[Check]
    layer_errors: dict[str, float] = {}
    """Against a source: relative error of the hidden states after each layer."""
    rounding_errors: dict[str, float] = {}
    """By layer, from the run's own report: share of its linears' output energy that weight rounding lost, the mean."""
    orthogonality_errors: dict[str, float] = {}
    """By layer, from the report: largest entry of |Q^T Q - I| over its rotations, those folded into weights too."""


class _Checks:
    """Runs checks one after another and keeps what they find."""

    def __init__(self, expected: int, progress: ProgressReport):
        self.done: list[Check] = []
        self._expected, self._progress = expected, progress

    def run(self, name: str, check: Callable[[], str]) -> bool:
        """Whether `check` passed; its return value is the detail that is kept."""
        self._progress("checks", len(self.done), self._expected, name)
        try:
            self.done.append(Check(name=name, passed=True, detail=check()))
        except (FormatError, CheckError) as error:
            self.done.append(Check(name=name, passed=False, detail=str(error)))
        self._progress("checks", len(self.done), self._expected, name)
        return self.passed

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.done)


def verify(folder: str | Path, *, against: str | Path | None = None, progress: ProgressReport = silent) -> Verification:
    """Read every tensor and check it; with `against`, compare with the model it was made from.

    Raises ToolError only for what is not the checkpoint's fault, such as a missing source.
    """
    checks = _Checks(6 if against is None else 8, progress)
    layer_errors: dict[str, float] = {}
    opened: list[Checkpoint] = []

    def headers() -> str:
        opened.append(Checkpoint(folder))
        return f"{len(opened[0].weight_map)} tensors, as the config asks for"

    if checks.run("headers", headers) and checks.run("values", lambda: check_all_values(opened[0])):
        checks.run("codes", lambda: check_codes(opened[0]))
        checks.run("rotations", lambda: check_rotations(opened[0]))
        checks.run("shared inputs", lambda: check_shared_inputs(opened[0]))
        if against is None or not checks.passed:
            checks.run("hidden states", lambda: check_projection(opened[0], None))
        else:
            comparison, source = Comparison(opened[0], against), Source.open(against)
            if checks.run("same model", comparison.same_ends):
                checks.run("hidden states", lambda: check_projection(opened[0], source))
                checks.run("behavior", lambda: comparison.behavior(layer_errors))
    report = _report(Path(folder))
    return Verification(
        checkpoint=str(folder),
        against=None if against is None else str(against),
        passed=checks.passed,
        checks=checks.done,
        layer_errors=layer_errors,
        rounding_errors={} if report is None else _by_layer(report.errors),
        orthogonality_errors={} if report is None else report.orthogonality_errors,
    )


def _report(folder: Path) -> Report | None:
    """What the run that wrote the folder told of itself; None where it cannot be read, which is nobody's harm."""
    try:
        return Report.model_validate(read_json(folder / REPORT_FILE))
    except (FormatError, ValidationError):
        return None


def _by_layer(errors: dict[str, float]) -> dict[str, float]:
    """Means over the linears of each decoder layer."""
    layers: dict[str, list[float]] = {}
    for name, error in errors.items():
        layers.setdefault(".".join(name.split(".")[:3]), []).append(error)
    return {layer: sum(found) / len(found) for layer, found in layers.items()}


def check_all_values(checkpoint: Checkpoint) -> str:
    """Read every tensor; FormatError for NaN, Inf, scales <= 0 and clips outside (0, 1]."""
    numbers = sum(checkpoint.tensor(name).numel() for name in checkpoint.weight_map)
    return f"{numbers} numbers, all finite, scales above 0, clips in (0, 1]"


def check_codes(checkpoint: Checkpoint) -> str:
    """Compare the codes of every row, or group of a row, with the range that its scale gives them.

    A scale is made of the largest weights, so one of these gets a code near the end of the range, whatever the others
    are; a row of codes that stay small was lost. Rows of the source's own zeros have the smallest scale there is.
    """
    fewest = 1.0
    modules = {module: checkpoint.config.scheme(module) for module in checkpoint.shape.linears()}
    modules[checkpoint.shape.lm_head_module] = checkpoint.config.lm_head_scheme
    for module, scheme in modules.items():
        if scheme is None:
            continue
        full = _full_ranges(checkpoint, module, scheme.weights)
        if full < SMALLEST_FULL_SHARE:
            raise CheckError(
                f"{module}: the codes of {1 - full:.1%} of its rows or groups use less than half of the range that "
                f"their scales give them, at most {1 - SMALLEST_FULL_SHARE:.0%} expected; quantize the model again"
            )
        fewest = min(fewest, full)
    return f"codes use the ranges of their scales in at least {fewest:.1%} of the rows of every linear"


def _full_ranges(checkpoint: Checkpoint, module: str, args: WeightArgs) -> float:
    """The share of groups whose codes reach half of their range, of those that stand for other weights than zeros."""
    scale = checkpoint.tensor(f"{module}.weight_scale")
    integers = _integers(checkpoint, module, args).unflatten(1, (scale.shape[1], -1))
    reached = torch.maximum(integers.amax(2).int(), -integers.amin(2).int())
    full = reached >= 2 ** (args.num_bits - 2)
    stored = scale > SCALE_OF_ZEROS
    return full[stored].float().mean().item() if stored.any() else 1.0


def _integers(checkpoint: Checkpoint, module: str, args: WeightArgs) -> torch.Tensor:
    names = ["weight_packed"] if args.symmetric else ["weight_packed", "weight_zero_point"]
    return integer_weights({name: checkpoint.tensor(f"{module}.{name}") for name in names}, args)


def check_rotations(checkpoint: Checkpoint) -> str:
    """The residual rotation is orthogonal; learned input transforms can at least be undone."""
    worst_rotation = worst_transform = 0.0
    for name in checkpoint.weight_map:
        kind = name.rpartition(".")[2]
        if kind not in ("r1", "input_blocks", "input_left", "input_right"):
            continue
        matrix = checkpoint.tensor(name).double()
        error = orthogonality_error(matrix)
        if kind == "r1":
            worst_rotation = error
            if error > LARGEST_ORTHOGONALITY_ERROR:
                raise CheckError(f"{name}: |Q^T Q - I| is {error:.2g}, at most {LARGEST_ORTHOGONALITY_ERROR:g}")
            continue
        worst_transform = max(worst_transform, error)
        condition = torch.linalg.cond(matrix).max().item()
        if not condition <= LARGEST_CONDITION:
            raise CheckError(f"{name}: condition number {condition:.2g}, at most {LARGEST_CONDITION:g}")
    return f"|Q^T Q - I| of the residual rotation {worst_rotation:.1e}, of input transforms {worst_transform:.1e}"


def check_shared_inputs(checkpoint: Checkpoint) -> str:
    """q, k and v, and gate and up, carry equal copies of their one input's scheme, clip and transform."""
    copies = 0
    for layer in range(checkpoint.shape.num_hidden_layers):
        for first, *others in (tuple(f"model.layers.{layer}.{end}" for end in ends) for ends in SITES.values()):
            for other in others:
                copies += _compare_inputs(checkpoint, first, other)
    return f"{copies} copies equal"


def _compare_inputs(checkpoint: Checkpoint, first: str, other: str) -> int:
    schemes = checkpoint.config.scheme(first), checkpoint.config.scheme(other)
    inputs = [None if s is None else (s.input_activations, s.input_transform) for s in schemes]
    if inputs[0] != inputs[1]:
        raise CheckError(f"{other}: its input is quantized otherwise than that of {first}, which is the same input")
    copies = 0
    for kind in INPUT_TENSORS:
        if f"{first}.{kind}" in checkpoint.weight_map:
            a, b = checkpoint.tensor(f"{first}.{kind}"), checkpoint.tensor(f"{other}.{kind}")
            if not torch.equal(a, b):
                raise CheckError(
                    f"{other}.{kind}: differs from {first}.{kind} by {(a - b).abs().max().item():.2g}, expected a copy"
                )
            copies += 1
    return copies
