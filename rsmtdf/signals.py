"""Ending cleanly on Ctrl-C and SIGTERM: a flag that long loops look at between units of work."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """Work was ended by a signal, after everything worth keeping was saved. Not an error: a BaseException.

    `exit_code` is the shell's convention, 128 + signal number (130, 143), so no script takes it for finished.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.exit_code - 128, *self.args)  # or no other process could make it again


class StopFlag:
    """Holds the first signal received; a second one of the same kind ends the process at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def check(self, message: str) -> None:
        """Raises `Interrupted` if a signal came."""
        if self.signum is not None:
            raise Interrupted(self.signum, message)


@contextlib.contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """A flag raised by SIGINT and SIGTERM while inside; outside the main thread it is never raised."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def receive(signum: int, frame: FrameType | None) -> None:
        del frame
        if flag.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        flag.signum = signum

    before = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
