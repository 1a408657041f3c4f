"""Computing what a store lacks: views from a pool of threads, all teachers on a batch, whole shards by a writer thread.

A shard is the unit of work and of commit, so a killed run loses at most the shards in flight and goes on where it
stopped. Views that an earlier run had to skip are tried again in every run, at the price of one decoded image per tile
that they come from: only where these open now are the views made, and added to what their shard holds already.
"""

from __future__ import annotations

import logging
import platform
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rsmtdf.errors import DatasetError, StoreMismatch
from rsmtdf.keyed import Draws
from rsmtdf.signals import StopFlag
from rsmtdf.specs import Teacher, Tile
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.statistics import ChannelStatistics
from rsmtdf.store.status import DONE, SKIPPED, crc_of, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import StoredTeacher
from rsmtdf.views.maker import UnreadableTile, ViewMaker
from rsmtdf.views.view import View, view_crc

log = logging.getLogger(__name__)

STATISTICS_VIEWS = 256
STATISTICS_RULE = {
    "kind": "welford",
    "views": STATISTICS_VIEWS,
    "sample": "keyed by the store's identity",
    "version": 1,
}
"""Part of a stored teacher's identity (design, section 4)."""
Progress = Callable[[int, int], None]
"""Called with (views finished, bytes written) after each shard."""


@dataclass
class CacheReport:
    """How stage 1 went. Seconds are busy time: `view` summed over threads, the others over the one that does them."""

    views: int = 0
    """Views whose features were computed."""
    bytes_written: int = 0
    seconds: float = 0.0
    unreadable: dict[str, str] = field(default_factory=dict)
    """Tile id -> why it cannot be read; its views are missing, those that earlier runs skipped included."""
    partners_lost: int = 0
    """Views of tiles that can be read which are missing because their CutMix partner cannot."""
    busy: dict[str, float] = field(default_factory=lambda: {"view": 0.0, "teacher": 0.0, "write": 0.0, "wait": 0.0})

    def limited_by(self, workers: int) -> str:
        """The part that took the longest: teachers, views (per worker) or writing."""
        shares = {
            "teachers": self.busy["teacher"],
            "views": self.busy["view"] / max(workers, 1),
            "writing": self.busy["write"],
        }
        return max(shares, key=lambda k: shares[k])

    def as_dict(self) -> dict[str, Any]:
        rate = self.views / self.seconds if self.seconds else 0.0
        return {
            "views": self.views,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "views_per_second": round(rate, 3),
            "unreadable_tiles": self.unreadable,
            "partners_lost": self.partners_lost,
            "busy_seconds": {k: round(v, 3) for k, v in self.busy.items()},
        }


def add_teachers(
    store: FeatureStore,
    *,
    teachers: Mapping[str, Teacher],
    maker: ViewMaker,
    codec: str,
    batch: int,
    stop: StopFlag,
    siblings: Mapping[str, StoredTeacher] | None = None,
) -> None:
    """Makes room for each teacher, with channel statistics over a keyed sample of at most 256 views.

    One process measures while others wait; a teacher that the store has already must have the same identity. Of
    `siblings`, another store's teachers, statistics and their rule are taken over instead.

    Raises:
        StoreMismatch: the store's teacher of that name differs (each field, expected and found).
        DatasetError: not one tile of the sample can be read.
    """
    with store.locked():
        store.refresh()
        for name, teacher in teachers.items():
            sibling = (siblings or {}).get(name)
            rule = STATISTICS_RULE if sibling is None else sibling.statistics.get("rule", {})
            if name in store.teachers:
                store.expect_teacher(teacher.spec, codec, rule=rule)
                continue
            statistics = sibling or _measure(store, name, teacher, maker=maker, batch=batch, stop=stop)
            store.add_teacher(teacher.spec, codec=codec, statistics=statistics, rule=rule)


