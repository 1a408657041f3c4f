"""Batches of views for training, made ahead by threads and handed out in the order of the schedule.

Every view is placed by its slot in the batch, never by who finished first, so a batch is the same bits whatever the
number of workers. The crc32c of each view that has a cached target is compared with the one stage 1 recorded: a
student is never trained on pixels that the teacher did not see.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsmtdf.errors import StoreMismatch
from rsmtdf.views.kept import KeptViews, views_of
from rsmtdf.views.maker import ViewMaker
from rsmtdf.views.view import View, view_crc

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ViewBatch:
    """One micro-batch of views on the host: m labelled and n unlabelled ones."""

    labelled_rows: np.ndarray
    strong_rows: np.ndarray
    labelled: np.ndarray
    """uint8 [m, c, c, 3]: weak views of labelled tiles."""
    labels: np.ndarray
    """uint8 [m, c, c], 255 ignored."""
    labelled_valid: np.ndarray
    """bool [m, c, c]."""
    weak: np.ndarray
    """uint8 [n, c, c, 3]: the geometry of each strong view alone."""
    strong: np.ndarray
    """uint8 [n, c, c, 3], after CutMix."""
    valid: np.ndarray
    """bool [n, c, c], before CutMix."""
    partner: np.ndarray
    """int64 [n]: position in this batch of the view each box comes from."""
    box: np.ndarray
    """int64 [n, 4]: y, x, h, w; h = 0 where nothing is pasted."""


class PixelCheck:
    """Compares views with the crc that stage 1 recorded.

    Args:
        expected: uint32 [rows].
        strict: raise at the first difference; otherwise warn once and count.
    """

    def __init__(self, expected: np.ndarray, *, strict: bool, where: str) -> None:
        self._expected, self._strict, self._where = expected, strict, where
        self.differing: set[int] = set()

    def __call__(self, row: int, view: View, tile_id: str) -> None:
        found = view_crc(view)
        if found == int(self._expected[row]):
            return
        message = (
            f"view {row} (tile {tile_id}) has other pixels than the teachers saw: crc {found:#010x}, "
            f"{self._where} recorded {int(self._expected[row]):#010x}. Likely causes: the image was changed, or "
            f"another version of Pillow or of the JPEG decoder reads it. Restore the image or the library version "
            f"(rsmtdf cache info shows it), make a new store, or accept the difference with "
            f"--set train.pixel_mismatch=warn"
        )
        if self._strict:
            raise StoreMismatch(message)
        if not self.differing:
            log.warning("%s", message)
        self.differing.add(row)


class BatchMaker:
    """Makes `ViewBatch`es from rows, `ahead` of them in the background.

    Args:
        maker: makes single views.
        check: called for every view that has a target; None: nothing is compared.
        workers: threads (decoding and resampling release the interpreter lock).
        ahead: batches in the making besides the one in hand.
        kept: stored views, read in place of being made where they are there; None: all are made.
    """

    def __init__(
        self,
        *,
        maker: ViewMaker,
        check: PixelCheck | None,
        workers: int,
        ahead: int = 2,
        kept: KeptViews | None = None,
    ) -> None:
        self._maker, self._check, self._ahead, self._kept = maker, check, ahead, kept
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="views")
        self.wait_seconds = 0.0
        """Time that `batches` spent waiting for views."""

    def batches(self, rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[ViewBatch]:
        """The batch of each (labelled rows, strong rows), in order."""
        queue: deque[tuple[np.ndarray, np.ndarray, list[Future[Any]], list[Future[Any]]]] = deque()
        try:
            for labelled, strong in rows:
                labelled_jobs = [self._pool.submit(self._labelled, int(r)) for r in labelled]
                strong_jobs = [self._pool.submit(self._strong, unit) for unit in _units(strong, self._maker)]
                queue.append((labelled, strong, labelled_jobs, strong_jobs))
                if len(queue) > self._ahead:
                    yield self._collect(*queue.popleft())
            while queue:
                yield self._collect(*queue.popleft())
        finally:
            for pending in queue:
                for job in pending[2] + pending[3]:
                    job.cancel()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _labelled(self, row: int) -> tuple[View, np.ndarray]:
        is_kept = self._kept is not None and self._kept.has([row])
        view = self._views([row])[0][1] if is_kept else self._maker.mixed([row])[0]
        if self._check is not None:
            self._check(row, view, self._maker.tile(row).id)
        return view, self._maker.label_in(row, view.valid) if is_kept else self._maker.label(row)

    def _strong(self, unit: Sequence[int]) -> list[tuple[View, View]]:
        """(weak, strong) of each row of a CutMix pair."""
        views = self._views(unit)
        if self._check is not None:
            for row, (_, mixed) in zip(unit, views, strict=True):
                self._check(row, mixed, self._maker.tile(row).id)
        return views

    def _views(self, rows: Sequence[int]) -> list[tuple[View, View]]:
        """(geometry alone, finished view) of each row, stored or made."""
        if self._kept is not None and self._kept.has(rows):
            return views_of(rows, self._kept.read(rows), self._maker)
        return self._maker.weak_and_mixed(rows)

    def _collect(
        self,
        labelled_rows: np.ndarray,
        strong_rows: np.ndarray,
        labelled_jobs: Sequence[Future[Any]],
        strong_jobs: Sequence[Future[Any]],
    ) -> ViewBatch:
        begun = time.perf_counter()
        labelled = [job.result() for job in labelled_jobs]
        pairs = [pair for job in strong_jobs for pair in job.result()]
        self.wait_seconds += time.perf_counter() - begun
        slot = {int(row): i for i, row in enumerate(strong_rows)}
        partner = [slot[self._maker.partner(int(row))] for row in strong_rows]
        return ViewBatch(
            labelled_rows=labelled_rows,
            strong_rows=strong_rows,
            labelled=np.stack([view.pixels for view, _ in labelled]),
            labels=np.stack([label for _, label in labelled]),
            labelled_valid=np.stack([view.valid for view, _ in labelled]),
            weak=np.stack([weak.pixels for weak, _ in pairs]),
            strong=np.stack([strong.pixels for _, strong in pairs]),
            valid=np.stack([weak.valid for weak, _ in pairs]),
            partner=np.array(partner, dtype=np.int64),
            box=np.array([self._maker.box(int(row)) for row in strong_rows], dtype=np.int64),
        )


def _units(rows: np.ndarray, maker: ViewMaker) -> list[tuple[int, ...]]:
    """The rows as CutMix pairs (adjacent) and single views."""
    units: list[tuple[int, ...]] = []
    i = 0
    while i < len(rows):
        row = int(rows[i])
        if i + 1 < len(rows) and maker.partner(row) == int(rows[i + 1]) != row:
            units.append((row, int(rows[i + 1])))
            i += 2
        else:
            units.append((row,))
            i += 1
    return units
