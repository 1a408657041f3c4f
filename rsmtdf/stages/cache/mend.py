"""Writing what was computed: whole shards, and views added to a shard that keeps the others byte for byte."""

from __future__ import annotations

import platform
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from rsmtdf.errors import StoreMismatch
from rsmtdf.specs import Teacher
from rsmtdf.stages.cache.report import CacheReport, LedgerRow
from rsmtdf.stages.cache.teach import device_of
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.status import DONE, crc_of, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.views.view import View, view_crc


@dataclass(frozen=True, kw_only=True)
class Commit:
    """New features of one shard, for some teachers."""

    teachers: Mapping[str, Teacher]
    good: Mapping[int, View]
    bad: Mapping[int, str]
    features: Mapping[str, torch.Tensor]
    """Of the good views."""
    mends: bool
    """The shard keeps the views that it has; otherwise these are all."""

    @property
    def computed(self) -> Collection[int]:
        """The rows whose features were computed."""
        return self.good


class ShardWriter:
    """Commits shards, from one thread. Use it as a context manager; the caller owns the shards."""

    def __init__(self, store: FeatureStore, report: CacheReport) -> None:
        self._store, self._report = store, report
        self._readers: dict[str, FeatureReader] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for reader in self._readers.values():
            reader.close()

    def write(self, shard: int, commits: Sequence[Commit]) -> int:
        """Bytes written.

        Raises:
            StoreMismatch: a view's pixels differ from those recorded when another teacher saw it.
            StoreCorrupt: a view that the shard has already is damaged.
        """
        begun = time.perf_counter()
        try:
            written = sum(self._mended(shard, c) if c.mends else self._whole(shard, c) for c in commits)
            views = len({row for c in commits for row in c.computed})
            self._report.ledger.append(LedgerRow(shard=shard, views=views, bytes_written=written))
            return written
        except StoreMismatch as error:
            raise StoreMismatch(
                f"{error}\nThe pixels of a view are no longer those that another teacher saw: an image, an image "
                f"library (Pillow, GDAL's JPEG decoder) or the machine has changed since; see docs/store-format.md"
            ) from error
        finally:
            self._report.busy["write"] += time.perf_counter() - begun

    def _whole(self, shard: int, commit: Commit) -> int:
        crcs = {row: view_crc(view) for row, view in commit.good.items()}
        return self._store.write_shard(
            shard, view_crcs=crcs, skipped=commit.bad, features=commit.features, provenance=_provenance(commit)
        )

    def _mended(self, shard: int, commit: Commit) -> int:
        """Adds views to a shard that has others: these are kept as they are stored, byte for byte."""
        (name,) = commit.features
        store, first = self._store, shard * self._store.shard_views
        teacher, seen = store.teacher(name), store.view_status_array.read_shard(shard)
        is_kept = (state_of(teacher.status.read_shard(shard)) == DONE) & (state_of(seen) == DONE)
        kept = first + np.flatnonzero(is_kept)
        old = self._reader(name).get_many(kept)
        new = teacher.encode(commit.features[name], rows=list(commit.good))
        order = np.argsort(np.concatenate([kept, np.array(list(commit.good), np.int64)]))
        crcs = {int(row): int(crc_of(seen)[row - first]) for row in kept}
        crcs |= {row: view_crc(view) for row, view in commit.good.items()}
        absent = [int(row) for row in store.rows_of_shard(shard) if int(row) not in crcs]
        return store.write_shard(
            shard,
            view_crcs=crcs,
            skipped={row: commit.bad.get(row, "could not be read before, nor now") for row in absent},
            features={name: {key: np.concatenate([old[key], new[key].cpu().numpy()])[order] for key in old}},
            provenance=_provenance(commit) | {"added_later": sorted(commit.good)},
        )

    def _reader(self, name: str) -> FeatureReader:
        """One per teacher: it reads all status words when it is opened, and no shard is mended twice."""
        if name not in self._readers:
            self._readers[name] = FeatureReader(self._store, name)
        return self._readers[name]


def _provenance(commit: Commit) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": {name: str(device_of(t)) for name, t in commit.teachers.items()},
    }
