"""Verifying a store: every committed byte against its checksums, at the speed of the disk, writing nothing.

Small things first (`audit`), then status words, then every payload, shard file by shard file. What the check believes
is the manifest and the status words, as every reader does. Writers may be at work meanwhile: what they commit after
the check began is not checked, and what looks damaged is looked at once more before it is called so, also whether it is
still part of the store.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rsmtdf.errors import StoreError
from rsmtdf.objects import ObjectPath, StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.store import audit
from rsmtdf.store.arrays import METADATA
from rsmtdf.store.audit import Contents, read_contents
from rsmtdf.store.damage import Damage, Kind
from rsmtdf.store.foreign import ForeignTeacher, foreign_arrays
from rsmtdf.store.manifest import Manifest, load
from rsmtdf.store.scan import Finding, ShardScanner
from rsmtdf.store.shards import ShardUnreachable
from rsmtdf.store.status import DONE, HOLE, SKIPPED, StatusArray, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import StoredTeacher

OBJECT_THREADS = 16
"""Shards of object storage read at a time: one request is slow, many are not."""
Progress = Callable[[int, int], None]
"""Told bytes checked, and bytes in all."""


@dataclass(kw_only=True)
class TeacherState:
    """How far one teacher's features are there."""

    done: int
    skipped: int
    total: int
    checked: int = 0
    """Views whose bytes were compared with their checksums."""


@dataclass(kw_only=True)
class VerifyReport:
    """What `verify` found."""

    store: StorePath
    damage: list[Damage] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """Worth knowing, and no damage."""
    teachers: dict[str, TeacherState] = field(default_factory=dict)
    bytes_read: int = 0
    """Of features."""
    seconds: float = 0.0
    """Spent reading them."""
    threads: int = 1
    foreign: list[str] = field(default_factory=list)
    """Teachers with arrays in another layout, which nothing writes to."""

    @property
    def is_sound(self) -> bool:
        return not self.damage

    @property
    def is_complete(self) -> bool:
        """Whether every view is done or skipped, for every teacher."""
        if any(d.kind in {"manifest", "teacher"} for d in self.damage):
            return False  # nobody can tell
        return bool(self.teachers) and all(t.done + t.skipped == t.total for t in self.teachers.values())

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "store": str(self.store),
            "sound": self.is_sound,
            "complete": self.is_complete,
            "damage": [d.as_dict() for d in self.damage],
            "remarks": self.remarks,
            "teachers": {name: dataclasses.asdict(t) for name, t in self.teachers.items()},
            "bytes_read": self.bytes_read,
            "seconds": round(self.seconds, 3),
            "gb_per_second": round(self.bytes_read / max(self.seconds, 1e-9) / 1e9, 3),
            "threads": self.threads,
        }