def _measure(
    store: FeatureStore, name: str, teacher: Teacher, *, maker: ViewMaker, batch: int, stop: StopFlag
) -> ChannelStatistics:
    sample = _statistics_rows(store)
    log.info("%s: channel statistics over %d views", name, len(sample))
    statistics = ChannelStatistics(teacher.spec.dim)
    for start in range(0, len(sample), batch):
        stop.check(f"stopped; nothing of {name} is stored yet, run the same command again")
        views = [v for row in sample[start : start + batch] for v in _if_readable(maker, int(row))]
        if views:
            statistics.update(teacher(_pixels(views, _device_of(teacher))))
    if not statistics.views:
        raise DatasetError(f"none of {len(sample)} sampled tiles of {store.data_root} can be read")
    return statistics


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
) -> CacheReport:
    """Computes and commits every missing view (of `shards`, or of the store), each teacher where it is missing.

    Raises:
        StoreError: another process is writing to one of these shards.
        StoreMismatch: a view's pixels differ from those recorded when another teacher saw it.
        Interrupted: a signal came; everything finished is committed, the same command goes on.
    """
    started = time.perf_counter()
    report = CacheReport()
    within = set(range(store.n_shards) if shards is None else shards)
    store.clean_partials()
    with (
        ThreadPoolExecutor(max(workers, 1), thread_name_prefix="views") as pool,
        ThreadPoolExecutor(1, thread_name_prefix="writer") as writer,
    ):
        skipped = _skipped_rows(store, teachers, within)
        _look_into_tiles(maker, skipped, pool, report, stop=stop)
        mendable = {row for row in skipped if not _in_the_way(maker, row, report)}
        wanted = set(store.missing_shards(list(teachers))) & within | {row // store.shard_views for row in mendable}
        with store.claim(sorted(wanted)):
            # Read again now that the shards are ours: another process may have finished some in between.
            work = _work(store, teachers, wanted, mendable)
            pending: Future[int] | None = None
            try:
                for item, made in _made(store, work, maker, pool, report, stop=stop):
                    waited = time.perf_counter()
                    views = [(row, future.result()) for row, future in zip(item.rows, made, strict=True)]
                    report.busy["wait"] += time.perf_counter() - waited
                    good = {row: view for row, view in views if isinstance(view, View)}
                    bad = {row: view for row, view in views if isinstance(view, UnreadableTile)}
                    report.unreadable.update({error.tile: str(error) for error in bad.values()})
                    commits, batch = _computed(item, good, bad, teachers, batch, report, stop)
                    if pending is not None:
                        report.bytes_written += pending.result()
                    pending = writer.submit(_write, store, item.shard, commits, report)
                    report.views += len(good)
                    if progress is not None and item.whole:
                        progress(len(item.rows), report.bytes_written)
            finally:
                # Also when stopping: the shard in the writer's hands is finished, so keep it.
                if pending is not None:
                    report.bytes_written += pending.result()
        left = _skipped_rows(store, teachers, within)
        # Another process may have skipped some meanwhile, for reasons not known here.
        _look_into_tiles(maker, [r for r in left if not _in_the_way(maker, r, report)], pool, report, stop=stop)
        report.partners_lost = sum(maker.tile(row).id not in report.unreadable for row in left)
    store.seal()
    report.seconds = time.perf_counter() - started
    return report


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What one shard lacks."""

    shard: int
    rows: Sequence[int]
    """The views to make."""
    whole: Sequence[str]
    """Teachers that have nothing of the shard."""
    mend: Mapping[str, Sequence[int]]
    """Teachers that have the shard without some views -> these, to be tried again."""


@dataclass(frozen=True, kw_only=True)
class _Commit:
    """New features of one shard, for some teachers."""

    teachers: Mapping[str, Teacher]
    good: Mapping[int, View]
    bad: Mapping[int, str]
    features: Mapping[str, torch.Tensor]
    """Of the good views."""
    mends: bool
    """The shard keeps the views that it has; otherwise these are all."""


def _skipped_rows(store: FeatureStore, teachers: Iterable[str], shards: Collection[int]) -> list[int]:
    """The rows of `shards` that were skipped for one of `teachers`, ascending."""
    skipped = np.zeros(store.n_rows, bool)
    for name in teachers:
        skipped |= state_of(store.status(name)) == SKIPPED
    return [row for row in np.flatnonzero(skipped).tolist() if row // store.shard_views in shards]


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


def _work(
    store: FeatureStore, teachers: Collection[str], shards: Collection[int], mendable: Collection[int]
) -> list[_Work]:
    missing = store.missing_teachers(list(teachers))
    skipped = {name: set(_skipped_rows(store, [name], shards)) for name in teachers}
    work = []
    for shard in sorted(shards):
        whole = missing.get(shard, [])
        rows = [int(row) for row in store.rows_of_shard(shard)]
        # Where the shard is computed for another teacher, all its views are made anyway.
        tried = rows if whole else [row for row in rows if row in mendable]
        mend = {name: again for name in teachers if name not in whole and (again := skipped[name].intersection(tried))}
        rows = rows if whole else sorted(set().union(*mend.values()))
        if rows:
            work.append(
                _Work(shard=shard, rows=rows, whole=whole, mend={name: sorted(again) for name, again in mend.items()})
            )
    return work


def _made(
    store: FeatureStore,
    work: Sequence[_Work],
    maker: ViewMaker,
    pool: ThreadPoolExecutor,
    report: CacheReport,
    *,
    stop: StopFlag,
) -> Iterator[tuple[_Work, list[Future[View | UnreadableTile]]]]:
    """Shards with the futures of their views, made at most one shard ahead of the one in hand."""
    queue: deque[tuple[_Work, list[Future[View | UnreadableTile]]]] = deque()
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


def _computed(
    item: _Work,
    good: Mapping[int, View],
    bad: Mapping[int, UnreadableTile],
    teachers: Mapping[str, Teacher],
    batch: int,
    report: CacheReport,
    stop: StopFlag,
) -> tuple[list[_Commit], int]:
    """What the teachers say of a shard's views, and the batch size that memory allows."""
    reasons = {row: str(error) for row, error in bad.items()}
    commits = []
    groups: list[tuple[dict[str, Teacher], Mapping[int, View], bool]] = []
    if item.whole:
        groups.append(({name: teachers[name] for name in item.whole}, good, False))
    for name, rows in item.mend.items():
        if again := {row: good[row] for row in rows if row in good}:
            groups.append(({name: teachers[name]}, again, True))
    for some, views, mends in groups:
        features, batch = _teach(list(views.values()), some, batch, report, stop)
        commits.append(_Commit(teachers=some, good=views, bad=reasons, features=features, mends=mends))
    return commits, batch


def _teach(
    views: Sequence[View], teachers: Mapping[str, Teacher], batch: int, report: CacheReport, stop: StopFlag
) -> tuple[dict[str, torch.Tensor], int]:
    """Teacher -> tokens float32 [views, tokens, dim] on the CPU; the batch size is halved when memory runs out."""
    begun = time.perf_counter()
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in teachers}
    start = 0
    while start < len(views):
        stop.check("stopped; run the same command again to go on")
        chunk = views[start : start + batch]
        try:
            step = {name: teacher(_pixels(chunk, _device_of(teacher))).cpu() for name, teacher in teachers.items()}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch = max(batch // 2, 1)
            log.warning("out of memory: going on with batches of %d", batch)
            continue
        for name, tokens in step.items():
            parts[name].append(tokens)
        start += len(chunk)
    report.busy["teacher"] += time.perf_counter() - begun
    # A shard whose tiles are all unreadable has no features, and is committed as skipped all the same.
    empty = {name: torch.empty(0, t.spec.tokens, t.spec.dim) for name, t in teachers.items()}
    return {name: torch.cat(tokens) if tokens else empty[name] for name, tokens in parts.items()}, batch


def _write(store: FeatureStore, shard: int, commits: Sequence[_Commit], report: CacheReport) -> int:
    begun = time.perf_counter()
    try:
        return sum(_write_mended(store, shard, c) if c.mends else _write_whole(store, shard, c) for c in commits)
    except StoreMismatch as error:
        raise StoreMismatch(
            f"{error}\nThe pixels of a view are no longer those that another teacher saw: an image, an image library "
            f"(Pillow, GDAL's JPEG decoder) or the machine has changed since; see docs/store-format.md"
        ) from error
    finally:
        report.busy["write"] += time.perf_counter() - begun


def _write_whole(store: FeatureStore, shard: int, commit: _Commit) -> int:
    crcs = {row: view_crc(view) for row, view in commit.good.items()}
    return store.write_shard(
        shard, view_crcs=crcs, skipped=commit.bad, features=commit.features, provenance=_provenance(commit)
    )


def _write_mended(store: FeatureStore, shard: int, commit: _Commit) -> int:
    """Adds views to a shard that has others: these are kept as they are stored, byte for byte."""
    (name,) = commit.features
    teacher, first = store.teacher(name), shard * store.shard_views
    kept = first + np.flatnonzero(state_of(teacher.status.read_shard(shard)) == DONE)
    seen = crc_of(store.view_status_array.read_shard(shard))
    with FeatureReader(store, name) as reader:
        old = reader.get_many(kept)
    new = teacher.encode(commit.features[name], rows=list(commit.good))
    order = np.argsort(np.concatenate([kept, np.array(list(commit.good), np.int64)]))
    crcs = {int(row): int(seen[row - first]) for row in kept} | {r: view_crc(v) for r, v in commit.good.items()}
    absent = [int(row) for row in store.rows_of_shard(shard) if int(row) not in crcs]
    return store.write_shard(
        shard,
        view_crcs=crcs,
        skipped={row: commit.bad.get(row, "could not be read before, nor now") for row in absent},
        features={name: {key: np.concatenate([old[key], new[key].cpu().numpy()])[order] for key in old}},
        provenance=_provenance(commit) | {"added_later": sorted(commit.good)},
    )


def _provenance(commit: _Commit) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": {name: str(_device_of(t)) for name, t in commit.teachers.items()},
    }


def _statistics_rows(store: FeatureStore) -> np.ndarray:
    """A keyed sample of the rows, ascending."""
    rows = np.concatenate([np.arange(s.row_start, s.row_stop) for s in store.segments])
    return np.sort(rows[Draws("statistics", store.identity).permutation(len(rows))[:STATISTICS_VIEWS]])


def _if_readable(maker: ViewMaker, row: int) -> list[View]:
    """The view of `row`, or nothing: a tile that does not open is reported when its shard is made."""
    try:
        return maker.mixed([row])
    except DatasetError:
        return []


def _pixels(views: Sequence[View], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.stack([v.pixels for v in views])).to(device)


def _device_of(teacher: Teacher) -> torch.device:
    return getattr(teacher, "device", torch.device("cpu"))
