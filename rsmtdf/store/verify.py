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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rsmtdf.objects import ObjectPath, StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.store import audit
from rsmtdf.store.arrays import METADATA
from rsmtdf.store.audit import Contents, read_contents
from rsmtdf.store.damage import Damage, Kind
from rsmtdf.store.foreign import ForeignTeacher, foreign_arrays
from rsmtdf.store.pixels import StoredPixels, strong_shards
from rsmtdf.store.shard_checks import Unit, scanned, still_views, views_of
from rsmtdf.store.status import DONE, HOLE, SKIPPED, StatusArray, state_of
from rsmtdf.store.store import FeatureStore

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

    @property
    def is_complete(self) -> bool:
        return self.done + self.skipped == self.total


@dataclass(kw_only=True)
class VerifyReport:
    """What `verify` found."""

    store: StorePath
    damage: list[Damage] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """Worth knowing, and no damage."""
    teachers: dict[str, TeacherState] = field(default_factory=dict)
    pixels: TeacherState | None = None
    """How far the views' pixels are stored; None where the store keeps none."""
    bytes_read: int = 0
    """Of features and stored pixels."""
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
            "pixels": None if self.pixels is None else dataclasses.asdict(self.pixels),
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
    pixel_words = _check_pixel_status(contents, report)
    view = _describer(contents)
    foreign = _told_foreign(contents, words, report)
    try:
        _check_payloads(contents, words, pixel_words, foreign, view, report, stop, progress)
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
    return views_of(contents.manifest, contents.manifest.n_rows)


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
            odd &= still_views(contents, name)
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


def _check_pixel_status(contents: Contents, report: VerifyReport) -> np.ndarray | None:
    """The words of the stored pixels, as far as they can be read; damage to them goes to `report`."""
    if (pixels := contents.pixels) is None:
        return None
    before = len(report.damage)
    words = _words(contents, pixels.status, None, report)
    report.damage[before:] = [dataclasses.replace(d, kind="pixels") for d in report.damage[before:]]
    real, state = is_view(contents), state_of(words)
    report.pixels = TeacherState(
        done=int(((state == DONE) & real).sum()),
        skipped=int(((state == SKIPPED) & real).sum()),
        total=int(real.sum()),
    )
    return words


def _words(contents: Contents, status: StatusArray, teacher: str | None, report: VerifyReport) -> np.ndarray:
    n_rows = contents.manifest.n_rows
    words, found = status.survey(n_rows)
    odd = _odd_words(words, is_view(contents), status.shard_views)
    if found or odd:
        words, again = status.survey(n_rows)
        found = {k: v for k, v in again.items() if k in found}
        real = still_views(contents, teacher)
        odd &= _odd_words(words, real, status.shard_views)
        gone = _shards(is_view(contents), status.shard_views) - _shards(real, status.shard_views)
        found = {k: v for k, v in found.items() if k not in gone}
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
    return _shards(odd, shard_views)


def _shards(rows: np.ndarray, shard_views: int) -> set[int]:
    """Shards with a row that is true."""
    return set((np.flatnonzero(rows) // shard_views).tolist())


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


def _check_payloads(
    contents: Contents,
    words: dict[str, np.ndarray],
    pixel_words: np.ndarray | None,
    foreign: Mapping[str, ForeignTeacher],
    view: Callable[[int], str],
    report: VerifyReport,
    stop: StopFlag,
    progress: Progress,
) -> None:
    """Every payload whose status word says that it is there."""
    per, real = contents.manifest.shard_views, is_view(contents)
    units = [
        Unit(contents, teacher, int(shard), words[name][shard * per : (shard + 1) * per], foreign.get(name))
        for name, teacher in contents.teachers.items()
        for shard in np.unique(np.flatnonzero((state_of(words[name]) == DONE) & real) // per)
    ]
    units += _pixel_units(contents, pixel_words)
    total = sum(u.views * u.teacher.bytes_per_view for u in units)
    begun, done = time.perf_counter(), 0
    for unit, found, size in scanned(units, report.threads, stop, contents.path):
        report.bytes_read += size
        is_pixels = isinstance(unit.teacher, StoredPixels)
        state = report.pixels if is_pixels else report.teachers[unit.teacher.name]
        assert state is not None
        state.checked += unit.views
        for slot, file, what in found:
            row = unit.shard * per + slot
            report.damage.append(
                Damage(
                    kind="pixels" if is_pixels else "features",
                    file=file,
                    teacher=None if is_pixels else unit.teacher.name,
                    shard=unit.shard,
                    row=row,
                    view=view(row),
                    what=what,
                )
            )
        done += unit.views * unit.teacher.bytes_per_view
        progress(done, total)
    report.seconds = time.perf_counter() - begun


def _pixel_units(contents: Contents, words: np.ndarray | None) -> list[Unit]:
    if (pixels := contents.pixels) is None or words is None:
        return []
    per = contents.manifest.shard_views
    strong = strong_shards(contents.manifest.segments, per)
    shards = np.unique(np.flatnonzero((state_of(words) == DONE) & is_view(contents)) // per).tolist()
    return [Unit(contents, pixels.of_shard(k, strong), k, words[k * per : (k + 1) * per], None) for k in shards]
