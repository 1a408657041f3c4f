"""Views for the teachers, made ahead: in a pool of threads, across batches and shards, bounded by views.

A shard is shown to teachers in the same batches whoever computes it and whatever was made ahead: its good views, in
the order of their rows, so many at a time.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np

from rsmtdf.stages.cache.trace import TimedReader, Trace
from rsmtdf.stages.cache.work import Work
from rsmtdf.views.kept import kept_of
from rsmtdf.views.maker import UnreadableTile, ViewMaker
from rsmtdf.views.view import View, view_crc

AHEAD = 2
"""Batches that are made and sent to the device before the one in hand is computed."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MadeView:
    """A view, and the checksum of its pixels and validity."""

    view: View
    crc: int
    kept: Mapping[str, np.ndarray] | None = None
    """What is stored of it; None where the store keeps no pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Views of one shard that some teachers are to see."""

    names: Sequence[str]
    rows: Sequence[int]
    views: Sequence[View]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A shard whose views have all been made and handed out."""

    work: Work
    crcs: dict[int, int] = field(default_factory=dict)
    """Row -> checksum of its pixels, of the views that were made."""
    kept: dict[int, Mapping[str, np.ndarray]] = field(default_factory=dict)
    """Row -> what is stored of the view, where the store keeps pixels."""
    bad: dict[int, str] = field(default_factory=dict)
    """Row -> why it is missing."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Tile id -> why it cannot be read."""
    changed: dict[int, str] = field(default_factory=dict)
    """Row -> how its pixels differ from those recorded."""


Made = tuple[Work, int, MadeView | UnreadableTile]
"""A view of a shard by its row, or what stands in its way."""


@contextmanager
def threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that drops what it has not begun when the work ends, by an error too."""
    pool = ThreadPoolExecutor(max(count, 1), thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_ahead(items: Iterator[T], pool: ThreadPoolExecutor, *, ahead: int, trace: Trace) -> Iterator[T]:
    """`items` in their order, each taken in the one thread of `pool`, up to `ahead` of them before they are asked for.

    What the caller waits for them is the trace's `wait`.
    """
    end = object()

    def take() -> object:
        return next(items, end)

    queue = deque(pool.submit(take) for _ in range(ahead))
    while queue:
        with trace.span("wait"):
            found = queue.popleft().result()
        if found is end:
            return
        queue.append(pool.submit(take))
        yield cast("T", found)


def made_views(
    work: Iterable[Work],
    maker: ViewMaker,
    pool: ThreadPoolExecutor,
    *,
    ahead: int,
    trace: Trace,
    keeping: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Made]:
    """Every view of `work` in order, at most `ahead` of them begun before they are taken.

    The two views of a pair come from one task, so each tile is rendered once. With `keeping`, each comes with what is
    stored of it. What `check` raises, before any view is made, comes in place of it.
    """
    clock = TimedReader(maker.reader)
    timed = maker.reading_through(clock)

    def make(unit: Sequence[int], futures: Sequence[Future[MadeView | UnreadableTile]]) -> None:
        begun, read = time.perf_counter(), clock.seconds
        try:
            check()
            made = _kept(timed, unit) if keeping else _made(timed, unit)
        except BaseException as error:  # noqa: BLE001 (handed to whoever waits for the views)
            for future in futures:
                future.set_exception(error)
            return
        for future, view in zip(futures, made, strict=True):
            future.set_result(view)
        decoding = clock.seconds - read
        trace.add("decode", decoding)
        trace.add("view", time.perf_counter() - begun - decoding)

    def begun() -> Iterator[tuple[Work, int, Future[MadeView | UnreadableTile]]]:
        for item in work:
            rows, futures = set(item.rows), dict[int, Future[MadeView | UnreadableTile]]()
            for row in item.rows:
                if row not in futures:
                    unit = sorted({row, maker.partner(row)} & rows)
                    futures |= {r: Future() for r in unit}
                    pool.submit(make, unit, [futures[r] for r in unit])
                yield item, row, futures[row]

    source, queue = begun(), deque[tuple[Work, int, Future[MadeView | UnreadableTile]]]()
    while True:
        queue.extend(itertools.islice(source, ahead - len(queue)))
        if not queue:
            return
        item, row, future = queue.popleft()
        yield item, row, future.result()


def _made(maker: ViewMaker, unit: Sequence[int]) -> list[MadeView | UnreadableTile]:
    return [v if isinstance(v, UnreadableTile) else MadeView(v, view_crc(v)) for v in maker.attempted(unit)]


def _kept(maker: ViewMaker, unit: Sequence[int]) -> list[MadeView | UnreadableTile]:
    return [
        both if isinstance(both, UnreadableTile) else MadeView(both[1], view_crc(both[1]), kept_of(*both))
        for both in maker.weak_and_attempted(unit)
    ]


def batches(views: Iterable[Made], *, batch: int, keep_going: bool) -> Iterator[Batch | Finished]:
    """What is to be shown to which teachers, and after the last batch of each shard, that it is finished.

    Without `keep_going`, only what an earlier run skipped is compared here with the recorded pixels: it must not hold
    up the rest. Any other view that differs stops the run when it is committed.
    """
    for _, group in itertools.groupby(views, key=lambda made: made[0].shard):
        done: Finished | None = None
        groups: list[_Group] = []
        for work, row, made in group:
            if done is None:
                done, groups = Finished(work=work), _groups(work)
            if isinstance(made, UnreadableTile):
                done.bad[row] = done.unreadable[made.tile] = str(made)
                continue
            if changed := _changed(work, row, made.crc, keep_going=keep_going):
                done.bad[row] = done.changed[row] = changed
                continue
            done.crcs[row] = made.crc
            if made.kept is not None:
                done.kept[row] = made.kept
            for of in groups:
                if of.wants(row):
                    of.rows.append(row)
                    of.views.append(made.view)
                    if len(of.rows) == batch:
                        yield of.taken()
        yield from (of.taken() for of in groups if of.rows)
        if done is not None:
            yield done


@dataclass
class _Group:
    """Teachers that see the same views of a shard."""

    names: Sequence[str]
    wants: Callable[[int], bool]
    rows: list[int] = field(default_factory=list)
    views: list[View] = field(default_factory=list)

    def taken(self) -> Batch:
        batch = Batch(names=self.names, rows=self.rows, views=self.views)
        self.rows, self.views = [], []
        return batch


def _groups(work: Work) -> list[_Group]:
    groups = [_Group(names=work.whole, wants=lambda row: True)] if work.whole else []
    mended: Mapping[str, frozenset[int]] = {name: frozenset(rows) for name, rows in work.mend.items()}
    return groups + [_Group(names=[name], wants=rows.__contains__) for name, rows in mended.items()]


def _changed(work: Work, row: int, crc: int, *, keep_going: bool) -> str | None:
    """How the pixels of a view differ from those recorded, where it is not for the commit to say so."""
    expected = work.recorded.get(row)
    if expected in (None, crc) or not (keep_going or row not in work.pending):
        return None
    return f"its pixels differ from those that were recorded: checksum {crc:08x}, expected {expected:08x}"
