"""Verify that a checkpoint is whole and sane and, given its source, that it is still the same model."""

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from infoquant_vllm.format import Checkpoint, FormatError, WeightArgs, read_json
from offline.algorithms.fake_quantize import integer_weights
from offline.algorithms.rotations import orthogonality_error
from offline.errors import CheckError
from offline.evaluate.compare_to_source import Comparison
from offline.model.source import Source
from offline.output.adapter_basis import LARGEST_ORTHOGONALITY_ERROR, check_basis
from offline.output.report import REPORT_FILE, Report
from offline.output.sentence_modules import check_projection
from offline.progress import ProgressReport, silent

LARGEST_CONDITION = 1e4
INPUT_TENSORS = ("input_clip_ratio", "input_mean", "input_blocks", "input_left", "input_right")
SMALLEST_FULL_SHARE = 0.99
SCALE_OF_ZEROS = 1e-11  # above the scale of a row of zeros: 1e-12, times what distillation makes of it


class Check(BaseModel):
    """The result of one check."""

    model_config = ConfigDict(frozen=True)

    name: str
    passed: bool
    detail: str


class Verification(BaseModel):
    """All checks of one checkpoint; after a failure, checks that depend on it are left out."""

    model_config = ConfigDict(frozen=True)

    checkpoint: str
    against: str | None
    passed: bool
    checks: list[Check]
    layer_errors: dict[str, float] = {}
    """Relative error of the hidden states after each layer, given a source."""
    routing_agreement: dict[str, float] = {}
    """Share of the experts chosen in each layer that the source chooses too, given a source."""
    rounding_errors: dict[str, float] = {}
    """Share of the energy of a linear's output that weight rounding lost, mean by layer, from the run's report."""
    orthogonality_errors: dict[str, float] = {}
    """Largest entry of |Q^T Q - I| over the rotations of each layer, folded ones included, from the run's report."""


class _Checks:
    """Run checks one after another and keep their results."""

    def __init__(self, expected: int, progress: ProgressReport):
        self.done: list[Check] = []
        self._expected, self._progress = expected, progress

    def run(self, name: str, check: Callable[[], str]) -> bool:
        """Run a check that returns its detail; return whether all checks have passed so far."""
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
    """Read and check every tensor; with `against`, compare with the model that it was made from.

    Raises ToolError only for faults outside the checkpoint, such as a missing source.
    """
    checks = _Checks(7 if against is None else 9, progress)
    layer_errors: dict[str, float] = {}
    routing_agreement: dict[str, float] = {}
    opened: list[Checkpoint] = []

    def headers() -> str:
        opened.append(Checkpoint(folder))
        return f"{len(opened[0].weight_map)} tensors, as its config says"

    if checks.run("headers", headers) and checks.run("values", lambda: check_all_values(opened[0])):
        checks.run("codes", lambda: check_codes(opened[0]))
        checks.run("rotations", lambda: check_rotations(opened[0]))
        checks.run("shared inputs", lambda: check_shared_inputs(opened[0]))
        if against is None or not checks.passed:
            checks.run("hidden states", lambda: check_projection(opened[0], None))
        else:
            comparison, source = Comparison(opened[0], against), Source.open(against)
            if checks.run("same model", comparison.same_vocabulary):
                checks.run("hidden states", lambda: check_projection(opened[0], source))
                checks.run("behavior", lambda: comparison.behavior(layer_errors, routing_agreement))
    if checks.passed:
        checks.run("adapters", lambda: check_basis(opened[0]))
    report = _report(Path(folder))
    return Verification(
        checkpoint=str(folder),
        against=None if against is None else str(against),
        passed=checks.passed,
        checks=checks.done,
        layer_errors=layer_errors,
        routing_agreement=routing_agreement,
        rounding_errors={} if report is None else _by_layer(report.errors),
        orthogonality_errors={} if report is None else report.orthogonality_errors,
    )


def _report(folder: Path) -> Report | None:
    """Read the report of the run that wrote the folder; None where it cannot be read, which is no fault."""
    try:
        return Report.model_validate(read_json(folder / REPORT_FILE))
    except (FormatError, ValidationError):
        return None


