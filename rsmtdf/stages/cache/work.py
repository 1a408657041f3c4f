"""What a store lacks, shard by shard: whole shards, and single views of shards that are there otherwise."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rsmtdf.store.status import DONE, SKIPPED, state_of
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

    @property
    def pending(self) -> frozenset[int]:
        """The views that are to do for some teacher."""
        return frozenset().union(*self.due.values())


def skipped_rows(store: FeatureStore, teachers: Iterable[str], shards: Collection[int]) -> list[int]:
    """The rows of `shards` that were skipped for one of `teachers`, ascending."""
    skipped = np.zeros(store.n_rows, bool)
    for name in teachers:
        skipped |= state_of(store.status(name)) == SKIPPED
    return [row for row in np.flatnonzero(skipped).tolist() if row // store.shard_views in shards]


def plan_work(
    store: FeatureStore, teachers: Collection[str], shards: Collection[int], mendable: Collection[int]
) -> list[Work]:
    """What `shards` lack of `teachers`, ascending; of the views that were skipped, those in `mendable` are tried."""
    seen = state_of(store.view_status()) == DONE
    states = {name: state_of(store.status(name)) for name in teachers}
    # Features of pixels that nobody vouches for any more are none.
    kept = {name: (state == DONE) & seen for name, state in states.items()}
    skipped = {name: state == SKIPPED for name, state in states.items()}
    work = []
    for shard in sorted(shards):
        rows = [int(row) for row in store.rows_of_shard(shard)]
        due = {n: frozenset(r for r in rows if not kept[n][r] and not skipped[n][r]) for n in teachers}
        whole = [n for n in teachers if due[n] and not kept[n][rows].any()]
        # Where the shard is computed for another teacher, all its views are made anyway.
        tried = set(rows) if whole else {row for row in rows if row in mendable}
        mend = {
            n: again
            for n in teachers
            if n not in whole and (again := [r for r in rows if r in due[n] or (skipped[n][r] and r in tried)])
        }
        made = rows if whole else sorted(set().union(*mend.values()))
        if made:
            work.append(Work(shard=shard, rows=made, whole=whole, mend=mend, due=due))
    return work
