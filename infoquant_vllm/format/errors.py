"""The one error of the format."""


class FormatError(ValueError):
    """A checkpoint or its config breaks the format; the message names what and where."""