def verify(
    path: StorePath, *, stop: StopFlag, progress: Progress = lambda done, total: None, threads: int | None = None
) -> VerifyReport:
    """Checks the store at `path` and changes nothing in it.

    Args:
        path: the store; writers may be at work.
        stop: ends the check between shards.
        progress: called after each shard.
        threads: shards read at a time; None: on a disk up to 4, for summing takes turns anyway.

    Raises:
        StoreNotFound: there is no store.
        StoreError: its format or a spec is of a version that this code does not know, or it cannot be read now.
        Interrupted: a signal came.
    """
    usual = OBJECT_THREADS if isinstance(path, ObjectPath) else min(4, os.cpu_count() or 1)
    report = VerifyReport(store=path, threads=threads or usual)
    contents = read_contents(path)
    first = _small_damage(contents)
    if first[0]:
        # Writers may have been in the middle of something: what is there twice stays.
        contents = read_contents(path)
        again = _small_damage(contents)
        first = ([d for d in again[0] if d in first[0]], again[1])
    report.damage, report.remarks = list(first[0]), first[1]
    if isinstance(contents, Damage):
        return report
    words = _check_status(contents, report)
    view = _describer(contents)
    foreign = _told_foreign(contents, words, report)
    try:
        _check_features(contents, words, foreign, view, report, stop, progress)
    finally:
        for teacher in foreign.values():
            teacher.close()
    committed = {
        name: set((np.flatnonzero(np.isin(state_of(w), (DONE, SKIPPED))) // contents.manifest.shard_views).tolist())
        for name, w in words.items()
    }
    report.remarks += audit.check_strays(contents, committed)
    return report


def _small_damage(contents: Contents | Damage) -> tuple[list[Damage], list[str]]:
    if isinstance(contents, Damage):
        return [contents], []
    metadata = [*audit.check_metadata(contents), *audit.check_twins(contents)]
    damage = [*contents.damage, *(d for d in metadata if isinstance(d, Damage))]
    damage += [*audit.check_tables(contents), *audit.check_notes(contents)]
    return damage, [line for line in metadata if isinstance(line, str)]


def is_view(contents: Contents) -> np.ndarray:
    """bool [n_rows]: rows that are no holes."""
    return _covered(contents.manifest, contents.manifest.n_rows)


def _covered(manifest: Manifest, n_rows: int) -> np.ndarray:
    real = np.zeros(n_rows, bool)
    for s in manifest.segments:
        real[s.row_start : s.row_stop] = True
    return real


def _still_view(contents: Contents, teacher: str | None = None) -> np.ndarray:
    """bool [n_rows]: rows that are views (of `teacher`) also for the manifest that is there now.

    A removal commits it first of all, so that nothing it takes away is missed here.
    """
    real, before = is_view(contents), contents.manifest
    try:
        now = load(contents.path)
    except (StoreError, OSError):
        return real  # the small things' damage tells of that
    if teacher is not None and now.teachers.get(teacher) != before.teachers.get(teacher):
        return np.zeros_like(real)
    return np.asarray(real & _covered(now, before.n_rows), dtype=bool)


def _check_status(contents: Contents, report: VerifyReport) -> dict[str, np.ndarray]:
    """The teachers' words, as far as they can be read; damage to them, and to those of the views, goes to `report`."""
    manifest = contents.manifest
    views = StatusArray(path=contents.path / "views" / "status", shard_views=manifest.shard_views)
    # The teachers' first: of a shard that is committed in between, the views are then there in any case.
    words = {name: _words(contents, t.status, name, report) for name, t in contents.teachers.items()}
    lost_before = len(report.damage)
    view_words = _words(contents, views, None, report)
    lost = {d.shard for d in report.damage[lost_before:] if d.kind == "status"}
    made = state_of(view_words) == DONE
    unvouched: set[int] = set()
    real = is_view(contents)
    for name, teacher_words in words.items():
        state = state_of(teacher_words)
        odd = (state == DONE) & real & ~made
        if odd.any():
            odd &= _still_view(contents, name)
        unvouched |= set((np.flatnonzero(odd) // manifest.shard_views).tolist()) - lost
        report.teachers[name] = TeacherState(
            done=int(((state == DONE) & real).sum()),
            skipped=int(((state == SKIPPED) & real).sum()),
            total=int(real.sum()),
        )
    for shard in sorted(unvouched):
        what = "has no checksum of pixels whose features are committed"
        report.damage.append(Damage(kind="status", file=views.chunk_file(shard), shard=shard, what=what))
    return words


def _words(contents: Contents, status: StatusArray, teacher: str | None, report: VerifyReport) -> np.ndarray:
    n_rows = contents.manifest.n_rows
    words, found = status.survey(n_rows)
    odd = _odd_words(words, is_view(contents), status.shard_views)
    if found or odd:
        words, again = status.survey(n_rows)
        found = {k: v for k, v in again.items() if k in found}
        real = _still_view(contents, teacher)
        odd &= _odd_words(words, real, status.shard_views)
        was, there = (np.any(r.reshape(-1, status.shard_views), axis=1).tolist() for r in (is_view(contents), real))
        found = {k: v for k, v in found.items() if k is None or there[k] or not was[k]}
    for shard, what in found.items():
        file = status.sealed_file if shard is None else status.chunk_file(shard)
        kind: Kind = "seal" if shard is None else "status"
        report.damage.append(Damage(kind=kind, file=file, teacher=teacher, shard=shard, what=audit.reason(what)))
    for shard in sorted(odd - found.keys()):
        what = "has words that no writer makes"
        report.damage.append(
            Damage(kind="status", file=status.chunk_file(shard), teacher=teacher, shard=shard, what=what)
        )
    return words


def _odd_words(words: np.ndarray, real: np.ndarray, shard_views: int) -> set[int]:
    """Shards with a state there is not, or a view called a hole. Words of rows that are no views mean nothing: a
    removal that was cut short leaves them as they were.
    """
    odd = real & ((words >> np.uint64(34) != 0) | (state_of(words) == HOLE))
    return set((np.flatnonzero(odd) // shard_views).tolist())


def _told_foreign(contents: Contents, words: dict[str, np.ndarray], report: VerifyReport) -> dict[str, ForeignTeacher]:
    """The teachers whose arrays are in another layout, which is a remark instead of damage to their metadata."""
    found: dict[str, ForeignTeacher] = {}
    for name, teacher in contents.teachers.items():
        for node in foreign_arrays(contents, teacher, words[name]):
            report.damage = [d for d in report.damage if d.kind != "metadata" or d.file != node / METADATA]
            remark = f"{node} is in another layout: an archive, read through zarr-python"
            report.remarks = [*(r for r in report.remarks if not r.startswith(f"{node} ")), remark]
            found[name] = found.get(name) or ForeignTeacher(contents, teacher)
    report.foreign = list(found)
    return found


def _describer(contents: Contents) -> Callable[[int], str]:
    """Rows in words. The store it asks knows no teachers, whose damage would keep it from opening."""
    bare = dataclasses.replace(contents.manifest, teachers={})
    return FeatureStore(path=contents.path, manifest=bare, writable=False).describe


@dataclass(frozen=True)
class _Unit:
    """One shard of one teacher."""

    contents: Contents
    teacher: StoredTeacher
    shard: int
    words: np.ndarray
    foreign: ForeignTeacher | None

    @property
    def views(self) -> int:
        return int((state_of(self.words) == DONE).sum())


def _check_features(
    contents: Contents,
    words: dict[str, np.ndarray],
    foreign: Mapping[str, ForeignTeacher],
    view: Callable[[int], str],
    report: VerifyReport,
    stop: StopFlag,
    progress: Progress,
) -> None:
    """Every payload whose status word says that it is there."""
    per, real = contents.manifest.shard_views, is_view(contents)
    units = [
        _Unit(contents, teacher, int(shard), words[name][shard * per : (shard + 1) * per], foreign.get(name))
        for name, teacher in contents.teachers.items()
        for shard in np.unique(np.flatnonzero((state_of(words[name]) == DONE) & real) // per)
    ]
    total = sum(u.views * u.teacher.bytes_per_view for u in units)
    begun, done = time.perf_counter(), 0
    for unit, found, size in _scanned(units, report.threads, stop, contents.path):
        report.bytes_read += size
        report.teachers[unit.teacher.name].checked += unit.views
        for slot, file, what in found:
            row = unit.shard * per + slot
            report.damage.append(
                Damage(
                    kind="features",
                    file=file,
                    teacher=unit.teacher.name,
                    shard=unit.shard,
                    row=row,
                    view=view(row),
                    what=what,
                )
            )
        done += unit.views * unit.teacher.bytes_per_view
        progress(done, total)
    report.seconds = time.perf_counter() - begun


def _scanned(
    units: list[_Unit], threads: int, stop: StopFlag, path: StorePath
) -> Iterator[tuple[_Unit, list[Finding], int]]:
    """The units in order with what is wrong with each, scanned a few ahead."""
    scanner = ShardScanner()
    queue: deque[tuple[_Unit, Future[tuple[list[Finding], int]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        for unit in units:
            stop.check(f"stopped; nothing was changed. To check again: rsmtdf cache verify {path}")
            queue.append((unit, pool.submit(_scan, scanner, unit)))
            if len(queue) > 2 * threads:
                first, future = queue.popleft()
                yield first, *future.result()
        for unit, future in queue:
            yield unit, *future.result()


def _scan(scanner: ShardScanner, unit: _Unit) -> tuple[list[Finding], int]:
    try:
        return _scan_settled(scanner, unit)
    except ShardUnreachable as error:
        raise StoreError(
            f"cannot read shard {unit.shard} of {unit.teacher.path}: {error}. Nothing is known to be wrong with the "
            "store: check the disk, the network and the permissions, then run the same command again"
        ) from error


def _scan_settled(scanner: ShardScanner, unit: _Unit) -> tuple[list[Finding], int]:
    found, size = _scan_words(scanner, unit, unit.words)
    if not found:
        return found, size
    # The shard may have been replaced, or views removed, since its words were read.
    words = _words_now(unit)
    per = unit.teacher.shard_views
    there = _still_view(unit.contents, unit.teacher.name)[unit.shard * per : (unit.shard + 1) * per]
    there &= (state_of(words) == DONE) & (state_of(unit.words) == DONE)
    expected = np.where(there, words, np.uint64(0))
    if not np.array_equal(expected, unit.words):
        found, size = _scan_words(scanner, unit, expected)
    return found, size


def _scan_words(scanner: ShardScanner, unit: _Unit, words: np.ndarray) -> tuple[list[Finding], int]:
    if unit.foreign is not None:
        return unit.foreign.scan(unit.shard, words)
    return scanner.scan(unit.teacher, unit.shard, words)


def _words_now(unit: _Unit) -> np.ndarray:
    """The shard's words as they are now; those that the check began with where there are none to be read."""
    status = unit.teacher.status
    try:
        return status.read_shard(unit.shard) if status.chunk_file(unit.shard).exists() else unit.words
    except OSError:
        return unit.words
