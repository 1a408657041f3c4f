"""What a store lacks, shard by shard: whole shards, and single views of shards that are there otherwise.

Only the status words of the shards asked about are read: a task of a thousand shards costs the same in a store of a
billion views.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rsmtdf.store.status import DONE, SKIPPED, crc_of, state_of
from rsmtdf.store.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one shard lacks."""

    shard: int
    rows: Sequence[int]
    """The views to make, ascending."""
    whole: Sequence[str]
    """Teachers that have nothing of the shard."""
    mend: Mapping[str, Sequence[int]]
    """Teachers that have others of its views -> those to be added."""
    due: Mapping[str, frozenset[int]]
    """Teacher -> views that are to do, and were not merely skipped by an earlier run."""
    recorded: Mapping[int, int]
    """Row -> crc32c of its pixels, of those `rows` that a teacher has seen already."""

    @property
    def pending(self) -> frozenset[int]:
        """The views that are to do for some teacher."""
        return frozenset().union(*self.due.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardStates:
    """How far one shard is: arrays, one value per view, since there is one of these for each shard asked about."""

    rows: np.ndarray
    """int64: its views, ascending."""
    seen: np.ndarray
    """bool: whether its pixels are recorded."""
    crcs: np.ndarray
    """uint32: crc32c of its pixels, where they are."""
    states: Mapping[str, np.ndarray]
    """Teacher -> uint8: state of its features."""

    @property
    def skipped(self) -> list[int]:
        """The views that were skipped for some teacher, ascending."""
        return self._rows_where(np.any([of == SKIPPED for of in self.states.values()], axis=0))

    @property
    def is_missing(self) -> bool:
        """Whether a view is not finished: neither done nor skipped."""
        return any(self._is_due(name).any() for name in self.states)

    def kept(self, teacher: str) -> frozenset[int]:
        """The views whose features are there. Those of pixels that nobody vouches for any more are not."""
        return frozenset(self._rows_where(self._is_kept(teacher)))

    def due(self, teacher: str) -> frozenset[int]:
        """The views that are to do, and were not merely skipped."""
        return frozenset(self._rows_where(self._is_due(teacher)))

    def _is_kept(self, teacher: str) -> np.ndarray:
        return np.asarray((self.states[teacher] == DONE) & self.seen)

    def _is_due(self, teacher: str) -> np.ndarray:
        return np.asarray(~self._is_kept(teacher) & (self.states[teacher] != SKIPPED))

    def _rows_where(self, holds: np.ndarray) -> list[int]:
        found: list[int] = self.rows[holds].tolist()
        return found


def read_states(store: FeatureStore, teachers: Iterable[str], shards: Collection[int]) -> dict[int, ShardStates]:
    """Shard -> how far it is, as on disk now."""
    order = sorted(shards)
    seen = store.view_status_array.read_shards(order)
    done, crcs = state_of(seen) == DONE, crc_of(seen)
    states = {name: state_of(store.teacher(name).status.read_shards(order)) for name in teachers}
    found = {}
    for k, shard in enumerate(order):
        rows = store.rows_of_shard(shard)
        slots = rows - shard * store.shard_views
        found[shard] = ShardStates(
            rows=rows,
            seen=done[k][slots],
            crcs=crcs[k][slots],
            states={name: of[k][slots] for name, of in states.items()},
        )
    return found


def plan_work(states: Mapping[int, ShardStates], mendable: Collection[int]) -> Iterator[Work]:
    """What shards lack, in the order of `states`; of the views that were skipped, those in `mendable` are tried."""
    for shard, of in states.items():
        due = {name: of.due(name) for name in of.states}
        whole = [name for name in of.states if due[name] and not of.kept(name)]
        rows: list[int] = of.rows.tolist()
        # Where the shard is computed for another teacher, all its views are made anyway.
        tried = set(rows) if whole else {row for row in rows if row in mendable}
        mend: dict[str, list[int]] = {}
        for name, state in of.states.items():
            skipped = set(of.rows[state == SKIPPED].tolist())
            again = sorted(due[name] | (skipped & tried))
            if name not in whole and again:
                mend[name] = again
        made = rows if whole else sorted(set().union(*mend.values()))
        if made:
            crcs = dict(zip(of.rows[of.seen].tolist(), of.crcs[of.seen].tolist(), strict=True))
            recorded = {row: crcs[row] for row in made if row in crcs}
            yield Work(shard=shard, rows=made, whole=whole, mend=mend, due=due, recorded=recorded)
