"""The error of the offline tool."""


class ToolError(Exception):
    """Something a user can mend; the message names file, layer or option, what was found and what to do."""


class CheckError(Exception):
    """What a check of `infoquant verify` found wrong with a checkpoint."""
