"""Computing what a store lacks: views from a pool of threads, all teachers on a batch, whole shards by a writer thread.

A shard is the unit of work and of commit, so a killed run loses at most the shards in flight and goes on where it
stopped.
"""

from __future__ import annotations

import logging
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rsmtdf.errors import DatasetError, StoreMismatch
from rsmtdf.keyed import Draws
from rsmtdf.signals import StopFlag
from rsmtdf.specs import Teacher
from rsmtdf.store.statistics import ChannelStatistics
from rsmtdf.store.store import FeatureStore
from rsmtdf.views.maker import ViewMaker
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
    bytes_written: int = 0
    seconds: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)
    """Tile id -> why its views (and its partners') are missing."""
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
            "skipped": self.skipped,
            "busy_seconds": {k: round(v, 3) for k, v in self.busy.items()},
        }


def add_teachers(
    store: FeatureStore, *, teachers: Mapping[str, Teacher], maker: ViewMaker, codec: str, batch: int, stop: StopFlag
) -> None:
    """Makes room for each teacher, with channel statistics over a keyed sample of at most 256 views.

    One process measures while others wait; a teacher that the store has already must have the same identity.

    Raises:
        StoreMismatch: the store's teacher of that name differs (each field, expected and found).
        DatasetError: not one tile of the sample can be read.
    """
    with store.locked():
        store.refresh()
        for name, teacher in teachers.items():
            if name in store.teachers:
                store.expect_teacher(teacher.spec, codec, rule=STATISTICS_RULE)
                continue
            statistics = _measure(store, name, teacher, maker=maker, batch=batch, stop=stop)
            store.add_teacher(teacher.spec, codec=codec, statistics=statistics, rule=STATISTICS_RULE)


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
    """Computes and commits every missing shard (of `shards`, or of the store), each teacher where it is missing.

    Raises:
        StoreError: another process is writing to one of these shards.
        StoreMismatch: a view's pixels differ from those recorded when another teacher saw it.
        Interrupted: a signal came; everything finished is committed, the same command goes on.
    """
    started = time.perf_counter()
    report = CacheReport()
    wanted = set(store.missing_shards(list(teachers))) & set(range(store.n_shards) if shards is None else shards)
    store.clean_partials()
    with (
        store.claim(sorted(wanted)),
        ThreadPoolExecutor(max(workers, 1), thread_name_prefix="views") as pool,
        ThreadPoolExecutor(1, thread_name_prefix="writer") as writer,
    ):
        # Read again now that the shards are ours: another process may have finished some in between.
        missing = {k: names for k, names in store.missing_teachers(list(teachers)).items() if k in wanted}
        pending: Future[int] | None = None
        try:
            for shard, rows, made in _made_shards(store, sorted(missing), maker, pool, report, stop=stop):
                waited = time.perf_counter()
                views = [(row, future.result()) for row, future in zip(rows, made, strict=True)]
                report.busy["wait"] += time.perf_counter() - waited
                good = {row: view for row, view in views if isinstance(view, View)}
                bad = {row: view for row, view in views if isinstance(view, str)}
                for row, reason in bad.items():
                    report.skipped[maker.tile(row).id] = reason
                lacking = {name: teachers[name] for name in missing[shard]}
                features, batch = _teach(list(good.values()), lacking, batch, report, stop)
                if pending is not None:
                    report.bytes_written += pending.result()
                pending = writer.submit(_write, store, shard, good, bad, features, lacking, report)
                report.views += len(rows)
                if progress is not None:
                    progress(len(rows), report.bytes_written)
        finally:
            # Also when stopping: the shard in the writer's hands is finished, so keep it.
            if pending is not None:
                report.bytes_written += pending.result()
    store.seal()
    report.seconds = time.perf_counter() - started
    return report


def _made_shards(
    store: FeatureStore,
    todo: Sequence[int],
    maker: ViewMaker,
    pool: ThreadPoolExecutor,
    report: CacheReport,
    *,
    stop: StopFlag,
) -> Iterator[tuple[int, list[int], list[Future[View | str]]]]:
    """Shards with the futures of their views, made at most one shard ahead of the one in hand."""
    queue: deque[tuple[int, list[int], list[Future[View | str]]]] = deque()
    for shard in todo:
        stop.check(f"stopped; run the same command again to go on ({store.path})")
        rows = [int(r) for r in store.rows_of_shard(shard)]
        queue.append((shard, rows, _submit(rows, maker, pool, report)))
        if len(queue) > 1:
            yield queue.popleft()
    yield from queue


def _submit(
    rows: Sequence[int], maker: ViewMaker, pool: ThreadPoolExecutor, report: CacheReport
) -> list[Future[View | str]]:
    """One future per row; the two rows of a pair come from one task, so each tile is rendered once."""
    futures: dict[int, Future[View | str]] = {row: Future() for row in rows}

    def work(unit: tuple[int, ...]) -> None:
        begun = time.perf_counter()
        outcome: list[View | str]
        try:
            outcome = list(maker.mixed(unit))
        except DatasetError as error:
            outcome = [str(error)] * len(unit)
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
            unit = tuple(sorted({row, maker.partner(row)} & set(rows)))
            seen.update(unit)
            pool.submit(work, unit)
    return [futures[row] for row in rows]


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


def _write(
    store: FeatureStore,
    shard: int,
    good: Mapping[int, View],
    bad: Mapping[int, str],
    features: Mapping[str, torch.Tensor],
    teachers: Mapping[str, Teacher],
    report: CacheReport,
) -> int:
    begun = time.perf_counter()
    provenance = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": {name: str(_device_of(t)) for name, t in teachers.items()},
    }
    crcs = {row: view_crc(view) for row, view in good.items()}
    try:
        return store.write_shard(shard, view_crcs=crcs, skipped=bad, features=features, provenance=provenance)
    except StoreMismatch as error:
        raise StoreMismatch(
            f"{error}\nThe pixels of a view are no longer those that another teacher saw: an image, an image library "
            f"(Pillow, GDAL's JPEG decoder) or the machine has changed since; see docs/store-format.md"
        ) from error
    finally:
        report.busy["write"] += time.perf_counter() - begun


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
