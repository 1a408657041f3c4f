"""Storing the pixels of views that are cached: no teacher is asked, so a store may gain them at any time.

Views that are made for the teachers are stored with them (`keep_made`); what is missing then is made again.
Shard by shard as features are: what is stored already is copied as it is, the rest is made from the images, and a
killed run goes on where it stopped.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rsmtdf.errors import StoreMismatch
from rsmtdf.signals import StopFlag
from rsmtdf.stages.cache.supply import Finished
from rsmtdf.store.pixel_reader import PixelReader
from rsmtdf.store.status import DONE, crc_of, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.views.kept import kept_of
from rsmtdf.views.maker import UnreadableTile, ViewMaker
from rsmtdf.views.view import View, view_crc

log = logging.getLogger(__name__)
Made = list[tuple[View, View] | UnreadableTile]


@dataclass(kw_only=True)
class PixelReport:
    """How storing pixels went."""

    views: int = 0
    """Whose pixels were stored."""
    bytes_written: int = 0
    seconds: float = 0.0
    unreadable: dict[str, str] = field(default_factory=dict)
    """Tile id -> why it cannot be read; the pixels of its views are missing."""
    changed: dict[int, str] = field(default_factory=dict)
    """Row -> how its pixels differ from those recorded; they are not stored."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "views": self.views,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "unreadable_tiles": self.unreadable,
            "changed_views": len(self.changed),
        }


def store_pixels(
    store: FeatureStore,
    *,
    maker: ViewMaker,
    workers: int,
    stop: StopFlag,
    shards: Collection[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    keep_going: bool = False,
) -> PixelReport:
    """Stores the pixels of every cached view of `shards` that lacks them.

    Several processes may do so at a time, each with its own shards.

    Args:
        store: open for writing; it has room for pixels (`FeatureStore.add_pixels`).
        maker: of the store's views.
        workers: threads that make views.
        stop: ends the work after the shard in hand.
        shards: where to look; None: everywhere.
        progress: told views finished, and bytes written in all.
        keep_going: leave out views whose pixels differ from those recorded, and report them, instead of stopping there.

    Raises:
        StoreError: another process is writing to one of these shards, or a full disk.
        StoreCorrupt: pixels that are stored already are damaged.
        StoreMismatch: a view's pixels differ from those recorded.
        Interrupted: a signal came; everything finished is committed, the same command goes on.
    """
    begun = time.perf_counter()
    report = PixelReport()
    wanted = _pending(store, shards)
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="views") as pool, store.claim(sorted(wanted)):
        wanted = {k: rows for k, rows in _pending(store, shards).items() if k in wanted}
        # Nobody else changes these shards from here on.
        with PixelReader(store) as reader:
            for shard, rows, made in _made(store, wanted, maker, pool, stop):
                views, crcs = _sorted_out(store, rows, made, report, keep_going=keep_going)
                if not views:
                    continue
                kept = [row for row in store.rows_of_shard(shard).tolist() if row not in rows and reader.has([row])]
                recorded = crc_of(store.view_status_array.read_shard(shard))
                crcs |= {row: int(recorded[row % store.shard_views]) for row in kept}
                report.bytes_written += store.write_pixels(shard, views=reader.stored(kept) | views, view_crcs=crcs)
                report.views += len(views)
                if progress is not None:
                    progress(len(rows), report.bytes_written)
    report.seconds = time.perf_counter() - begun
    return report


def keep_made(store: FeatureStore, done: Finished) -> int:
    """Stores the pixels of views that were made for the teachers, after these; bytes written.

    Where all of them are stored already, as when a teacher is added, nothing is written. Where others of the shard are,
    it is left to `store_pixels`, which copies those.
    """
    if (pixels := store.pixels) is None or not done.kept:
        return 0
    shard, first = done.work.shard, done.work.shard * store.shard_views
    there = {*(first + np.flatnonzero(state_of(pixels.status.read_shard(shard)) == DONE)).tolist()}
    # What was stored counts only where the view was vouched for before it was made again.
    if done.kept.keys() <= there & done.work.recorded.keys() or not there <= done.kept.keys():
        return 0
    return store.write_pixels(shard, views=done.kept, view_crcs={row: done.crcs[row] for row in done.kept})


