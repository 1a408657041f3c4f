"""Merging: one store grows by what another has and it lacks.

Everything is compared before the first byte is written. Then the store is extended, gets the new teachers, and the
features are copied shard by shard: verified as they are read, committed as stage 1 commits them. So a merge that was
cut short has added fewer views, and the same call goes on.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rsmtdf.errors import StoreError, StoreMismatch
from rsmtdf.objects import StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.store.carry import AT_A_TIME, RECODED_FROM, in_parallel, joined, read_sound, require_space
from rsmtdf.store.merge_plan import MergePlan, plan_merge
from rsmtdf.store.places import absolute
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.status import DONE, SKIPPED, TODO, crc_of, state_of
from rsmtdf.store.store import FeatureStore

CONFLICTS_SHOWN = 20
Step = Callable[[str], None]
"""Called after each step with its name; if it raises, the merge ends there."""


@dataclass(kw_only=True)
class MergeReport:
    """What a merge did, or would do."""

    store: StorePath
    source: StorePath
    new_views: dict[str, int] = field(default_factory=dict)
    """Stream -> rows that the store grows by."""
    new_teachers: list[str] = field(default_factory=list)
    recoded: list[str] = field(default_factory=list)
    """Teachers whose features were encoded anew."""
    views: dict[str, int] = field(default_factory=dict)
    """Teacher -> views whose features are copied."""
    bytes: int = 0
    """Of these features."""
    left: dict[str, int] = field(default_factory=dict)
    """Segment of the source -> views that were not taken: they are paired otherwise than in the store."""
    damaged: dict[str, dict[str, str]] = field(default_factory=dict)
    """Teacher -> view in words, and of which store -> what is wrong with it; such views stay to be done."""
    lacking: dict[str, int] = field(default_factory=dict)
    """Teacher -> views that the store lacks afterwards."""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "store": str(self.store), "source": str(self.source)}


def merge(
    path: StorePath,
    source: StorePath,
    *,
    recode: bool = False,
    dry_run: bool = False,
    experiment: Mapping[str, Any] | None = None,
    threads: int = 2,
    stop: StopFlag,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_step: Step = lambda step: None,
) -> MergeReport:
    """Adds to the store at `path` what the one at `source` has and it lacks: segments, teachers, unfinished views.

    Args:
        path: grows; nobody may be writing to it meanwhile.
        source: only read.
        recode: where a teacher's codec or statistics differ, encode its features as `path` has them.
        dry_run: change nothing.
        experiment: the record that `path` keeps from now on; None: as it is.
        threads: shards in work at a time.
        stop: ends it between shards; the same call goes on.
        progress: told views finished, and views in all.
        on_step: for tests that end it half-way.

    Raises:
        StoreMismatch: the stores do not fit; every difference is listed, and nothing was written.
        StoreError: somebody is writing to `path`, or it has no room.
        Interrupted: a signal came.
    """
    begun = time.perf_counter()
    if absolute(path) == absolute(source):
        raise StoreError(f"{path} cannot be merged into itself; give two stores")
    a, b = FeatureStore.open(path, writable=not dry_run), FeatureStore.open(source)
    report = MergeReport(store=path, source=source)
    if dry_run:
        _survey(a, b, _checked(a, b, recode), report)
        return report
    try:
        _carry_out(a, b, report, recode, experiment, threads, stop, progress, on_step)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"feature store {path} cannot be written: {error.strerror} ({error.filename}); what was merged so far is "
            "whole. Free space or fix the disk, then run the same command again: it goes on from here"
        ) from error
    report.lacking = {name: n for name in a.teachers if (n := a.pending_views([name]))}
    report.seconds = time.perf_counter() - begun
    return report


def _carry_out(
    a: FeatureStore,
    b: FeatureStore,
    report: MergeReport,
    recode: bool,
    experiment: Mapping[str, Any] | None,
    threads: int,
    stop: StopFlag,
    progress: Callable[[int, int], None],
    on_step: Step,
) -> None:
    with contextlib.ExitStack() as owned:
        with a.locked():
            a.refresh()
            with a.claims.all_shards(purpose="merge into"):
                plan = _checked(a, b, recode)
                _survey(a, b, plan, report)
                require_space(a.path, report.bytes)
            added = a.extend(plan.segments, on_step=on_step)
            for name in plan.teachers:
                theirs = b.teacher(name)
                rule = theirs.statistics.get("rule") or {}
                a.add_teacher(theirs.spec, codec=theirs.codec, statistics=theirs, rule=rule)
                on_step(f"teacher {name}")
            if experiment is not None:
                a.amend(experiment=experiment)
            rows = plan.rows(added)

            def lacking() -> list[_TeacherMerge]:
                return [_TeacherMerge(a, b, name, rows, name in plan.recoded, report) for name in b.teachers]

            shards = {k for job in lacking() for k in job.shards}
            on_step("shards")
            owned.enter_context(a.claim(sorted(shards)))
            # Claims need no mutex: what a writer has committed until then is A's own.
            jobs = lacking()
            for job in jobs:
                job.keep_to(shards)
        report.views, report.bytes = {}, 0
        done, total = 0, sum(job.n_views for job in jobs)
        for job in jobs:
            with job:
                for views in in_parallel(job.copy, job.shards, threads, stop, a.path):
                    done += views
                    progress(done, total)
                    on_step("shard")
    a.seal()


def _checked(a: FeatureStore, b: FeatureStore, recode: bool) -> MergePlan:
    plan = plan_merge(a, b, recode=recode)
    if plan.conflicts:
        more = len(plan.conflicts) - CONFLICTS_SHOWN
        raise StoreMismatch(
            f"{b.path} cannot be merged into {a.path}; nothing was written:\n  "
            + "\n  ".join(plan.conflicts[:CONFLICTS_SHOWN])
            + (f"\n  and {more} more" if more > 0 else "")
        )
    return plan


def _survey(a: FeatureStore, b: FeatureStore, plan: MergePlan, report: MergeReport) -> None:
    """What carrying out the plan would add."""
    for segment in plan.segments:
        report.new_views[segment.stream] = report.new_views.get(segment.stream, 0) + segment.rows
    report.new_teachers, report.recoded, report.left = plan.teachers, plan.recoded, plan.left
    for name, theirs in b.teachers.items():
        usable = b.usable([name])
        n = sum(int(usable[rows].sum()) for rows in plan.new_rows)
        in_a, in_b = plan.common
        is_new = name in plan.teachers
        n += int((usable[in_b] & (is_new or state_of(a.status(name))[in_a] != DONE)).sum())
        if n:
            report.views[name] = n
        report.bytes += n * (theirs if is_new else a.teacher(name)).bytes_per_view


class _TeacherMerge:
    """One teacher's features on their way from B to A, shard by shard of A, from several threads."""

    def __init__(
        self,
        a: FeatureStore,
        b: FeatureStore,
        name: str,
        rows: tuple[np.ndarray, np.ndarray],
        recode: bool,
        report: MergeReport,
    ) -> None:
        self._a, self._b, self._name, self._recode, self._report = a, b, name, recode, report
        self._source = np.full(a.n_rows, -1, np.int64)
        self._source[rows[0]] = rows[1]
        self._ours, self._theirs = state_of(a.status(name)), state_of(b.status(name))
        self._our_views, self._their_views = a.view_status(), b.view_status()
        there = self._source >= 0
        usable = b.usable([name])
        self._take = there & (self._ours != DONE)
        self._take[self._take] &= usable[self._source[self._take]]
        self._skip = there & (self._ours == TODO)
        self._skip[self._skip] &= self._theirs[self._source[self._skip]] == SKIPPED
        per = a.shard_views
        self.shards: list[int] = np.unique(np.flatnonzero(self._take | self._skip) // per).tolist()
        self._lock = threading.Lock()
        self._readers = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._from_a = self._readers.enter_context(FeatureReader(self._a, self._name))
        self._from_b = self._readers.enter_context(FeatureReader(self._b, self._name))

    def __exit__(self, *exception: object) -> None:
        self._readers.close()

    @property
    def n_views(self) -> int:
        """Views that `copy` will be done with, over all `shards`."""
        return sum(self._wanted(self._a.rows_of_shard(k)) for k in self.shards)

    def keep_to(self, shards: Collection[int]) -> None:
        """Leaves out all other shards."""
        self.shards = [k for k in self.shards if k in shards]

    def copy(self, shard: int) -> int:
        """Commits a shard of A with what A has of it and what B adds; how many views B adds."""
        rows = self._a.rows_of_shard(shard)
        kept = rows[(self._ours[rows] == DONE) & (state_of(self._our_views)[rows] == DONE)]
        taken = rows[self._take[rows]]
        bad: dict[int, str] = {}
        bad_here: dict[int, str] = {}
        ours, old = read_sound(self._from_a, kept, bad_here)
        theirs, new = self._taken(taken, bad)
        crcs = {row: int(crc_of(self._our_views[[row]])[0]) for row in ours}
        crcs |= {row: int(crc_of(self._their_views[[self._source[row]]])[0]) for row in theirs}
        # Beside the shard, not with the teacher: of its other views it would not be true.
        came = {RECODED_FROM: self._from_b.teacher.codec} if self._recode else {}
        skipped = [r for r in rows.tolist() if r not in crcs and (self._skip[r] or self._ours[r] == SKIPPED)]
        self._a.write_shard(
            shard,
            view_crcs=crcs,
            skipped=dict.fromkeys(skipped, "could not be read when it was cached"),
            features={self._name: joined(ours, old, theirs, new)},
            provenance={"merged_from": str(self._b.path), "merged": theirs, **came},
            left=set(rows.tolist()) - set(crcs) - set(skipped),
        )
        with self._lock:
            self._note(bad_here, bad, len(theirs))
        return self._wanted(rows)

    def _wanted(self, rows: np.ndarray) -> int:
        return int((self._take | self._skip)[rows].sum())

    def _taken(self, rows: np.ndarray, bad: dict[int, str]) -> tuple[list[int], Mapping[str, np.ndarray]]:
        """Those of `rows` of A that B holds undamaged, and their arrays as A encodes them."""
        teacher = self._a.teacher(self._name)
        parts: dict[str, list[np.ndarray]] = {a.name: [np.empty((0, *a.shape), a.dtype)] for a in teacher.arrays}
        there: list[int] = []
        for start in range(0, len(rows), AT_A_TIME):
            some = rows[start : start + AT_A_TIME]
            of_b = self._source[some]
            sound, arrays = read_sound(self._from_b, of_b, bad)
            good = some[np.isin(of_b, sound)].tolist()
            if self._recode and good:
                stored = {key: torch.from_numpy(values) for key, values in arrays.items()}
                values = self._from_b.teacher.decode(stored, device=torch.device("cpu"))
                arrays = {key: t.numpy() for key, t in teacher.encode(values, rows=good).items()}
            if good:
                there += good
                for key, part in arrays.items():
                    parts[key].append(part)
        return there, {key: np.concatenate(some) for key, some in parts.items()}

    def _note(self, bad_here: Mapping[int, str], bad: Mapping[int, str], views: int) -> None:
        report, size = self._report, self._a.teacher(self._name).bytes_per_view
        report.views[self._name] = report.views.get(self._name, 0) + views
        report.bytes += views * size
        for store, found in ((self._a, bad_here), (self._b, bad)):
            for row, why in found.items():
                words = f"{store.describe(row)} of {store.path}"
                report.damaged.setdefault(self._name, {})[words] = why
