"""What a store lacks, shard by shard: whole shards, and single views of shards that are there otherwise.

Only the status words of the shards asked about are read: a task of a thousand shards costs the same in a store of a
billion views.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class ShardStates:
    """How far one shard is."""

    rows: Sequence[int]
    """Its views, ascending."""
    seen: Mapping[int, int]
    """Row -> crc32c of its pixels, of the views whose pixels are recorded."""
    states: Mapping[str, Mapping[int, int]]
    """Teacher -> row -> state of its features."""

    @property
    def skipped(self) -> list[int]:
        """The views that were skipped for some teacher, ascending."""
        return [row for row in self.rows if any(of[row] == SKIPPED for of in self.states.values())]

    @property
    def is_missing(self) -> bool:
        """Whether a view is not finished: neither done nor skipped."""
        return any(self.due(name) for name in self.states)

    def kept(self, teacher: str) -> frozenset[int]:
        """The views whose features are there. Those of pixels that nobody vouches for any more are not."""
        return frozenset(row for row in self.rows if self.states[teacher][row] == DONE and row in self.seen)

    def due(self, teacher: str) -> frozenset[int]:
        """The views that are to do, and were not merely skipped."""
        skipped = {row for row in self.rows if self.states[teacher][row] == SKIPPED}
        return frozenset(self.rows) - self.kept(teacher) - skipped


def read_states(store: FeatureStore, teachers: Iterable[str], shards: Collection[int]) -> dict[int, ShardStates]:
    """Shard -> how far it is, as on disk now."""
    order = sorted(shards)
    seen = store.view_status_array.read_shards(order)
    words = {name: store.teacher(name).status.read_shards(order) for name in teachers}
    found = {}
    for k, shard in enumerate(order):
        rows = store.rows_of_shard(shard)
        slots = rows - shard * store.shard_views
        done, crcs = state_of(seen[k][slots]) == DONE, crc_of(seen[k][slots])
        found[shard] = ShardStates(
            rows=rows.tolist(),
            seen=dict(zip(rows[done].tolist(), crcs[done].tolist(), strict=True)),
            states={n: dict(zip(rows.tolist(), state_of(w[k][slots]).tolist(), strict=True)) for n, w in words.items()},
        )
    return found


def plan_work(states: Mapping[int, ShardStates], mendable: Collection[int]) -> list[Work]:
    """What shards lack, in the order of `states`; of the views that were skipped, those in `mendable` are tried."""
    work = []
    for shard, of in states.items():
        due = {name: of.due(name) for name in of.states}
        whole = [name for name in of.states if due[name] and not of.kept(name)]
        # Where the shard is computed for another teacher, all its views are made anyway.
        tried = set(of.rows) if whole else {row for row in of.rows if row in mendable}
        mend: dict[str, list[int]] = {}
        for name, state in of.states.items():
            again = [r for r in of.rows if r in due[name] or (state[r] == SKIPPED and r in tried)]
            if name not in whole and again:
                mend[name] = again
        made = of.rows if whole else sorted(set().union(*mend.values()))
        if made:
            recorded = {row: of.seen[row] for row in made if row in of.seen}
            work.append(Work(shard=shard, rows=made, whole=whole, mend=mend, due=due, recorded=recorded))
    return work
