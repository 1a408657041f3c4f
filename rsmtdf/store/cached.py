"""`CachedFeatures`: training's distillation targets out of a store, verified, on the device.

Views are read by threads of this process into reused (for accelerators: pinned) buffers, each view at its place in
the batch whatever the order of completion. DataLoader workers are not used for it: their transport is ten times
slower than the file (reference/store_measurements, section 4).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import numpy as np
import torch

from rsmtdf.errors import StoreIncomplete
from rsmtdf.specs import FeatureSpec
from rsmtdf.store.codecs import EncodedArray
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.store import FeatureStore


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
        threads: int = 1,
        verify: bool = True,
        rows: np.ndarray | None = None,
        force_zarr: bool = False,
    ) -> None:
        """Opens the features of `teachers`.

        Args:
            store: where they are.
            teachers: names in it.
            device: where targets are wanted.
            threads: views read at a time.
            verify: check every byte read against the checksums beside it and in the status.
            rows: the views that will be asked for; None: not checked here.
            force_zarr: read through zarr-python even where the fast path would do.

        Raises:
            StoreIncomplete: a teacher is not there, or some of `rows` are not done.
            StoreCorrupt: status words or metadata are damaged.
        """
        self._store = store
        self._device = torch.device(device)
        self._readers = {
            name: FeatureReader(store, name, threads=threads, verify=verify, force_zarr=force_zarr) for name in teachers
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
            StoreIncomplete: naming the teacher, how many are, and the command that finishes them.
        """
        for name, reader in self._readers.items():
            done = int(reader.is_done(rows).sum())
            if done < len(rows):
                raise StoreIncomplete(
                    f"features for {name!r} in {self._store.path} cover {done} of {len(rows)} views; finish them "
                    "with the rsmtdf cache-features command that the store was made by"
                )

    def fetch(self, rows: np.ndarray, pixels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Teacher name -> targets float32 [b, tokens, dim] on the device, in the order of `rows`.

        May be called from any thread; the tensors belong to the caller.

        Raises:
            StoreIncomplete: a row is not done.
            StoreCorrupt: a view is damaged or missing.
        """
        targets: dict[str, torch.Tensor] = {}
        for name, reader in self._readers.items():
            with self._buffers.lease(len(rows), reader.teacher.arrays) as buffer:
                reader.get_many(rows, out=buffer.host)
                targets[name] = reader.teacher.decode(buffer.to_device(), device=self._device)
        return targets

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Buffers:
    """Host buffers for batches, kept and reused, as many as there are calls at a time."""

    def __init__(self, *, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._free: dict[tuple[int, tuple[EncodedArray, ...]], list[_Buffer]] = {}

    @contextlib.contextmanager
    def lease(self, views: int, arrays: tuple[EncodedArray, ...]) -> Iterator[_Buffer]:
        """A buffer nobody else has until it is left; an error leaves it to the garbage collector."""
        with self._lock:
            free = self._free.setdefault((views, arrays), [])
            buffer = free.pop() if free else None
        if buffer is None:
            buffer = _Buffer(views, arrays, device=self._device)
        buffer.wait()
        yield buffer
        with self._lock:
            free.append(buffer)


class _Buffer:
    """A batch of one teacher's arrays in host memory: pinned where the device is not the host."""

    def __init__(self, views: int, arrays: tuple[EncodedArray, ...], *, device: torch.device) -> None:
        self._device = device
        self._on_host = device.type == "cpu"
        self._tensors = {
            a.name: torch.empty((views, *a.shape), dtype=getattr(torch, a.dtype), pin_memory=not self._on_host)
            for a in arrays
        }
        self.host = {name: t.numpy() for name, t in self._tensors.items()}
        self._copied: torch.Event | None = None

    def to_device(self) -> dict[str, torch.Tensor]:
        """The tensors on the device; `wait` before the host side is written again."""
        if self._on_host:
            return self._tensors  # decoding makes float32 out of narrower types, so never hands these out
        moved = {name: t.to(self._device, non_blocking=True) for name, t in self._tensors.items()}
        self._copied = torch.Event(self._device)
        self._copied.record()
        return moved

    def wait(self) -> None:
        """Until the last copy to the device has left the buffer."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
