"""Being asked to stop: SIGTERM and Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether a run was asked to stop: `code` is the exit code to leave with, 143 for SIGTERM and 130 for Ctrl-C; None: it was not."""

    def __init__(self) -> None:
        self.code: int | None = None

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """Take signals as requests for the length of the context."""

        def note(number: int, frame: FrameType | None) -> None:
            self.code = 128 + number
            say("stopping after this update")

        old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
