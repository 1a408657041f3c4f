"""What merging store B into store A would add, and what speaks against it; nothing is written here.

A view is the same in both stores where tile, stream, seed, parameters and CutMix partner are. Views without partners
(weak, plain) are taken one by one; a strong segment only as a whole, because a pair never comes apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from rsmtdf.specs import STREAMS, Stream
from rsmtdf.store.manifest import differences, identity_fields
from rsmtdf.store.queries import next_generation
from rsmtdf.store.segments import HOLE_FILL, STRUCTURE, NewSegment, Segment, view_keys
from rsmtdf.store.status import DONE, SKIPPED, crc_of, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import StoredTeacher

PAIRED: tuple[Stream, ...] = ("strong", "strong2")
"""Streams whose views exchange pixels."""


@dataclass(kw_only=True)
class MergePlan:
    """What A lacks and B has."""

    segments: list[NewSegment] = field(default_factory=list)
    """To extend A by."""
    new_rows: list[np.ndarray] = field(default_factory=list)
    """For each of them: the rows of B that its rows are."""
    common: tuple[np.ndarray, np.ndarray] = field(default_factory=lambda: (np.empty(0, np.int64),) * 2)
    """Rows of A, and the rows of B that are the same views."""
    teachers: list[str] = field(default_factory=list)
    """Those that A does not have at all."""
    recoded: list[str] = field(default_factory=list)
    """Those whose features must be decoded and encoded again."""
    left: dict[str, int] = field(default_factory=dict)
    """Segment of B in words -> views that cannot be taken."""
    conflicts: list[str] = field(default_factory=list)
    """Why it cannot be done, each with what is expected and found."""

    def rows(self, added: tuple[Segment, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of A, `added` as they came of `segments`, and the same views' rows of B."""
        new = [np.arange(s.row_start, s.row_stop, dtype=np.int64) for s in added]
        return np.concatenate([self.common[0], *new]), np.concatenate([self.common[1], *self.new_rows])


def plan_merge(a: FeatureStore, b: FeatureStore, *, recode: bool) -> MergePlan:
    """Compares the stores; whoever carries the plan out looks at `conflicts` first."""
    plan = MergePlan()
    here, there = (identity_fields(s.recipe, s.dataset) for s in (a, b))
    plan.conflicts += [f"views: {line}" for line in differences(here, there)]
    for name, theirs in b.teachers.items():
        if name not in a.teachers:
            plan.teachers.append(name)
            continue
        other, how = _teacher_differences(a.teachers[name], theirs)
        if other:
            plan.conflicts += [f"teacher {name}: {line}" for line in other]
        elif how and not recode:
            plan.conflicts += [f"teacher {name}: {line} (--recode encodes B's features as A's are)" for line in how]
        elif how:
            plan.recoded.append(name)
    for name in sorted(set(a.column_names) & set(b.column_names)):
        types = a.column(name).dtype, b.column(name).dtype
        if types[0] != types[1]:
            plan.conflicts.append(f"column {name}: expected {types[0]}, found {types[1]}")
    if not plan.conflicts:
        _Views(a, b, plan).compare()
    return plan


def _teacher_differences(ours: StoredTeacher, theirs: StoredTeacher) -> tuple[list[str], list[str]]:
    """What makes it another teacher, and what only makes its features differently encoded."""
    if other := differences(ours.spec.identity(), theirs.spec.identity()):
        return other, []
    rules = ({"statistics rule": t.statistics.get("rule") or {}} for t in (ours, theirs))
    how = differences(*rules)
    if ours.codec != theirs.codec:
        how.append(f"codec: expected {ours.codec!r}, found {theirs.codec!r}")
    for label, x, y in (("mean", ours.mean, theirs.mean), ("std", ours.std, theirs.std)):
        if x.tobytes() != y.tobytes():
            n = int((x != y).sum())
            how.append(f"channel_{label}: expected the same values, found others in {n} of {len(x)} channels")
    return [], how


