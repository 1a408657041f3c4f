"""`CachedFeatures`: training's distillation targets out of a store, verified, on the device.

Views are read by threads of this process into reused (for accelerators: pinned) buffers, each view at its place in
the batch whatever the order of completion. DataLoader workers are not used for it: their transport is ten times
slower than the file (reference/store_measurements, section 4). Who knows the coming batches asks for a `stream`, which
reads them ahead.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch

from rsmtdf.errors import StoreIncomplete
from rsmtdf.specs import FeatureSpec
from rsmtdf.store.codecs import EncodedArray
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.shards import OpenShards
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.workshare import WorkShare

Targets = dict[str, torch.Tensor]

DISK_THREADS = 4
"""At most, and no more than cores: two of them outrun most disks."""
OBJECT_THREADS = 16
"""They wait for round trips, not for cores."""


class CachedFeatures:
    """A `FeatureSource` over a store. Use it as a context manager, or `close` it.

    The status words are read once, here: views committed later are not seen.
    """

    def __init__(
        self,
        store: FeatureStore,
        teachers: Sequence[str],
        *,
        device: torch.device | str,
        threads: int | None = None,
        verify: bool = True,
        rows: np.ndarray | None = None,
        whole: np.ndarray | None = None,
        force_zarr: bool = False,
    ) -> None:
        """Opens the features of `teachers`.

        Args:
            store: where they are.
            teachers: names in it.
            device: where targets are wanted.
            threads: that read, for all teachers together; None: as many as cores, at most DISK_THREADS; in object
                storage OBJECT_THREADS.
            verify: check every byte read against the checksums beside it and in the status.
            rows: the views that will be asked for; None: not checked here.
            whole: views whose shards will be wanted whole soon after one of them, and are read ahead; None: none.
            force_zarr: read through zarr-python even where the fast path would do.

        Raises:
            StoreIncomplete: a teacher is not there, or some of `rows` are not done.
            StoreCorrupt: status words or metadata are damaged.
            StoreError: the features cannot be reached.
        """
        self._store = store
        self._device = torch.device(device)
        self._threads = _default_threads(store.path) if threads is None else threads
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="features")
        self._files = OpenShards()
        ahead = None
        if whole is not None:
            ahead = np.zeros(store.n_shards, bool)
            ahead[whole // store.shard_views] = True
        self._readers = {
            name: FeatureReader(store, name, verify=verify, force_zarr=force_zarr, files=self._files, ahead=ahead)
            for name in teachers
        }
        self._buffers = _Buffers(device=self._device)
        if rows is not None:
            self.require(rows)

    @property
    def specs(self) -> Mapping[str, FeatureSpec]:
        return {name: r.teacher.spec for name, r in self._readers.items()}

    @property
    def needs_pixels(self) -> bool:
        return False

    def require(self, rows: np.ndarray) -> None:
        """Checks that the features of all `rows` are done.

        Raises:
            StoreIncomplete: naming the teacher, how many are, and the command that finishes them; or what was removed.
        """
        for name, reader in self._readers.items():
            done = int(reader.is_done(rows).sum())
            if done < len(rows):
                raise reader.removed(rows) or StoreIncomplete(
                    f"features for {name!r} in {self._store.path} cover {done} of {len(rows)} views; finish them "
                    "with the rsmtdf cache-features command that the store was made by"
                )

    def fetch(self, rows: np.ndarray, pixels: torch.Tensor | None = None) -> Targets:
        """Teacher name -> targets float32 [b, tokens, dim] on the device, in the order of `rows`.

        May be called from any thread; the tensors belong to the caller.

        Raises:
            StoreIncomplete: a row is not done, or was removed meanwhile.
            StoreCorrupt: a view is damaged or missing.
            StoreError: a view cannot be read now; nothing is known to be wrong with it.
        """
        return self._end(self._begin(rows, helpers=self._threads - 1, then=_later))

    def stream(self, batches: Iterable[np.ndarray], *, ahead: int = 2) -> Iterator[Targets]:
        """What `fetch` gives for each batch of rows, in order, with the next ones being read meanwhile.

        An error is raised at the batch that it belongs to, and ends the stream; so does closing it. No thread works
        for it any more afterwards. Encoded batches are held `ahead` + 1 times at most, in buffers that are reused
        (on the CPU decoded as well).

        Args:
            batches: rows; taken from it `ahead` batches early.
            ahead: batches being read besides the one in hand.
        """
        # On the CPU, where it takes time, decoding is done ahead as well.
        then = self._decoded if self._device.type == "cpu" else _later
        begun: deque[_Batch] = deque()
        try:
            for rows in batches:
                begun.append(self._begin(rows, helpers=self._threads, then=then))
                if len(begun) > ahead:
                    yield self._end(begun.popleft())
            while begun:
                yield self._end(begun.popleft())
        finally:
            for batch in begun:
                batch.work.cancel()
            for batch in begun:
                self._buffers.give_back(batch.buffers.values())

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for reader in self._readers.values():
            reader.close()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(
        self, rows: np.ndarray, *, helpers: int, then: Callable[[Mapping[str, _Buffer], int], Targets | None]
    ) -> _Batch:
        """Has a batch read by `helpers` threads of the pool, `then` what is done with its buffers."""
        buffers: dict[str, _Buffer] = {}
        pieces: list[Callable[[], None]] = []
        for name, reader in self._readers.items():
            buffers[name] = self._buffers.take(len(rows), reader.teacher.arrays)
            pieces += reader.pieces(rows, buffers[name].host(len(rows)))
        work = WorkShare(pieces, then=partial(then, buffers, len(rows)))
        work.help(self._pool, helpers)
        return _Batch(work=work, buffers=buffers, views=len(rows))

    def _end(self, batch: _Batch) -> Targets:
        """The targets of a batch, as soon as they are there."""
        try:
            decoded = batch.work.result()
            return decoded if decoded is not None else self._decoded(batch.buffers, batch.views)
        finally:
            self._buffers.give_back(batch.buffers.values())

    def _decoded(self, buffers: Mapping[str, _Buffer], views: int) -> Targets:
        return {
            name: reader.teacher.decode(buffers[name].to_device(views), device=self._device)
            for name, reader in self._readers.items()
        }


def _later(buffers: Mapping[str, _Buffer], views: int) -> None:
    """Leaves decoding to whoever takes the batch. On an accelerator it is launched, and not waited for."""


def _default_threads(path: object) -> int:
    return min(DISK_THREADS, os.cpu_count() or 1) if isinstance(path, Path) else OBJECT_THREADS


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """A batch that is being read."""

    work: WorkShare[Targets | None]
    buffers: Mapping[str, _Buffer]
    views: int


class _Buffers:
    """Host buffers for batches, kept and reused: as many as there are batches at a time."""

    def __init__(self, *, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._free: dict[tuple[EncodedArray, ...], deque[_Buffer]] = {}

    def take(self, views: int, arrays: tuple[EncodedArray, ...]) -> _Buffer:
        """A buffer of at least `views` views that nobody else has until it is given back."""
        with self._lock:
            free = self._free.setdefault(arrays, deque())
            # One that is too small is let go, so that growing batches do not add up.
            buffer = free.popleft() if free else None
        if buffer is None or buffer.views < views:
            return _Buffer(views, arrays, device=self._device)
        buffer.wait()
        return buffer

    def give_back(self, buffers: Iterable[_Buffer]) -> None:
        with self._lock:
            for buffer in buffers:
                self._free.setdefault(buffer.arrays, deque()).append(buffer)


class _Buffer:
    """Room for a batch of one teacher's arrays in host memory: pinned where the device is not the host."""

    def __init__(self, views: int, arrays: tuple[EncodedArray, ...], *, device: torch.device) -> None:
        self.views, self.arrays = views, arrays
        self._device = device
        self._on_host = device.type == "cpu"
        self._tensors = {
            a.name: torch.empty((views, *a.shape), dtype=getattr(torch, a.dtype), pin_memory=not self._on_host)
            for a in arrays
        }
        self._copied: torch.Event | None = None

    def host(self, views: int) -> dict[str, np.ndarray]:
        """The first `views` views."""
        return {name: t[:views].numpy() for name, t in self._tensors.items()}

    def to_device(self, views: int) -> dict[str, torch.Tensor]:
        """The first `views` views on the device; `wait` before the host side is written again."""
        if self._on_host:
            # Decoding makes float32 out of narrower types, so never hands these out.
            return {name: t[:views] for name, t in self._tensors.items()}
        moved = {name: t[:views].to(self._device, non_blocking=True) for name, t in self._tensors.items()}
        self._copied = torch.Event(self._device)
        self._copied.record()
        return moved

    def wait(self) -> None:
        """Until the last copy to the device has left the buffer."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
