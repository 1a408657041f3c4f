"""Computing what a store lacks: views from a pool of threads, all teachers on a batch, shards by other threads.

Everything goes on at once, through queues that are bounded: views are made ahead, across batches and shards; a batch is
sent to the device while the one before is computed; features are encoded there, and come back and are written while the
next batch is computed. The memory it takes depends on the batch and the threads, not on how many views there are.

A shard is the unit of work and of commit, so a killed run loses at most the shards in flight and goes on where it
stopped. Views that an earlier run had to skip are tried again in every run, at the price of one decoded image per tile
that they come from: only where these open now are the views made. Where a shard lacks single views, skipped or
withdrawn by a repair, only these are made and added to what it holds.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Literal

from rsmtdf.errors import StoreError
from rsmtdf.signals import StopFlag
from rsmtdf.specs import Teacher, Tile
from rsmtdf.stages.cache.pixels import lack_pixels, without_pixels
from rsmtdf.stages.cache.report import CacheReport
from rsmtdf.stages.cache.size import choose_batch
from rsmtdf.stages.cache.supply import AHEAD, Batch, Finished, batches, made_views, run_ahead, threads
from rsmtdf.stages.cache.teach import Harvest, Lesson, Shown
from rsmtdf.stages.cache.trace import Trace
from rsmtdf.stages.cache.work import Work, plan_work, read_states
from rsmtdf.stages.cache.write import Progress, ShardWriter
from rsmtdf.store.store import FeatureStore
from rsmtdf.views.maker import ViewMaker

log = logging.getLogger(__name__)

WRITERS = 2
"""Threads that write, and shards that may wait for them: encoded features of so many are in memory."""


def fill_store(
    store: FeatureStore,
    *,
    teachers: Mapping[str, Teacher],
    maker: ViewMaker,
    batch: Literal["auto"] | int,
    workers: int,
    stop: StopFlag,
    shards: Sequence[int] | None = None,
    progress: Progress | None = None,
    keep_going: bool = False,
) -> CacheReport:
    """Computes and commits every missing view of the store; also clears what dead writers left, and seals.

    Args and errors as `fill_shards`.
    """
    store.clean_partials()
    # One file holds the status words of all that is sealed, so what is finished costs no look at each shard.
    lacking = set(store.missing_shards(list(teachers), retry_skipped=True))
    report = fill_shards(
        store,
        teachers=teachers,
        maker=maker,
        batch=batch,
        workers=workers,
        stop=stop,
        shards=sorted(lacking if shards is None else lacking.intersection(shards)),
        progress=progress,
        keep_going=keep_going,
    )
    store.seal()
    return report


def fill_shards(
    store: FeatureStore,
    *,
    teachers: Mapping[str, Teacher],
    maker: ViewMaker,
    batch: Literal["auto"] | int,
    workers: int,
    stop: StopFlag,
    shards: Sequence[int],
    progress: Progress | None = None,
    keep_going: bool = False,
    turn: AbstractContextManager[object] | None = None,
) -> CacheReport:
    """Computes and commits every missing view of `shards`, each teacher where it is missing.

    Several processes may do so at a time, each with its own shards; it costs what these shards cost, however large the
    store is.

    Args:
        store: open for writing; it has the teachers.
        teachers: name -> teacher.
        maker: of the store's views.
        batch: views shown to a teacher at a time; auto: see `choose_batch`, which whoever calls often does once.
        workers: threads that make views.
        stop: ends the work after the shard in the writer's hands.
        shards: where to look.
        progress: told what is finished.
        keep_going: skip views whose pixels differ from those recorded, and report them, instead of stopping there.
        turn: held around each batch's work on the device, such as a lock that calls in several threads share: while
            one of them computes, the others make their views and write.

    Raises:
        StoreError: another process is writing to one of these shards.
        StoreMismatch: a view's pixels differ from those recorded when another teacher saw it.
        Interrupted: a signal came; everything finished is committed, the same command goes on.
    """
    started = time.perf_counter()
    report = CacheReport()
    trace = Trace(report.busy)
    names = list(teachers)
    device_turn = contextlib.nullcontext() if turn is None else turn
    with device_turn:
        size = choose_batch(batch, teachers, crop_px=store.recipe.crop_px)
    with threads(workers, "views") as pool:
        states = read_states(store, names, set(shards))
        skipped = [row for of in states.values() for row in of.skipped]
        _look_into_tiles(maker, skipped, pool, report, stop=stop)
        mendable = {row for row in skipped if not _in_the_way(maker, row, report)}
        wanted = {k for k, of in states.items() if of.is_missing or not mendable.isdisjoint(of.skipped)}
        looked_at = list(states)
        del states  # which grow with the views
        with store.claim(sorted(wanted)):
            # Read again now that the shards are ours: another process may have finished some in between.
            work = plan_work(read_states(store, names, wanted), mendable)
            keeping = lack_pixels(store, wanted)
            lesson = Lesson(
                store,
                teachers,
                batch=size,
                stop=stop,
                trace=trace,
                turn=device_turn,
            )
            views = made_views(
                work, maker, pool, ahead=2 * (size + workers), trace=trace, keeping=keeping, check=lesson.check
            )
            writer = ShardWriter(store, teachers, report=report, trace=trace, progress=progress)
            try:
                _compute(lesson, batches(views, batch=size, keep_going=keep_going), writer, trace)
            except StoreError as error:
                if not _is_disk_full(error):
                    raise
                rest = plan_work(read_states(store, names, wanted), mendable)
                raise StoreError(f"{error}\n{_what_is_missing(store, rest, wanted, report)}") from error
        for row, reason in report.changed.items():
            log.warning("view %s stays missing: %s", store.describe(row), reason)
        left = [row for of in read_states(store, names, looked_at).values() for row in of.skipped]
        # Another process may have skipped some meanwhile, for reasons not known here.
        _look_into_tiles(maker, [r for r in left if not _in_the_way(maker, r, report)], pool, report, stop=stop)
        report.partners_lost = sum(
            maker.tile(row).id not in report.unreadable for row in left if row not in report.changed
        )
    report.batch = lesson.batch
    report.seconds = time.perf_counter() - started
    return report


def _compute(lesson: Lesson, items: Iterator[Batch | Finished], writer: ShardWriter, trace: Trace) -> None:
    """Shows the batches to their teachers, one after another, while views are made before and shards written after."""
    writing: deque[Future[None]] = deque()
    harvest = Harvest()
    with threads(1, "batches") as ahead, threads(WRITERS, "writer") as pool:
        try:
            for item in run_ahead(lesson.show(items), ahead, ahead=AHEAD, trace=trace):
                if isinstance(item, Shown):
                    lesson.teach(item, harvest)
                    continue
                writing.append(pool.submit(writer.write, item, harvest))
                harvest = Harvest()
                while len(writing) > WRITERS or (writing and writing[0].done()):
                    with trace.span("held"):
                        writing.popleft().result()
                if not item.crcs:
                    lesson.check()  # as `teach` does where there is a view to show
        finally:
            # Also when stopping: what the writers have in hand is finished, so keep it.
            with trace.span("held"):
                wait(writing)
                for one in writing:
                    one.result()


def _is_disk_full(error: BaseException) -> bool:
    """Whether `error` comes from a disk, or a share of one, that is full."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        cause = cause.__cause__
    return False


