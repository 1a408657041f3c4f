"""Checking shards: each is scanned, and what looks damaged in it is held against the store as it is by then."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rsmtdf.errors import StoreError
from rsmtdf.objects import StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.store.audit import Contents
from rsmtdf.store.foreign import ForeignTeacher
from rsmtdf.store.manifest import Manifest, load
from rsmtdf.store.pixels import Payload, StoredPixels
from rsmtdf.store.scan import Finding, ShardScanner
from rsmtdf.store.segments import covered_rows
from rsmtdf.store.shards import ShardUnreachable
from rsmtdf.store.status import DONE, state_of


def views_of(manifest: Manifest, n_rows: int) -> np.ndarray:
    """bool [n_rows]: rows that segments of the manifest cover."""
    return covered_rows(manifest.segments, n_rows)


def still_views(contents: Contents, teacher: str | None = None, *, pixels: bool = False) -> np.ndarray:
    """bool [n_rows]: rows that are views (of `teacher`, or with `pixels`) also for the manifest that is there now.

    A removal commits it first of all, so that nothing it takes away is missed here.
    """
    before = contents.manifest
    real = views_of(before, before.n_rows)
    try:
        now = load(contents.path)
    except (StoreError, OSError):
        return real  # the small things' damage tells of that
    is_gone = teacher is not None and now.teachers.get(teacher) != before.teachers.get(teacher)
    if is_gone or (pixels and not now.has_pixels):
        return np.zeros_like(real)
    real &= views_of(now, before.n_rows)
    return real


@dataclass(frozen=True)
class Unit:
    """One shard of one teacher, or of the stored pixels."""

    contents: Contents
    teacher: Payload
    shard: int
    words: np.ndarray
    foreign: ForeignTeacher | None

    @property
    def views(self) -> int:
        return int((state_of(self.words) == DONE).sum())


def scanned(
    units: list[Unit], threads: int, stop: StopFlag, path: StorePath
) -> Iterator[tuple[Unit, list[Finding], int]]:
    """The units in order with what is wrong with each, scanned a few ahead."""
    scanner = ShardScanner()
    queue: deque[tuple[Unit, Future[tuple[list[Finding], int]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        for unit in units:
            stop.check(f"stopped; nothing was changed. To check again: rsmtdf cache verify {path}")
            queue.append((unit, pool.submit(_scan, scanner, unit)))
            if len(queue) > 2 * threads:
                first, future = queue.popleft()
                yield first, *future.result()
        for unit, future in queue:
            yield unit, *future.result()


def _scan(scanner: ShardScanner, unit: Unit) -> tuple[list[Finding], int]:
    try:
        return _scan_settled(scanner, unit)
    except ShardUnreachable as error:
        raise StoreError(
            f"cannot read shard {unit.shard} of {unit.teacher.path}: {error}. Nothing is known to be wrong with the "
            "store: check the disk, the network and the permissions, then run the same command again"
        ) from error


def _scan_settled(scanner: ShardScanner, unit: Unit) -> tuple[list[Finding], int]:
    found, size = _scan_words(scanner, unit, unit.words)
    if not found:
        return found, size
    # The shard may have been replaced, or views removed, since its words were read.
    words = _words_now(unit)
    per = unit.teacher.shard_views
    is_pixels = isinstance(unit.teacher, StoredPixels)
    still = still_views(unit.contents, None if is_pixels else unit.teacher.name, pixels=is_pixels)
    there = still[unit.shard * per : (unit.shard + 1) * per]
    there &= (state_of(words) == DONE) & (state_of(unit.words) == DONE)
    expected = np.where(there, words, np.uint64(0))
    if not np.array_equal(expected, unit.words):
        found, size = _scan_words(scanner, unit, expected)
    return found, size


def _scan_words(scanner: ShardScanner, unit: Unit, words: np.ndarray) -> tuple[list[Finding], int]:
    if unit.foreign is not None:
        return unit.foreign.scan(unit.shard, words)
    return scanner.scan(unit.teacher, unit.shard, words)


def _words_now(unit: Unit) -> np.ndarray:
    """The shard's words as they are now; those that the check began with where there are none to be read."""
    status = unit.teacher.status
    try:
        return status.read_shard(unit.shard) if status.chunk_file(unit.shard).exists() else unit.words
    except OSError:
        return unit.words