def lack_pixels(store: FeatureStore, shards: Collection[int]) -> bool:
    """Whether the store keeps pixels, and a view of `shards`, cached or not, has none yet."""
    return bool(without_pixels(store, shards))


def without_pixels(store: FeatureStore, shards: Collection[int], *, cached_only: bool = False) -> dict[int, list[int]]:
    """Shard -> rows of it that have no pixels yet, in a store that keeps pixels. With `cached_only`, of those rows that
    are cached. Reads the status words of `shards` only.
    """
    if (pixels := store.pixels) is None:
        return {}
    order = sorted(shards)
    cached = state_of(store.view_status_array.read_shards(order)) == DONE
    # Stored pixels count only where somebody vouches for the view.
    lacking = ~(cached & (state_of(pixels.status.read_shards(order)) == DONE))
    if cached_only:
        lacking &= cached
    found = {}
    for k, shard in enumerate(order):
        rows = store.rows_of_shard(shard)
        if of := rows[lacking[k][rows - shard * store.shard_views]].tolist():
            found[shard] = of
    return found


def _pending(store: FeatureStore, shards: Collection[int] | None) -> dict[int, list[int]]:
    """Shard -> rows of it that are cached and lack their pixels."""
    if shards is not None:
        return without_pixels(store, shards, cached_only=True)
    found: dict[int, list[int]] = {}
    for row in store.pending_pixels().tolist():
        found.setdefault(row // store.shard_views, []).append(row)
    return found


def _made(
    store: FeatureStore, wanted: Mapping[int, Sequence[int]], maker: ViewMaker, pool: ThreadPoolExecutor, stop: StopFlag
) -> Iterator[tuple[int, Sequence[int], Made]]:
    """Shards with their missing views, made one shard ahead of the one in hand."""
    queue: deque[tuple[int, Sequence[int], dict[tuple[int, ...], Future[Made]]]] = deque()

    def first() -> tuple[int, Sequence[int], Made]:
        shard, rows, jobs = queue.popleft()
        by_row = {row: view for unit, job in jobs.items() for row, view in zip(unit, job.result(), strict=True)}
        return shard, rows, [by_row[row] for row in rows]

    for shard, rows in wanted.items():
        stop.check(f"stopped; run the same command again to go on ({store.path})")
        units = {tuple(sorted({row, maker.partner(row)} & {*rows})) for row in rows}
        queue.append((shard, rows, {unit: pool.submit(maker.weak_and_attempted, unit) for unit in sorted(units)}))
        if len(queue) > 1:
            yield first()
    while queue:
        stop.check(f"stopped; run the same command again to go on ({store.path})")
        yield first()


def _sorted_out(
    store: FeatureStore, rows: Sequence[int], made: Made, report: PixelReport, *, keep_going: bool
) -> tuple[dict[int, dict[str, np.ndarray]], dict[int, int]]:
    """The arrays of the views that can be stored, and the checksum of each view."""
    views: dict[int, dict[str, np.ndarray]] = {}
    crcs: dict[int, int] = {}
    recorded = crc_of(store.view_status_array.read_shard(rows[0] // store.shard_views))
    for row, both in zip(rows, made, strict=True):
        if isinstance(both, UnreadableTile):
            report.unreadable[both.tile] = str(both)
            continue
        crc, expected = view_crc(both[1]), int(recorded[row % store.shard_views])
        if crc != expected:
            what = f"its pixels differ from those that were recorded: checksum {crc:08x}, expected {expected:08x}"
            if not keep_going:
                raise StoreMismatch(
                    f"view {store.describe(row)} of feature store {store.path}: {what}. The image, an image library "
                    "(Pillow, GDAL's JPEG decoder) or the machine has changed since; what is stored stays as it was. "
                    "Restore the image or the environment (rsmtdf cache info), then run the same command again"
                )
            report.changed[row] = what
            log.warning("pixels of view %s are not stored: %s", store.describe(row), what)
            continue
        views[row], crcs[row] = kept_of(*both), crc
    return views, crcs
