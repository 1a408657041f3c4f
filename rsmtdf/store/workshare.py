"""`WorkShare`: pieces of work that threads take in order, and one deterministic outcome.

Pools hand out one future per piece, which costs as much as a small read, and give no answer to the question that
matters here: when does the last thread leave the caller's buffers, if one piece fails?
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

T = TypeVar("T")


class WorkShare(Generic[T]):
    """Work in pieces, done by the threads that come to `help` and by the one that asks for the `result`.

    A failed piece ends the work: those begun are finished, no other is begun. Pieces are begun in order, so the first
    failure in that order is the same whatever the number of threads; it is the one that `result` raises.
    """

    def __init__(self, pieces: Sequence[Callable[[], None]], *, then: Callable[[], T]) -> None:
        """Nothing runs yet.

        Args:
            pieces: safe to run at the same time.
            then: run once, by whoever finishes the last piece; what it returns is the result.
        """
        self._pieces, self._then = pieces, then
        self._lock = threading.Lock()
        self._next = 0
        self._left = len(pieces)
        self._failures: dict[int, BaseException] = {}
        self._outcome: list[T] = []
        self._helpers: list[Future[None]] = []

    def help(self, pool: Executor, threads: int) -> None:
        """Lets up to `threads` threads of `pool` work on it from now on."""
        self._helpers += [pool.submit(self._work) for _ in range(min(threads, max(len(self._pieces), 1)))]

    def result(self) -> T:
        """The outcome of all pieces, once; the calling thread lends a hand. No thread works on it any more afterwards.

        Raises:
            Exception: what the first failing piece raised.
        """
        self._work()
        self._settle()
        if self._failures:
            first = self._failures[min(self._failures)]
            self._failures.clear()  # or the error would hold itself, and the buffers, through its traceback
            try:
                raise first
            finally:
                del first
        return self._outcome.pop()  # a pool holds cancelled helpers, and with them this, until a thread looks at them

    def cancel(self) -> None:
        """Begins no further piece, and waits for those begun."""
        with self._lock:
            self._next = len(self._pieces) + 1
        self._settle()

    def _work(self) -> None:
        while (piece := self._take()) is not None:
            try:
                self._pieces[piece]() if piece < len(self._pieces) else self._outcome.append(self._then())
            except BaseException as error:  # noqa: BLE001 (raised by `result`)
                with self._lock:
                    self._failures[piece] = error
            else:
                with self._lock:
                    self._left -= 1

    def _take(self) -> int | None:
        """The next piece to do; the one after the last is `then`, free once all others are done."""
        with self._lock:
            last = len(self._pieces)
            if self._failures or self._next > last or (self._next == last and self._left):
                return None
            self._next += 1
            return self._next - 1

    def _settle(self) -> None:
        for helper in self._helpers:
            helper.cancel()  # those that have not begun
        concurrent.futures.wait([h for h in self._helpers if not h.cancelled()])
