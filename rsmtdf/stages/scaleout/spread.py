"""Giving tasks to a crew, taking their outcomes, and trying again what was lost.

One owner per task, a bounded window of tasks under way, and only small outcomes on the way back. A worker's death costs
the shard in its hands: the task is cut in two and tried again, so that whatever kills workers is soon alone in a task
of its own. An error that `work` raises is none of these: it would come again, so it ends the run at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any

from rsmtdf.errors import WorkerError
from rsmtdf.signals import StopFlag
from rsmtdf.stages.scaleout.crew import Crew, Outcome, Units, Work, WorkerLost
from rsmtdf.stages.scaleout.tasks import Task, Tasks

log = logging.getLogger(__name__)

TARGET_S = 45.0
"""Of a task: 30 to 60 s keep a scheduler idle at thousands of workers, and a death cheap."""
LOSSES = 4
"""Workers that a unit may take with it, alone or in company, before it is given up; it must be alone then."""
PATIENCE_S = 120.0
"""For units that somebody else has: three leases of a store on object storage, after which a dead owner's are free."""
GRACE_S = 8.0
"""For workers that were told to stop: a batch, and the shard in the writer's hands."""
_POLL_S = 0.1
_AGAIN_S = 1.0


@dataclass
class Tally:
    """How the spreading went."""

    tasks: int = 0
    """Done."""
    retries: int = 0
    """Tasks given out again: after deaths, and where somebody else had the units."""
    deaths: int = 0
    """Workers that ended without being asked to."""


def spread(
    units: Sequence[int],
    *,
    work: Work,
    crew: Crew,
    stop: StopFlag,
    on_done: Callable[[Any], None],
    target_s: float = TARGET_S,
    losses: int = LOSSES,
    patience_s: float = PATIENCE_S,
    grace_s: float = GRACE_S,
) -> Tally:
    """Has `crew` do `work` on all units, and hands every outcome to `on_done`, in the order of their arrival.

    Args:
        units: their numbers.
        work: see `Work`; must be picklable, and small.
        crew: who works.
        stop: ends everything: no new tasks, and workers get `grace_s` to finish what they have in hand.
        on_done: called in this thread.
        target_s: length of a task to aim at.
        losses: workers that a unit may take with it before it is given up; see `LOSSES`.
        patience_s: how long units may be somebody else's.
        grace_s: see `stop`.

    Raises:
        Interrupted: `stop` was raised.
        WorkerError: some units were lost too often, or no worker stays alive; all others are done.
        Exception: what `work` raised first; tasks under way were told to stop.
    """
    job = _Job(units, work, crew, on_done, target_s=target_s, losses=losses, patience_s=patience_s)
    try:
        while job.is_unfinished and not stop:
            job.advance()
    except BaseException:
        job.wind_up(grace_s)
        raise
    if stop:
        job.wind_up(grace_s)
        stop.check("stopped; everything committed is kept, run the same command again to go on")
    job.tally.deaths, job.tally.retries = crew.deaths, job.tally.retries + crew.moved
    if job.given_up:
        names = ", ".join(f"shards {task}" for task in job.given_up[:5])
        raise WorkerError(
            f"{len(job.given_up)} tasks took {losses} workers with them each and were given up: {names}; the rest is "
            "done. Look into the workers' logs (out of memory?), and run the same command again"
        )
    return job.tally


class _Job:
    """The state of one `spread`."""

    def __init__(
        self,
        units: Sequence[int],
        work: Work,
        crew: Crew,
        on_done: Callable[[Any], None],
        *,
        target_s: float,
        losses: int,
        patience_s: float,
    ) -> None:
        self.tally = Tally()
        self.given_up: list[Task] = []
        self._tasks = Tasks(units, target_s=target_s)
        self._work, self._crew, self._on_done = work, crew, on_done
        self._losses, self._patience_s = losses, patience_s
        self._running: dict[Future[Any], Task] = {}
        self._lost_in_a_row = 0

    @property
    def is_unfinished(self) -> bool:
        return bool(self._running or self._tasks)

    def advance(self) -> None:
        """Fills the window, and settles what has come back within a moment."""
        slots = self._crew.slots()
        while len(self._running) < slots:
            task = self._tasks.next(slots=slots, now=time.monotonic())
            if task is None:
                break
            self._running[self._crew.submit(self._work, task.units)] = task
            if slots == 1:
                break  # a serial crew has done it already: look at the flag
        if not self._running:
            time.sleep(_POLL_S)  # everything left is to be tried later
            return
        done, _ = wait(self._running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        for future in done:
            self._settle(self._running.pop(future), future)

    def wind_up(self, grace_s: float) -> None:
        """Tells the workers to end, and takes what they still have."""
        self._crew.stop()
        done, left = wait(self._running, timeout=grace_s)
        for future in done:
            if not future.cancelled() and future.exception() is None and future.result() is not None:
                self._on_done(future.result())
        for future in left:
            future.cancel()
        self._running.clear()

    def _settle(self, task: Task, future: Future[Any]) -> None:
        error = future.exception()
        if error is not None and not isinstance(error, WorkerLost):
            raise error
        outcome: Outcome | None = None if error is not None else future.result()
        if outcome is None:
            self._lost(task, error or WorkerLost("a worker was told to end by somebody else"))
        elif outcome.refused is not None:
            self._refused(task, outcome)
        else:
            self._lost_in_a_row = 0
            self.tally.tasks += 1
            self._tasks.measured(len(task.units), outcome.seconds)
            self._on_done(outcome)

    def _lost(self, task: Task, error: BaseException) -> None:
        self._lost_in_a_row += 1
        if self._lost_in_a_row > self._losses * max(2, self._crew.slots()):
            raise WorkerError(
                f"no worker stays alive: {self._lost_in_a_row} tasks in a row lost theirs (last: {error}). What was "
                "committed is kept; look into the workers' logs (out of memory?), and run the same command again"
            )
        task = replace(task, losses=task.losses + 1)
        log.warning("a worker was lost with shards %s (%s)", task, error)
        # Never with others in the task: they may be sound, and halving will tell.
        if task.losses >= self._losses and len(task.units) == 1:
            self.given_up.append(task)
            return
        for half in _halves(task.units):
            self._again(replace(task, units=half), after_s=0.0)

    def _refused(self, task: Task, outcome: Outcome) -> None:
        # A claim that outlives its owner, or an owner that was taken for dead: either ends by itself.
        waited = task.refused_for_s + outcome.seconds + _AGAIN_S
        if waited > self._patience_s:
            raise WorkerError(f"{outcome.refused}\nIt was waited for {waited:.0f} s")
        log.debug("shards %s: %s", task, outcome.refused)
        self._again(replace(task, refused_for_s=waited), after_s=_AGAIN_S)

    def _again(self, task: Task, *, after_s: float) -> None:
        self.tally.retries += 1
        self._tasks.put_back(task, due=time.monotonic() + after_s)


def _halves(units: Units) -> list[Units]:
    middle = -(-len(units) // 2)
    return [half for half in (units[:middle], units[middle:]) if half]
