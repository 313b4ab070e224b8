"""The one error of the format."""

from pydantic import ValidationError


class FormatError(ValueError):
    """A checkpoint or its config breaks the format; the message names what and where."""

    @classmethod
    def from_validation(cls, source: str, error: ValidationError) -> "FormatError":
        """One line that names every wrong field of `source`, the value found and what is expected."""
        problems = []
        for problem in error.errors():
            field = ".".join(map(str, problem["loc"]))
            found = "" if problem["type"] in ("missing", "value_error") else f" (found {problem['input']!r:.80})"
            problems.append(": ".join(filter(None, (field, problem["msg"].removeprefix("Value error, ") + found))))
        return cls(f"{source}: {'; '.join(problems)}")
