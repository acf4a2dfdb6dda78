"""Being asked to stop: SIGTERM, SIGHUP and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType

SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
]  # Windows has no SIGHUP


@contextmanager
def listened(note: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let a function take signals for the length of a context; in another thread than the main one there are none to take."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.getsignal(number) for number in SIGNALS}
    # What is ignored stays ignored: what runs under nohup outlives its terminal.
    taken = {number: handler for number, handler in old.items() if handler is not signal.SIG_IGN}
    for number in taken:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


class Stop:
    """Whether a run was asked to stop: `code` is the exit code to leave with, 143 for SIGTERM, 130 for Ctrl-C, 129 for SIGHUP; None: it was
    not. Asked again, the process ends at once, with the last checkpoint."""

    def __init__(self) -> None:
        self.code: int | None = None

    def listening(self) -> AbstractContextManager[None]:
        """Take signals as requests for the length of the context."""
        return listened(self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Whatever runs now may be in the middle of a line or hold a lock: nothing here goes through a stream.
        if self.code is not None:
            _say("diffalign: stopped at once; the same command goes on from the last checkpoint")
            os._exit(128 + number)
        self.code = 128 + number
        _say("diffalign: stopping after this update; asked again, at once")


def _say(line: str) -> None:
    with suppress(OSError):  # nobody there
        os.write(2, f"\n{line}\n".encode())
