"""Parse what `--calibration` takes: one text, or a mixture of texts with shares."""

from pathlib import Path
from typing import NamedTuple

from offline.errors import ToolError

SELF = "self"


class Part(NamedTuple):
    """One text of a mixture, and its share of the sequences."""

    spec: str
    share: float


def parse_mixture(spec: str) -> list[Part]:
    """Split "self,chat.jsonl=0.3,code.txt=0.2" into parts whose shares sum to 1.

    A text without a share takes an equal part of what the given shares leave; without any shares all are equal. A
    name that is an existing file is one text, whatever characters it has. Raises ToolError naming the wrong part.
    """
    if Path(spec).is_file() or not any(separator in spec for separator in ",="):
        return [Part(spec, 1.0)]
    given = [_part(text, spec) for text in spec.split(",")]
    known = sum(share for _, share in given if share is not None)
    open_parts = sum(share is None for _, share in given)
    if known > 1 + 1e-9 or (open_parts and known >= 1):
        raise ToolError(f"--calibration {spec}: shares sum to {known:g}, expected less than 1 beside parts without one")
    rest = (1 - known) / open_parts if open_parts else 0.0
    total = 1.0 if open_parts else known
    return [Part(name, (rest if share is None else share) / total) for name, share in given]


def sequences_of(parts: list[Part], num_sequences: int, spec: str) -> list[int]:
    """Split `num_sequences` by the parts' shares (largest remainders); raise ToolError for a part that gets none."""
    exact = [part.share * num_sequences for part in parts]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(parts)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: num_sequences - sum(counts)]:
        counts[index] += 1
    for part, count in zip(parts, counts, strict=True):
        if count == 0:
            raise ToolError(
                f"--calibration {spec}: {part.spec} gets none of the {num_sequences} sequences; raise its share"
            )
    return counts


def samples_itself(spec: str) -> bool:
    """Return whether the model writes some of its calibration text."""
    return any(part.spec == SELF for part in parse_mixture(spec))


def _part(text: str, spec: str) -> tuple[str, float | None]:
    text = text.strip()
    name, equals, share = text.rpartition("=")
    if Path(text).is_file() or not equals:
        name, share = text, ""
    if not name:
        raise ToolError(f"--calibration {spec}: a part of the mixture has no name")
    if not share:
        return name, None
    try:
        number = float(share)
    except ValueError:
        number = -1.0
    if not 0 < number <= 1:
        raise ToolError(
            f"--calibration {spec}: the share of {name} is {share!r}, expected a number above 0 and up to 1"
        )
    return name, number