def _what_is_missing(store: FeatureStore, left: Iterable[Work], shards: Collection[int], report: CacheReport) -> str:
    """How much was committed, and what is `left` of `shards`."""
    views = size = 0
    for item in left:
        views += len(item.pending)
        size += sum(len(rows) * store.teacher(name).bytes_per_view for name, rows in item.due.items())
    # Pixels may be missing of shards whose features are there: they are written after these.
    pixels = without_pixels(store, shards)
    size += sum(len(rows) * store.pixels_of_shard(shard).bytes_per_view for shard, rows in pixels.items())
    bare = f", and the pixels of {sum(map(len, pixels.values())):,}" if pixels else ""
    return (
        f"The disk is full. This run committed {report.views:,} views ({report.bytes_written / 1e6:,.0f} MB); "
        f"{views:,} views are missing{bare}, for which {size / 1e6:,.0f} MB are needed"
    )


def _look_into_tiles(
    maker: ViewMaker, rows: Sequence[int], pool: ThreadPoolExecutor, report: CacheReport, *, stop: StopFlag
) -> None:
    """Reports those tiles behind `rows` that cannot be read at this moment."""

    def look(tile: Tile) -> tuple[str, str | None]:
        return tile.id, None if stop else maker.why_unreadable(tile)

    tiles = {tile.id: tile for row in rows for tile in maker.sources(row)}
    found = dict(pool.map(look, tiles.values()))
    stop.check("stopped; run the same command again to go on")
    report.unreadable.update({tile: reason for tile, reason in found.items() if reason is not None})


def _in_the_way(maker: ViewMaker, row: int, report: CacheReport) -> bool:
    """Whether a tile that `row` comes from is known as unreadable."""
    return any(tile.id in report.unreadable for tile in maker.sources(row))
