"""Let signals that end a process interrupt a run like Ctrl-C, so that it cleans up and says what it keeps."""

import signal
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT


class Terminated(KeyboardInterrupt):
    """Interruption by a signal other than that of Ctrl-C; `code` is the exit code that names it."""

    def __init__(self, number: int):
        super().__init__()
        self.code = 128 + number


def raise_on_signals() -> None:
    """Let SIGTERM and, unless `nohup` ignores it, SIGHUP raise Terminated, once."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second signal must not stop the cleanup
    raise Terminated(number)


def describe_end(error: KeyboardInterrupt) -> tuple[str, int]:
    """Return the message for an interrupted run, with the error's notes on what it keeps, and the exit code."""
    notes = getattr(error, "__notes__", [])
    code = error.code if isinstance(error, Terminated) else INTERRUPTED
    return f"stopped; {'; '.join(notes) or 'no output was written'}", code
