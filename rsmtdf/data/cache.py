"""Decoded scenes, kept while they fit: the four tiles of one PNG decode it once."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoded scene, or a window of one."""

    data: np.ndarray
    """RGB uint8 [h, w, 3], or class indices uint8 [h, w]."""
    valid: np.ndarray | None = None
    """bool [h, w]; None where every pixel is valid."""

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.valid is None else self.valid.nbytes)


class SceneCache:
    """A least-recently-used store of decoded arrays, bounded in bytes, safe for threads.

    Two threads that want one scene decode it once. Pickling and forking leave the content behind: a copy starts
    empty, because another process's locks may be held and its arrays are better decoded where they are used.
    """

    def __init__(self, *, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._reset()

    def get(self, key: str, load: Callable[[], Decoded]) -> Decoded:
        """What `load` decodes for `key`, unless it is kept already. It is shared: its arrays are read-only."""
        if self._pid != os.getpid():
            self._reset()
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key]
            busy = self._busy.setdefault(key, threading.Lock())
        with busy:
            with self._lock:
                if key in self._items:
                    return self._items[key]
            try:
                decoded = load()
                self._keep(key, decoded)
            finally:
                with self._lock:
                    self._busy.pop(key, None)
            return decoded

    @property
    def used_bytes(self) -> int:
        return self._used

    def _keep(self, key: str, decoded: Decoded) -> None:
        size = decoded.nbytes
        if size > self.budget_bytes:
            return
        for array in (decoded.data, decoded.valid):
            if array is not None:
                array.flags.writeable = False
        with self._lock:
            if key in self._items:
                return
            self._items[key] = decoded
            self._used += size
            while self._used > self.budget_bytes:
                _, old = self._items.popitem(last=False)
                self._used -= old.nbytes

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._busy: dict[str, threading.Lock] = {}
        self._items: OrderedDict[str, Decoded] = OrderedDict()
        self._used = 0

    def __getstate__(self) -> dict[str, int]:
        return {"budget_bytes": self.budget_bytes}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.budget_bytes = state["budget_bytes"]
        self._reset()
