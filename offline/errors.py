"""The errors of the offline tool."""


class ToolError(Exception):
    """A problem that a user can fix; the message names file, layer or option, what was found and what to do."""


class CheckError(Exception):
    """A fault that a check of `infoquant verify` found in a checkpoint."""


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, or the error's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
