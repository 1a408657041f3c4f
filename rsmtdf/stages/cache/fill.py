"""Computing what a store lacks: views from a pool of threads, all teachers on a batch, shards by a writer thread.

A shard is the unit of work and of commit, so a killed run loses at most the shards in flight and goes on where it
stopped. Views that an earlier run had to skip are tried again in every run, at the price of one decoded image per tile
that they come from: only where these open now are the views made. Where a shard lacks single views, skipped or
withdrawn by a repair, only these are made and added to what it holds.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack

import numpy as np

from rsmtdf.signals import StopFlag
from rsmtdf.specs import Teacher, Tile
from rsmtdf.stages.cache.mend import Commit, ShardWriter
from rsmtdf.stages.cache.report import CacheReport
from rsmtdf.stages.cache.teach import teach
from rsmtdf.stages.cache.work import Work, plan_work, read_states
from rsmtdf.store.status import SKIPPED, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.views.maker import UnreadableTile, ViewMaker
from rsmtdf.views.view import View, view_crc

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (views finished, bytes written) after each shard."""


def fill_store(
    store: FeatureStore,
    *,
    teachers: Mapping[str, Teacher],
    maker: ViewMaker,
    batch: int,
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
    lacking = set(store.missing_shards(list(teachers)))
    for name in teachers:
        lacking |= {int(k) for k in np.flatnonzero(state_of(store.status(name)) == SKIPPED) // store.shard_views}
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
    batch: int,
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
        batch: views shown to a teacher at a time.
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
    names = list(teachers)
    device_turn = contextlib.nullcontext() if turn is None else turn
    with (
        ThreadPoolExecutor(max(workers, 1), thread_name_prefix="views") as pool,
        ThreadPoolExecutor(1, thread_name_prefix="writer") as writer,
    ):
        states = read_states(store, names, set(shards))
        skipped = [row for of in states.values() for row in of.skipped]
        _look_into_tiles(maker, skipped, pool, report, stop=stop)
        mendable = {row for row in skipped if not _in_the_way(maker, row, report)}
        wanted = {k for k, of in states.items() if of.is_missing or not mendable.isdisjoint(of.skipped)}
        with ExitStack() as owned:
            owned.enter_context(store.claim(sorted(wanted)))
            shard_writer = owned.enter_context(ShardWriter(store, report))
            # Read again now that the shards are ours: another process may have finished some in between.
            work = plan_work(read_states(store, names, wanted), mendable)
            pending: Future[int] | None = None
            try:
                for item, made in _made(store, work, maker, pool, report, stop=stop):
                    waited = time.perf_counter()
                    views = [(row, future.result()) for row, future in zip(item.rows, made, strict=True)]
                    report.busy["wait"] += time.perf_counter() - waited
                    good, bad = _sorted_out(store, item, views, report, keep_going=keep_going)
                    commits, batch = _computed(item, good, bad, teachers, batch, report, stop, turn=device_turn)
                    if pending is not None:
                        report.bytes_written += pending.result()
                    pending = writer.submit(shard_writer.write, item.shard, commits)
                    report.views += len(good)
                    if progress is not None and item.pending:
                        progress(len(item.pending), report.bytes_written)
            finally:
                # Also when stopping: the shard in the writer's hands is finished, so keep it.
                if pending is not None:
                    report.bytes_written += pending.result()
        left = [row for of in read_states(store, names, states).values() for row in of.skipped]
        # Another process may have skipped some meanwhile, for reasons not known here.
        _look_into_tiles(maker, [r for r in left if not _in_the_way(maker, r, report)], pool, report, stop=stop)
        report.partners_lost = sum(
            maker.tile(row).id not in report.unreadable for row in left if row not in report.changed
        )
    report.seconds = time.perf_counter() - started
    return report


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


def _made(
    store: FeatureStore,
    work: Sequence[Work],
    maker: ViewMaker,
    pool: ThreadPoolExecutor,
    report: CacheReport,
    *,
    stop: StopFlag,
) -> Iterator[tuple[Work, list[Future[View | UnreadableTile]]]]:
    """Shards with the futures of their views, made at most one shard ahead of the one in hand."""
    queue: deque[tuple[Work, list[Future[View | UnreadableTile]]]] = deque()
    for item in work:
        stop.check(f"stopped; run the same command again to go on ({store.path})")
        queue.append((item, _submit(item.rows, maker, pool, report)))
        if len(queue) > 1:
            yield queue.popleft()
    yield from queue


def _submit(
    rows: Sequence[int], maker: ViewMaker, pool: ThreadPoolExecutor, report: CacheReport
) -> list[Future[View | UnreadableTile]]:
    """One future per row; the two rows of a pair come from one task, so each tile is rendered once."""
    futures: dict[int, Future[View | UnreadableTile]] = {row: Future() for row in rows}

    def work(unit: tuple[int, ...]) -> None:
        begun = time.perf_counter()
        try:
            outcome = maker.attempted(unit)
        except BaseException as error:  # noqa: BLE001 (handed to whoever waits for the views)
            for row in unit:
                futures[row].set_exception(error)
            return
        for row, view in zip(unit, outcome, strict=True):
            futures[row].set_result(view)
        report.busy["view"] += time.perf_counter() - begun

    seen: set[int] = set()
    for row in rows:
        if row not in seen:
            unit = tuple(sorted({row, maker.partner(row)} & futures.keys()))
            seen.update(unit)
            pool.submit(work, unit)
    return [futures[row] for row in rows]


def _sorted_out(
    store: FeatureStore,
    item: Work,
    views: Sequence[tuple[int, View | UnreadableTile]],
    report: CacheReport,
    *,
    keep_going: bool,
) -> tuple[dict[int, View], dict[int, str]]:
    """The views of a shard that the teachers are to see, and why the others are missing.

    Without `keep_going`, only what an earlier run skipped is compared here with the recorded pixels: it must not hold
    up the rest. Any other view that differs stops the run when it is committed.
    """
    good = {row: view for row, view in views if isinstance(view, View)}
    errors = {row: view for row, view in views if isinstance(view, UnreadableTile)}
    report.unreadable.update({error.tile: str(error) for error in errors.values()})
    bad = {row: str(error) for row, error in errors.items()}
    for row in [r for r in good if r in item.recorded and (keep_going or r not in item.pending)]:
        expected, found = item.recorded[row], view_crc(good[row])
        if found != expected:
            bad[row] = f"its pixels differ from those that were recorded: checksum {found:08x}, expected {expected:08x}"
            report.changed[row] = bad[row]
            log.warning("view %s stays missing: %s", store.describe(row), bad[row])
            del good[row]
    return good, bad


def _computed(
    item: Work,
    good: Mapping[int, View],
    bad: Mapping[int, str],
    teachers: Mapping[str, Teacher],
    batch: int,
    report: CacheReport,
    stop: StopFlag,
    *,
    turn: AbstractContextManager[object],
) -> tuple[list[Commit], int]:
    """What the teachers say of a shard's views, and the batch size that memory allows."""
    groups: list[tuple[dict[str, Teacher], Mapping[int, View], bool]] = []
    if item.whole:
        groups.append(({name: teachers[name] for name in item.whole}, good, False))
    for name, rows in item.mend.items():
        again = {row: good[row] for row in rows if row in good}
        # What is to do must become skipped at least; what was skipped before may stay as it is.
        if again or item.due[name]:
            groups.append(({name: teachers[name]}, again, True))
    commits = []
    for some, views, mends in groups:
        features, batch = teach(list(views.values()), some, batch, report, stop, turn=turn)
        commits.append(Commit(teachers=some, good=views, bad=bad, features=features, mends=mends))
    return commits, batch
