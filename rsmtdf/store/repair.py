"""Repair: every committed payload is read and checked, and what is damaged becomes work to do again.

Nothing is recomputed here, and no good shard is touched: a damaged shard is withdrawn, so that stage 1 finds it
missing. What stage 1 cannot make again in place (the manifest, columns, tile ids, an array's metadata) is only named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rsmtdf.errors import StoreCorrupt
from rsmtdf.objects import StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.store.arrays import METADATA, read_metadata, same_layout
from rsmtdf.store.commit import withdraw_shard
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.status import DONE, HOLE, TODO, StatusArray, state_of, word
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import StoredTeacher


@dataclass(kw_only=True)
class TeacherDamage:
    """What was found in one teacher's features."""

    checked: int = 0
    """Views whose bytes were compared with their status words."""
    damaged: dict[str, str] = field(default_factory=dict)
    """View in words -> what is wrong with it."""
    withdrawn: set[int] = field(default_factory=set)
    """Shards to be computed again."""


@dataclass(kw_only=True)
class RepairReport:
    """What `repair` found and did."""

    store: StorePath
    teachers: dict[str, TeacherDamage]
    status: list[str] = field(default_factory=list)
    """Status files that were damaged, and what was done about each."""
    not_repaired: list[str] = field(default_factory=list)
    """Damage that nothing can be done about in place."""

    @property
    def is_sound(self) -> bool:
        """Whether nothing was wrong."""
        found = any(t.damaged or t.withdrawn for t in self.teachers.values())
        return not (found or self.status or self.not_repaired)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "store": str(self.store),
            "sound": self.is_sound,
            "teachers": {
                name: {"checked": t.checked, "damaged": t.damaged, "withdrawn_shards": sorted(t.withdrawn)}
                for name, t in self.teachers.items()
            },
            "status": self.status,
            "not_repaired": self.not_repaired,
        }


def repair(path: StorePath, *, stop: StopFlag, progress: Callable[[int, int], None]) -> RepairReport:
    """Checks the store at `path` and withdraws every shard that is damaged, each as soon as it is found.

    Args:
        path: the store; nobody may be writing to it meanwhile.
        stop: ends the check after the shard at hand.
        progress: told views checked, and views in all.

    Raises:
        StoreNotFound: there is no store.
        StoreCorrupt: its manifest or a teacher's attributes are damaged, so that nothing in it can be trusted.
        StoreError: somebody is writing to it, or it cannot be written.
        Interrupted: a signal came.
    """
    store = FeatureStore.open(path, writable=True)
    with store.locked(), store.claims.all_shards(purpose="repair"):
        store.refresh()
        report = RepairReport(store=store.path, teachers={name: TeacherDamage() for name in store.teachers})
        _check_tables(store, report)
        _mend_status(store, report)
        shards = [(t, np.flatnonzero(state_of(store.status(t.name)) == DONE)) for t in store.teachers.values()]
        total, before = sum(len(rows) for _, rows in shards), 0
        for teacher, rows in shards:
            _check_teacher(store, teacher, rows, report, stop, partial(_advance, progress, before, total))
            before += len(rows)
    return report


def _advance(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _check_tables(store: FeatureStore, report: RepairReport) -> None:
    """The columns and tile ids, which say what each view is."""
    reads: list[Callable[[], object]] = [lambda: store.tile_ids]
    reads += [partial(store.column, name) for name in store.column_names]
    for read in reads:
        try:
            read()
        except StoreCorrupt as error:
            report.not_repaired.append(str(error))


def _mend_status(store: FeatureStore, report: RepairReport) -> None:
    """Makes every status word readable; shards whose words are lost are withdrawn."""
    for name, teacher in store.teachers.items():
        for shard in _lost(store, teacher.status, report):
            _reset(store, teacher.status, shard)
            report.teachers[name].withdrawn.add(shard)
            report.status.append(f"{teacher.status.chunk_file(shard)}: damaged; the shard was withdrawn")
    views = store.view_status_array
    for shard in _lost(store, views, report):
        # Without the sums of its pixels nobody can tell whether a view made again is the one the teachers saw.
        for name in store.teachers:
            withdraw_shard(store, shard, name)
            report.teachers[name].withdrawn.add(shard)
        _reset(store, views, shard)
        report.status.append(f"{views.chunk_file(shard)}: damaged; the shard was withdrawn for every teacher")


def _lost(store: FeatureStore, status: StatusArray, report: RepairReport) -> list[int]:
    """The shards whose words are lost, after everything else about `status` was mended."""
    if status.drop_damaged_seal():
        report.status.append(f"{status.sealed_file}: damaged; removed, the chunk files beside it hold the same")
    rewritten, lost = status.mend(store.n_rows)
    report.status += [f"{status.chunk_file(k)}: damaged; written again from the sealed copy" for k in rewritten]
    return lost


def _reset(store: FeatureStore, status: StatusArray, shard: int) -> None:
    """Sets a shard's words, whatever they were, to those of views that are not there yet."""
    words = np.full(store.shard_views, word(HOLE), np.uint64)
    words[store.rows_of_shard(shard) - shard * store.shard_views] = word(TODO)
    status.write_shard(shard, words)


def _check_teacher(
    store: FeatureStore,
    teacher: StoredTeacher,
    rows: np.ndarray,
    report: RepairReport,
    stop: StopFlag,
    progress: Callable[[int], None],
) -> None:
    found = report.teachers[teacher.name]
    try:
        foreign = _foreign_array(store, teacher)
        source = FeatureReader(store, teacher.name)
    except StoreCorrupt as error:
        report.not_repaired.append(str(error))
        return
    with source:
        shards = rows // store.shard_views
        for shard in np.unique(shards).tolist():
            stop.check(f"stopped; what was found so far is withdrawn. To go on: rsmtdf cache repair {store.path}")
            damaged: dict[str, str] = {}
            for row in rows[shards == shard].tolist():
                try:
                    source.get_many([row])
                except StoreCorrupt as error:
                    why = error.__cause__ or "its checksum is not the one in the status word"
                    damaged[store.describe(row)] = str(why)
                found.checked += 1
                progress(found.checked)
            found.damaged |= damaged
            if damaged and foreign is None:
                withdraw_shard(store, shard, teacher.name)
                found.withdrawn.add(shard)
            elif damaged:
                report.not_repaired.append(
                    f"shard {shard} of teacher {teacher.name!r} is damaged, but {foreign} is not in the store's own "
                    "layout, which stage 1 writes; restore its files from a copy of the store"
                )


def _foreign_array(store: FeatureStore, teacher: StoredTeacher) -> StorePath | None:
    """The metadata of an array whose layout is not the store's own (an archive's, or damaged); None: all are."""
    for array in teacher.arrays:
        node = teacher.path / array.name
        if not same_layout(read_metadata(node), teacher.array_metadata(array, store.n_rows)):
            return node / METADATA
    return None
