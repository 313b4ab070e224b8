"""What `infoquant doctor` finds, one thing at a time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `advice` is what to do where it is not in order, or could be better."""

    subject: str
    in_order: bool
    found: str
    advice: str = ""
