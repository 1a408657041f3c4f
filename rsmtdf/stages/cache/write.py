"""Writing what was computed: whole shards, and views added to a shard that keeps the others byte for byte."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rsmtdf.errors import StoreMismatch
from rsmtdf.specs import Teacher
from rsmtdf.stages.cache.pixels import keep_made
from rsmtdf.stages.cache.report import CacheReport, LedgerRow
from rsmtdf.stages.cache.supply import Finished
from rsmtdf.stages.cache.teach import Harvest
from rsmtdf.stages.cache.trace import Trace
from rsmtdf.stages.cache.transfer import device_of
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.status import DONE, crc_of, state_of
from rsmtdf.store.store import FeatureStore

Progress = Callable[[int, int], None]
"""Called with (views finished, bytes written so far, pixels included) after each shard."""


class ShardWriter:
    """Commits shards, from any number of threads, and reports each; the caller owns the shards.

    Args:
        store: where to.
        teachers: name -> teacher.
        report: takes in what is committed.
        trace: of the seconds that it takes.
        progress: told after each commit, by one thread at a time.
    """

    def __init__(
        self,
        store: FeatureStore,
        teachers: Mapping[str, Teacher],
        *,
        report: CacheReport,
        trace: Trace,
        progress: Progress | None,
    ) -> None:
        self._store, self._teachers = store, teachers
        self._report, self._trace, self._progress = report, trace, progress
        self._lock = threading.Lock()

    def write(self, done: Finished, harvest: Harvest) -> None:
        """Commits a shard.

        Raises:
            StoreMismatch: a view's pixels differ from those recorded when another teacher saw it.
            StoreCorrupt: a view that the shard has already is damaged.
            StoreError: it cannot be written, for want of disk space say.
        """
        with self._trace.span("copy"):
            harvest.wait()
        with self._trace.span("write"):
            written = self._commit(done, harvest)
        try:
            with self._trace.span("write"):
                written += keep_made(self._store, done)
        finally:
            # The features are committed, whatever becomes of the pixels.
            self._count(done, harvest, written)

    def _count(self, done: Finished, harvest: Harvest, written: int) -> None:
        """Notes a committed shard."""
        with self._lock:
            report = self._report
            report.views += len(done.crcs)
            report.bytes_written += written
            report.unreadable.update(done.unreadable)
            report.changed.update(done.changed)
            for name, rows in harvest.rows.items():
                report.features[name] = report.features.get(name, 0) + len(rows)
            report.ledger.append(LedgerRow(shard=done.work.shard, views=len(done.crcs), bytes_written=written))
            if self._progress is not None and done.work.pending:
                self._progress(len(done.work.pending), report.bytes_written)

    def _commit(self, done: Finished, harvest: Harvest) -> int:
        """Bytes written."""
        work, written = done.work, 0
        try:
            if work.whole:
                written += self._store.write_shard(
                    work.shard,
                    view_crcs=done.crcs,
                    skipped=done.bad,
                    features={name: harvest.encoded(self._store.teacher(name)) for name in work.whole},
                    provenance=self._provenance(work.whole, harvest),
                )
            for name in work.mend:
                # What is to do must become skipped at least; what was skipped before may stay as it is.
                if harvest.rows.get(name) or work.due[name]:
                    written += self._mended(name, done, harvest)
        except StoreMismatch as error:
            raise StoreMismatch(
                f"{error}\nThe pixels of a view are no longer those that another teacher saw: an image, an image "
                f"library (Pillow, GDAL's JPEG decoder) or the machine has changed since; see docs/store-format.md"
            ) from error
        return written

    def _mended(self, name: str, done: Finished, harvest: Harvest) -> int:
        """Adds views to a shard that has others: these are kept as they are stored, byte for byte."""
        store, shard = self._store, done.work.shard
        first = shard * store.shard_views
        teacher, seen = store.teacher(name), store.view_status_array.read_shard(shard)
        words = teacher.status.read_shard(shard)
        is_kept = (state_of(words) == DONE) & (state_of(seen) == DONE)
        kept = first + np.flatnonzero(is_kept)
        # What is mended may be a view of a store of a billion: the words of its shard are enough.
        with FeatureReader(store, name, words={shard: words}) as reader:
            old = reader.get_many(kept)
        new, added = harvest.encoded(teacher), harvest.rows.get(name, ())
        order = np.argsort(np.concatenate([kept, np.array(added, np.int64)]))
        crcs = {int(row): int(crc_of(seen)[row - first]) for row in kept}
        crcs |= {row: done.crcs[row] for row in added}
        absent = [int(row) for row in store.rows_of_shard(shard) if int(row) not in crcs]
        return store.write_shard(
            shard,
            view_crcs=crcs,
            skipped={row: done.bad.get(row, "could not be read before, nor now") for row in absent},
            features={name: {key: np.concatenate([old[key], new[key]])[order] for key in old}},
            provenance=self._provenance([name], harvest) | {"added_later": sorted(added)},
        )

    def _provenance(self, names: Sequence[str], harvest: Harvest) -> dict[str, Any]:
        sizes = harvest.batches
        return {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": {name: str(device_of(self._teachers[name])) for name in names},
            "compiled": [name for name in names if getattr(self._teachers[name], "is_compiled", False)],
            "batch": sizes[0] if len(sizes) == 1 else sizes,
        }
