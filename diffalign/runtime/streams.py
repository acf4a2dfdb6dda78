"""Standard output and error that take every text, also when nobody reads any more."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

GONE = {errno.EPIPE, errno.EIO, errno.EINVAL, errno.EBADF}  # a closed pipe, a terminal that hung up; EINVAL on Windows


class Forgiving:
    """A text stream whose reader may go away: from then on what is written is dropped, and the work goes on.

    all: whether other faults are forgiven too, such as a full disk: for what is said by the way, not for results.
    """

    def __init__(self, stream: Any, all: bool) -> None:
        self._stream, self._all = stream, all

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not (self._all or error.errno in GONE):
                raise
        except ValueError:  # it was closed
            pass

    def write(self, text: str) -> int:
        with self._forgiven():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._forgiven():
            self._stream.flush()


def forgive() -> None:
    """Let both streams take what their encoding lacks, and survive their readers."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, Forgiving):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Forgiving(stream, all=name == "stderr"))
