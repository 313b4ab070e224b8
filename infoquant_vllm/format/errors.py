"""Define the error that every reader of the format raises."""

from pydantic import ValidationError


class FormatError(ValueError):
    """Report a checkpoint or config that breaks the format; the message names the file and the field."""

    @classmethod
    def from_validation(cls, source: str, error: ValidationError) -> "FormatError":
        """Make one line that names each wrong field of `source`, the value found and the value expected."""
        problems = []
        for problem in error.errors():
            field = ".".join(map(str, problem["loc"]))
            found = "" if problem["type"] in ("missing", "value_error") else f" (found {problem['input']!r:.80})"
            problems.append(": ".join(filter(None, (field, problem["msg"].removeprefix("Value error, ") + found))))
        return cls(f"{source}: {'; '.join(problems)}")
