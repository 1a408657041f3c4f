"""What `spread` asks of those who do the work: a few lines, so that any `concurrent.futures` pool can be a crew."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from rsmtdf.errors import WorkerError
from rsmtdf.signals import Interrupted, StopFlag

log = logging.getLogger(__name__)

Units = tuple[int, ...]
"""Numbers of what a task is to do, ascending."""


class Outcome(Protocol):
    """What `work` returns: small and picklable, as it may cross a network."""

    @property
    def seconds(self) -> float:
        """That the task took."""
        ...

    @property
    def refused(self) -> str | None:
        """Why the units cannot be had now (somebody else has them); they are to be tried again later."""
        ...


Work = Callable[[Units, str, StopFlag], Any]
"""(units, device, flag) -> `Outcome`; picklable. Raises `Interrupted` soon after the flag is raised. Doing units again
that are done already must be harmless: a task may run twice where its worker seems to be dead."""


class WorkerLost(Exception):
    """Whoever had the task is gone, or was told by others to end; the task may be tried again."""


class Crew(Protocol):
    """Who does the work, and where."""

    @property
    def name(self) -> str:
        """For the user: what kind of workers."""
        ...

    @property
    def deaths(self) -> int:
        """Workers that ended without being asked to."""
        ...

    @property
    def moved(self) -> int:
        """Tasks that the crew itself gave to another worker after a death."""
        ...

    @property
    def most_workers(self) -> int:
        """Workers that were there at the same time, at most."""
        ...

    def slots(self) -> int:
        """Tasks to have under way at this moment; a bounded window."""
        ...

    def submit(self, work: Work, units: Units) -> Future[Any]:
        """A future of the outcome: None where the worker was told to end; its exception is `WorkerLost` where the
        worker is gone, or what `work` raised.
        """
        ...

    def stop(self) -> None:
        """Tells the workers to end their tasks soon; returns at once."""
        ...


_FLAGS: dict[str, StopFlag] = {}


def told_to_stop(run: str) -> StopFlag:
    """The flag of one run in this worker process, which its crew raises from afar."""
    return _FLAGS.setdefault(run, StopFlag())  # one, however many threads ask for it first


def run_here(work: Work, units: Units, device: str, run: str) -> Any:
    """What a worker process runs: `work` with the flag of the run; None where it was told to end.

    Raises:
        Exception: what `work` raised, or its words where it would not survive the way back: a pool takes an exception
            that cannot be unpickled for a dead worker.
    """
    try:
        return work(units, device, told_to_stop(run))
    except Interrupted:
        return None
    except Exception as error:
        try:
            copy.deepcopy(error)  # which takes it apart and makes it again as pickling does
        except Exception:  # whatever its own code raises
            log.debug("this error cannot be sent as it is", exc_info=error)
            raise WorkerError(f"{type(error).__name__}: {error}") from None
        raise


class SerialCrew:
    """This process, a task at a time: the reference for all others, and for tests."""

    name = "this process"
    deaths = 0
    moved = 0
    most_workers = 1

    def __init__(self, *, device: str, stop: StopFlag) -> None:
        self._device, self._stop = device, stop

    def slots(self) -> int:
        return 1

    def submit(self, work: Work, units: Units) -> Future[Any]:
        """As other crews, but `Interrupted` is raised at once: it is this process that was told to end."""
        future: Future[Any] = Future()
        try:
            future.set_result(work(units, self._device, self._stop))
        except Exception as error:  # noqa: BLE001 (raised by whoever asks for the result)
            future.set_exception(error)
        return future

    def stop(self) -> None:
        """Nothing is under way when this is called."""
