"""Arrays in another Zarr layout than the one this code writes: archives, which only zarr-python reads.

Whether an array is one, or one of ours whose metadata are damaged, is told by its files: ours can be read by position.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from rsmtdf.errors import StoreCorrupt
from rsmtdf.objects import StorePath
from rsmtdf.store.arrays import read_metadata, same_layout
from rsmtdf.store.audit import Contents
from rsmtdf.store.carry import tell_sound
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.scan import Finding, ShardScanner
from rsmtdf.store.status import DONE, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import StoredTeacher

_TRIED = 3
"""Shards that are looked into."""


class ForeignTeacher:
    """A teacher with an array in another layout. Use it as a context manager, or `close` it."""

    def __init__(self, contents: Contents, teacher: StoredTeacher) -> None:
        """Opens its features.

        Raises:
            StoreCorrupt: they, or the statistics beside them, cannot be opened.
        """
        self._teacher = teacher
        alone = {teacher.name: contents.manifest.teachers[teacher.name]}
        manifest = dataclasses.replace(contents.manifest, teachers=alone)
        self._reader = FeatureReader(FeatureStore(path=contents.path, manifest=manifest, writable=False), teacher.name)

    def scan(self, shard: int, words: np.ndarray) -> tuple[list[Finding], int]:
        """As `ShardScanner.scan`; no bytes are counted that cannot be told."""
        first = shard * self._teacher.shard_views
        rows = first + np.flatnonzero(state_of(words) == DONE)
        _, bad = tell_sound(self._reader, rows.tolist())
        return [(row - first, self.node, what) for row, what in bad.items()], len(rows) * self._teacher.bytes_per_view

    @property
    def node(self) -> StorePath:
        return self._teacher.path / self._teacher.arrays[0].name

    def close(self) -> None:
        self._reader.close()


def foreign_arrays(contents: Contents, teacher: StoredTeacher, words: np.ndarray) -> list[StorePath]:
    """The arrays of `teacher` that are in another layout; none where they are ours, whatever their metadata say."""
    n_rows, per = contents.manifest.n_rows, contents.manifest.shard_views
    other = []
    for array in teacher.arrays:
        node = teacher.path / array.name
        try:
            if not same_layout(read_metadata(node), teacher.array_metadata(array, n_rows)):
                other.append(node)
        except StoreCorrupt:
            continue
    if not other:
        return []
    scanner = ShardScanner()
    shards = np.unique(np.flatnonzero(state_of(words) == DONE) // per)[:_TRIED].tolist()
    parts = {shard: words[shard * per : (shard + 1) * per] for shard in shards}
    for shard, part in parts.items():
        if len(scanner.scan(teacher, shard, part)[0]) < np.count_nonzero(state_of(part) == DONE):
            return []
    try:
        foreign = ForeignTeacher(contents, teacher)
    except StoreCorrupt:
        return []
    try:
        reads = any(len(foreign.scan(k, p)[0]) < np.count_nonzero(state_of(p) == DONE) for k, p in parts.items())
    finally:
        foreign.close()
    return other if reads else []
