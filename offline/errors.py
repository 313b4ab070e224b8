"""The error of the offline tool."""


class ToolError(Exception):
    """Something a user can mend; the message names file, layer or option, what was found and what to do."""


def first_line(error: Exception) -> str:
    """The first line of what a library says, or the error's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class CheckError(Exception):
    """What a check of `infoquant verify` found wrong with a checkpoint."""
