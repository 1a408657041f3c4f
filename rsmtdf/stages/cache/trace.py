"""Where the time of stage 1 goes: busy seconds of each part, measured while they overlap."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from rsmtdf.specs import Tile, TileReader

PARTS = ("decode", "view", "teacher", "encode", "copy", "write", "wait", "held", "turn")
"""`decode` and `view` are summed over the threads that make views, `copy` and `write` over those that write. The others
belong to the one that computes: it works (`teacher`, `encode`), or stands still for want of views (`wait`), because too
many shards are still to be written (`held`), or while another call has its turn at the device (`turn`)."""


class Trace:
    """Adds up seconds by part, from any number of threads."""

    def __init__(self, busy: dict[str, float]) -> None:
        self._busy, self._lock = busy, threading.Lock()

    def add(self, part: str, seconds: float) -> None:
        with self._lock:
            self._busy[part] = self._busy.get(part, 0.0) + seconds

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """What happens inside belongs to `part`, also if it fails."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - begun)


class TimedReader:
    """A `TileReader` that knows how long each thread has been reading images; waiting for another thread that decodes
    the same scene is part of it.
    """

    def __init__(self, reader: TileReader) -> None:
        self._reader, self._own = reader, threading.local()

    @property
    def seconds(self) -> float:
        """Of the calling thread."""
        return float(getattr(self._own, "seconds", 0.0))

    def read_image(self, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        begun = time.perf_counter()
        try:
            return self._reader.read_image(tile)
        finally:
            self._own.seconds = self.seconds + time.perf_counter() - begun

    def read_label(self, tile: Tile) -> np.ndarray:
        return self._reader.read_label(tile)
