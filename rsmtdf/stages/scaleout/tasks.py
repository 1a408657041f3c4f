"""Cutting work into tasks of the right length: short at first, then as long as the measured pace suggests."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from rsmtdf.errors import ConfigError
from rsmtdf.stages.scaleout.crew import Units

_NEWEST = 0.3
"""Weight of the newest measurement in the pace: a worker that was slow once does not shorten everybody's tasks."""


@dataclass(frozen=True)
class Task:
    """Units of one owner."""

    units: Units
    losses: int = 0
    """Workers lost with these units."""
    refused_for_s: float = 0.0
    """How long somebody else has had them."""

    def __str__(self) -> str:
        first, last = self.units[0], self.units[-1]
        return str(first) if first == last else f"{first} to {last}"


class Tasks:
    """What is still to be given out, and how much of it at a time."""

    def __init__(self, units: Sequence[int], *, target_s: float) -> None:
        self._units = deque(sorted(units))
        self._later: list[tuple[float, int, Task]] = []
        self._order = itertools.count()
        self._target_s = target_s
        self._pace_s: float | None = None
        self._size = 1

    def __bool__(self) -> bool:
        return bool(self._units or self._later)

    def next(self, *, slots: int, now: float) -> Task | None:
        """The next task, for one of `slots` places; None: nothing now (but perhaps later, see `bool`)."""
        if self._later and self._later[0][0] <= now:
            return heapq.heappop(self._later)[2]
        if not self._units:
            return None
        # Towards the end tasks get shorter, or some workers would idle while others have minutes left.
        size = max(1, min(self._size, -(-len(self._units) // (2 * slots))))
        return Task(tuple(self._units.popleft() for _ in range(min(size, len(self._units)))))

    def put_back(self, task: Task, *, due: float) -> None:
        """Has `task` given out again, at `due` or later."""
        heapq.heappush(self._later, (due, next(self._order), task))

    def measured(self, units: int, seconds: float) -> None:
        """Learns from a task that was done. Sizes at most double from one measurement to the next: the first ones
        are of cold caches, and of shards that were there already.
        """
        pace = max(seconds / units, 1e-6)
        self._pace_s = pace if self._pace_s is None else (1 - _NEWEST) * self._pace_s + _NEWEST * pace
        self._size = max(1, min(2 * self._size, int(self._target_s / self._pace_s)))


def piece(n_units: int, *, index: int, pieces: int) -> range:
    """Piece `index` (from 0) of `pieces` of the units 0..n_units-1: disjoint, together all, sizes differ by one.

    Raises:
        ConfigError: there is no such piece.
    """
    if not 0 <= index < pieces:
        raise ConfigError(
            f"piece {index} of {pieces} does not exist: pieces are numbered from 0, here 0/{pieces} to "
            f"{pieces - 1}/{pieces}"
            if pieces > 0
            else f"{pieces} pieces cannot be made; give i/n with n at least 1"
        )
    return range(index * n_units // pieces, (index + 1) * n_units // pieces)