class _Views:
    """B's views, each looked up in A."""

    def __init__(self, a: FeatureStore, b: FeatureStore, plan: MergePlan) -> None:
        self._a, self._b, self._plan = a, b, plan
        self._params = [name for name in b.column_names if name not in STRUCTURE]
        self._tile = b.column("tile")
        self._ids = b.tile_ids
        known = a.tile_ids.indices
        self._tile_of_a = np.array([known.get(t, -1) for t in self._ids] or [-1], np.int64)
        self._index = {stream: _index(a, stream) for stream in STREAMS}
        states = [state_of(b.status(name)) for name in b.teachers]
        self._begun = np.zeros(b.n_rows, bool)
        for state in states:
            self._begun |= np.isin(state, (DONE, SKIPPED))
        self._generations: dict[tuple[Stream, int], int] = {}

    def compare(self) -> None:
        same_a: list[np.ndarray] = [np.empty(0, np.int64)]
        same_b: list[np.ndarray] = [np.empty(0, np.int64)]
        for segment in self._b.segments:
            rows = np.arange(segment.row_start, segment.row_stop, dtype=np.int64)
            in_a = self._find(segment.stream, rows)
            same = in_a >= 0
            same[same] &= self._same_partner(in_a[same], rows[same])
            same_a.append(in_a[same])
            same_b.append(rows[same])
            if not self._begun[rows].any():
                continue  # nothing that A could gain
            if segment.stream not in PAIRED:
                self._add_unpaired(segment, in_a)
            elif (in_a < 0).all():
                self._add(segment.stream, segment.seed_start, segment.seeds, rows)
            elif not same.all():
                where = f"{segment.stream} seed {segment.seed_start}, generation {segment.generation}"
                self._plan.left[where] = self._plan.left.get(where, 0) + int((~same).sum())
        self._plan.common = np.concatenate(same_a), np.concatenate(same_b)
        self._compare_common()

    def _find(self, stream: Stream, rows: np.ndarray) -> np.ndarray:
        """int64, per row of B: the row of A with its tile and seed, or -1."""
        keys, places = self._index[stream]
        tile = self._tile_of_a[self._tile[rows]]
        wanted = view_keys(tile, self._b.column("seed")[rows])
        at = np.searchsorted(keys, wanted)
        found = np.full(len(rows), -1, np.int64)
        hit = (tile >= 0) & (at < len(keys))
        hit[hit] = keys[at[hit]] == wanted[hit]
        found[hit] = places[at[hit]]
        return found

    def _same_partner(self, in_a: np.ndarray, rows: np.ndarray) -> np.ndarray:
        ours = self._a.column("tile")[self._a.column("partner")[in_a]]
        theirs = self._tile_of_a[self._tile[self._b.column("partner")[rows]]]
        return np.asarray(ours == theirs)

    def _add_unpaired(self, segment: Segment, in_a: np.ndarray) -> None:
        """The views that A lacks, seeds that lack the same tiles together."""
        lacking = (in_a < 0).reshape(segment.seeds, segment.tiles)
        begun = self._begun[segment.row_start : segment.row_stop].reshape(lacking.shape).any(axis=1)
        lacking[~begun] = False
        for first, last in _equal_runs(lacking):
            if lacking[first].any():
                seeds = last - first
                block = np.arange(first, last)[:, None] * segment.tiles + np.flatnonzero(lacking[first])[None]
                self._add(segment.stream, segment.seed_start + first, seeds, segment.row_start + block.reshape(-1))

    def _add(self, stream: Stream, seed_start: int, seeds: int, rows: np.ndarray) -> None:
        """Plans a segment of these rows of B, which with their partners are all of it."""
        place = {row: k for k, row in enumerate(rows.tolist())}
        partner = np.array([place[p] for p in self._b.column("partner")[rows].tolist()], np.int64)
        generation = 0
        for seed in range(seed_start, seed_start + seeds):
            free = self._generations.get((stream, seed))
            generation = max(generation, next_generation(self._a, stream, seed) if free is None else free)
        for seed in range(seed_start, seed_start + seeds):
            self._generations[stream, seed] = generation + 1
        self._plan.segments.append(
            NewSegment(
                stream=stream,
                seed_start=seed_start,
                seeds=seeds,
                generation=generation,
                tile_ids=tuple(self._ids[int(k)] for k in self._tile[rows[: len(rows) // seeds]]),
                columns={name: self._b.column(name)[rows] for name in self._params},
                partner=partner,
            )
        )
        self._plan.new_rows.append(rows.astype(np.int64))

    def _compare_common(self) -> None:
        """Views that are in both must have the same parameters and, where both are made, the same pixels."""
        in_a, in_b = self._plan.common
        if not len(in_a):
            return
        for name in self._params:
            theirs = self._b.column(name)[in_b]
            if name in self._a.column_names:
                ours = self._a.column(name)[in_a]
            else:
                fill = np.nan if theirs.dtype.kind == "f" else HOLE_FILL.get(name, 0)
                ours = np.full(len(in_a), fill, theirs.dtype)
            differ = ours != theirs
            if theirs.dtype.kind == "f":
                differ &= ~(np.isnan(ours) & np.isnan(theirs))
            self._conflict(differ, f"parameter {name}", ours, theirs)
        ours, theirs = self._a.view_status()[in_a], self._b.view_status()[in_b]
        made = (state_of(ours) == DONE) & (state_of(theirs) == DONE)
        sums = [np.array([f"{crc:08x}" for crc in crc_of(words)]) for words in (ours, theirs)]
        self._conflict(made & (sums[0] != sums[1]), "checksum of the pixels", *sums)

    def _conflict(self, differ: np.ndarray, what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        if differ.any():
            k = int(np.flatnonzero(differ)[0])
            view = self._b.describe(int(self._plan.common[1][k]))
            self._plan.conflicts.append(
                f"{what} differs for {int(differ.sum())} views that both stores have (first: view {view}: expected "
                f"{ours[k]}, found {theirs[k]})"
            )


def _index(store: FeatureStore, stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    """Sorted keys of the views of a stream, and their rows."""
    rows = store.rows(stream=stream)
    keys = view_keys(store.column("tile")[rows], store.column("seed")[rows])
    order = np.argsort(keys)
    return keys[order], rows[order]


def _equal_runs(table: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of equal rows."""
    first = 0
    for k in range(1, len(table) + 1):
        if k == len(table) or not np.array_equal(table[k], table[first]):
            yield first, k
            first = k
