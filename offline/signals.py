"""Let signals that end a process interrupt a run like Ctrl-C, so that it cleans up and says what it keeps."""

import signal
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
_received: list[KeyboardInterrupt] = []


class Terminated(KeyboardInterrupt):
    """Interruption by a signal; `code` is the exit code that names it."""

    def __init__(self, number: int):
        super().__init__()
        self.code = 128 + number


def raise_on_signals() -> None:
    """Let SIGTERM, SIGINT and, unless `nohup` ignores it, SIGHUP raise Terminated; all but SIGINT once."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not stop the cleanup
    _received.append(Terminated(number))
    raise _received[-1]


def interruption_behind(error: Exception) -> KeyboardInterrupt | None:
    """Return the interruption that `error` came of, with the notes of `error`; None if there was none.

    Compiled code that runs when a signal arrives may turn the interruption into an error of its own.
    """
    if not _received:
        return None
    for note in getattr(error, "__notes__", []):
        _received[-1].add_note(note)
    return _received[-1]


def describe_end(error: KeyboardInterrupt) -> tuple[str, int]:
    """Return the message for an interrupted run, with the error's notes on what it keeps, and the exit code."""
    notes = getattr(error, "__notes__", [])
    code = error.code if isinstance(error, Terminated) else INTERRUPTED
    return f"stopped; {'; '.join(notes) or 'no output was written'}", code
