"""Signals that ask a run to end: it tidies up as after Ctrl-C, and says what is kept."""

import signal
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT


class Terminated(KeyboardInterrupt):
    """Ended by a signal other than Ctrl-C's; `code` is the exit code that says which."""

    def __init__(self, number: int):
        super().__init__()
        self.code = 128 + number


def end_in_order() -> None:
    """Let SIGTERM and, unless `nohup` ignores it, SIGHUP raise Terminated, once."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # what tidies up must not be ended by a second one
    raise Terminated(number)


def ending(error: KeyboardInterrupt) -> tuple[str, int]:
    """What to say of a run that was ended, with the notes on what it leaves, and the exit code."""
    notes = getattr(error, "__notes__", [])
    code = error.code if isinstance(error, Terminated) else INTERRUPTED
    return f"stopped; {'; '.join(notes) or 'no output was written'}", code