def _by_layer(errors: dict[str, float]) -> dict[str, float]:
    """Return the mean over the linears of each decoder layer."""
    layers: dict[str, list[float]] = {}
    for name, error in errors.items():
        layers.setdefault(".".join(name.split(".")[:3]), []).append(error)
    return {layer: sum(found) / len(found) for layer, found in layers.items()}


def check_all_values(checkpoint: Checkpoint) -> str:
    """Read every tensor; raise FormatError for NaN, Inf, scales <= 0 and clip ratios outside (0, 1]."""
    numbers = sum(checkpoint.tensor(name).numel() for name in checkpoint.weight_map)
    return f"{numbers} numbers, all finite, scales above 0, clip ratios in (0, 1]"


def check_codes(checkpoint: Checkpoint) -> str:
    """Compare the codes of every row, or group of a row, with the range of its quantizer.

    A scale follows from the largest weights, so one of them has a code near the end of the range; a row with only
    small codes was corrupted. Rows that are zero in the source have the smallest possible scale and are left out.
    """
    fewest = 1.0
    schemes = {module: checkpoint.config.scheme(module) for module in checkpoint.shape.linears()}
    schemes[checkpoint.shape.lm_head_module] = checkpoint.config.lm_head_scheme
    quantized = {module: scheme for module, scheme in schemes.items() if scheme is not None}
    if not quantized:
        return "no linear is quantized"
    for module, scheme in quantized.items():
        full = _full_ranges(checkpoint, module, scheme.weights)
        if full < SMALLEST_FULL_SHARE:
            raise CheckError(
                f"{module}: the codes of {1 - full:.1%} of its rows or groups use less than half of the range that "
                f"their quantizers have, at most {1 - SMALLEST_FULL_SHARE:.0%} expected; quantize the model again"
            )
        fewest = min(fewest, full)
    return f"codes use their range in at least {fewest:.1%} of the rows of every linear"


def _full_ranges(checkpoint: Checkpoint, module: str, args: WeightArgs) -> float:
    """Return the share of groups whose codes reach half of their range.

    Left out are groups of rows of zeros, and those with multiplier 1: their row's scale may be too coarse for them.
    """
    names = ["weight_packed"] if args.symmetric else ["weight_packed", "weight_zero_point"]
    codes = integer_weights({name: checkpoint.tensor(f"{module}.{name}") for name in names}, args)
    stored = checkpoint.tensor(f"{module}.weight_scale") > SCALE_OF_ZEROS
    if args.group_size is not None:
        codes = codes.unflatten(1, (-1, args.group_size))
        stored = stored & (checkpoint.tensor(f"{module}.weight_multiplier") > 1)
    reached = torch.maximum(codes.amax(-1).int(), -codes.amin(-1).int()).view_as(stored)
    full = reached >= 2 ** (args.num_bits - 2)
    return full[stored].float().mean().item() if stored.any() else 1.0


def check_rotations(checkpoint: Checkpoint) -> str:
    """Check that R1 is orthogonal and that learned input transforms are invertible."""
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
    return f"|Q^T Q - I| of R1 {worst_rotation:.1e}, of input transforms {worst_transform:.1e}"


def check_shared_inputs(checkpoint: Checkpoint) -> str:
    """Check that linears with a shared input store equal copies of its scheme, clip ratio and transform."""
    copies = 0
    for layer in range(checkpoint.shape.num_hidden_layers):
        for linears in checkpoint.shape.shared_inputs:
            first, *others = (f"model.layers.{layer}.{linear}" for linear in linears)
            for other in others:
                copies += _compare_inputs(checkpoint, first, other)
    return f"{copies} copies equal"


def _compare_inputs(checkpoint: Checkpoint, first: str, other: str) -> int:
    schemes = checkpoint.config.scheme(first), checkpoint.config.scheme(other)
    inputs = [None if s is None else (s.input_activations, s.input_transform) for s in schemes]
    if inputs[0] != inputs[1]:
        raise CheckError(f"{other}: its input is quantized differently from that of {first}, but both share one input")
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
