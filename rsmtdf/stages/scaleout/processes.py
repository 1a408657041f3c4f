"""A crew of processes on this machine, one per device.

Each process is a pool of its own, of one worker. So a device has exactly one process, whatever happens to the others,
and when one dies the standard library says so (`BrokenProcessPool`) and only that one is started again. Processes are
spawned: neither GDAL nor a CUDA context survives a fork.

A process has one task at a time. The device idles from one task's last batch to the next one's first views, a fraction
of a second in tasks of 45 s.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from rsmtdf.errors import WorkerError
from rsmtdf.stages.scaleout.crew import Units, Work, WorkerLost, run_here, told_to_stop
from rsmtdf.stages.scaleout.spread import GRACE_S


@contextlib.contextmanager
def process_crew(devices: Sequence[str], *, grace_s: float = GRACE_S) -> Iterator[ProcessCrew]:
    """A process for each of `devices` while inside; the same device may be named more than once.

    On leaving, processes are told to stop, and end themselves where they are not done after `grace_s`.
    """
    crew = ProcessCrew(devices, grace_s=grace_s)
    try:
        yield crew
    finally:
        crew.close()


class ProcessCrew:
    """Use `process_crew`."""

    moved = 0

    def __init__(self, devices: Sequence[str], *, grace_s: float) -> None:
        self.deaths = 0
        self._run = uuid.uuid4().hex
        self._grace_s = grace_s
        self._desks = [_Desk(device, self._run, grace_s) for device in devices]
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"{len(self._desks)} processes on {', '.join(dict.fromkeys(d.device for d in self._desks))}"

    @property
    def most_workers(self) -> int:
        return len(self._desks)

    def slots(self) -> int:
        return len(self._desks)

    def submit(self, work: Work, units: Units) -> Future[Any]:
        desk = next(d for d in self._desks if not d.is_taken)
        outer: Future[Any] = Future()
        try:
            inner = desk.start(work, units)
        except BrokenProcessPool:
            # It died between two tasks; once more with another process, which has not had the time to.
            self._count_death(desk)
            inner = desk.start(work, units)
        inner.add_done_callback(functools.partial(self._hand_over, desk, outer))
        return outer

    def stop(self) -> None:
        for desk in self._desks:
            desk.tell_to_stop()

    def close(self) -> None:
        self.stop()
        for desk in self._desks:
            desk.close()

    def _hand_over(self, desk: _Desk, outer: Future[Any], inner: Future[Any]) -> None:
        error = None if inner.cancelled() else inner.exception()
        if isinstance(error, BrokenProcessPool):
            self._count_death(desk)
            error = WorkerLost(f"the process on {desk.device} died")
        desk.is_taken = False
        if not outer.set_running_or_notify_cancel():
            return
        if error is not None:
            outer.set_exception(error)
        else:
            outer.set_result(None if inner.cancelled() else inner.result())

    def _count_death(self, desk: _Desk) -> None:
        with self._lock:
            self.deaths += 1
        desk.drop()


class _Desk:
    """One device, and the process that has it."""

    def __init__(self, device: str, run: str, grace_s: float) -> None:
        self.device = device
        self.is_taken = False
        self._run, self._grace_s = run, grace_s
        self._pool: ProcessPoolExecutor | None = None
        self._line: Connection | None = None
        self._is_gone = False

    def start(self, work: Work, units: Units) -> Future[Any]:
        if self._is_gone:
            self._clear_away()
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            self._line = ours
            self._pool = ProcessPoolExecutor(
                1, mp_context=context, initializer=_begin, initargs=(theirs, self._run, self._grace_s)
            )
        try:
            future = self._pool.submit(run_here, work, units, self.device, self._run)
        except OSError as error:
            raise WorkerError(f"cannot start a process for {self.device}: {error.strerror}") from error
        self.is_taken = True
        return future

    def drop(self) -> None:
        """Notes that the process is gone. Its pool is replaced by the next `start`, and not here: callbacks of futures
        run in a thread of the pool which may hold the lock that `shutdown`, and the end of a pool's last reference,
        take too (CPython 3.12.1 and later), and would wait for itself.
        """
        self._is_gone = True
        self.tell_to_stop()

    def tell_to_stop(self) -> None:
        if self._line is not None:
            self._line.close()  # which the process hears, as it would our death

    def _clear_away(self) -> None:
        """Forgets a process that is gone; only in the thread of whoever gives out tasks."""
        pool, self._pool, self._is_gone = self._pool, None, False
        if pool is not None:
            pool.shutdown(wait=False)

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(line: Connection, run: str, grace_s: float) -> None:
    """The first thing that a process of the crew does."""
    # Ctrl-C goes to all processes of a terminal. This one's owner hears it too, and says by `line` what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_listen, args=(line, run, grace_s), daemon=True, name="owner").start()


def _listen(line: Connection, run: str, grace_s: float) -> None:
    """Waits until the owner hangs up, because it wants an end or because it is dead."""
    with contextlib.suppress(EOFError, OSError):
        line.recv_bytes()
    told_to_stop(run).signum = signal.SIGTERM
    # An owner that lives lets this process end before that. One that is dead never will, and nobody else would.
    threading.Event().wait(grace_s)
    os._exit(1)
