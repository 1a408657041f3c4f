"""`CachedFeatures`: training's distillation targets out of a store, verified, on the device.

Views are read by threads of this process into reused (for accelerators: pinned) buffers, each view at its place in
the batch whatever the order of completion. DataLoader workers are not used for it: their transport is ten times
slower than the file (reference/store_measurements, section 4). An array whose layout is not the store's own (a
compressed archive) or a platform without `preadv` is read through zarr-python, under the same checks.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from rsmtdf.errors import StoreCorrupt, StoreIncomplete
from rsmtdf.specs import FeatureSpec
from rsmtdf.store.arrays import METADATA, read_metadata, same_layout
from rsmtdf.store.checksum import crc32c
from rsmtdf.store.codecs import EncodedArray
from rsmtdf.store.shards import ShardDamage, ShardReader
from rsmtdf.store.status import DONE, crc_of, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import StoredTeacher

_HAS_PREADV = hasattr(os, "preadv")


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
        self._verify = verify
        self._readers = {
            name: _TeacherReader(store, store.teacher(name), verify=verify, force_zarr=force_zarr) for name in teachers
        }
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="features") if threads > 1 else None
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
                self._fill(reader, rows, buffer.host)
                targets[name] = reader.teacher.decode(buffer.to_device(), device=self._device)
        return targets

    def read_rows(self, teacher: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Array name -> values [b, ...] as stored, freshly allocated, in the order of `rows`."""
        reader = self._readers[teacher]
        out = {a.name: np.empty((len(rows), *a.shape), a.dtype) for a in reader.teacher.arrays}
        self._fill(reader, rows, out)
        return out

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        for reader in self._readers.values():
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fill(self, reader: _TeacherReader, rows: np.ndarray, out: Mapping[str, np.ndarray]) -> None:
        def read(slot: int) -> None:
            reader.read_into(int(rows[slot]), {name: values[slot] for name, values in out.items()})

        if self._pool is None:
            for slot in range(len(rows)):
                read(slot)
        else:
            list(self._pool.map(read, range(len(rows))))


class _TeacherReader:
    """One teacher's arrays and status."""

    def __init__(self, store: FeatureStore, teacher: StoredTeacher, *, verify: bool, force_zarr: bool) -> None:
        self.teacher = teacher
        self._store = store
        self._verify = verify
        words = store.status(teacher.name)
        self._done = state_of(words) == DONE
        self._crcs = crc_of(words)
        self._fast: dict[str, ShardReader] = {}
        self._slow: dict[str, Any] = {}
        for array in teacher.arrays:
            node = teacher.path / array.name
            found = read_metadata(node)
            if _HAS_PREADV and not force_zarr and same_layout(found, teacher.array_metadata(array, store.n_rows)):
                self._fast[array.name] = ShardReader(
                    node=node, dims=1 + len(array.shape), view_bytes=array.view_bytes, shard_views=store.shard_views
                )
            else:
                self._slow[array.name] = _open_zarr(store, teacher, array, node)

    def is_done(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._done[rows], dtype=bool)

    def read_into(self, row: int, out: Mapping[str, np.ndarray]) -> None:
        """Reads a view's arrays into `out`, checked."""
        if not self._done[row]:
            raise StoreIncomplete(
                f"features for {self.teacher.name!r} in {self._store.path} lack view {self._store.describe(row)}; "
                "finish them with the rsmtdf cache-features command that the store was made by"
            )
        total = 0
        for k, array in enumerate(self.teacher.arrays):
            values = out[array.name]
            fast = self._fast.get(array.name)
            raw = values.reshape(-1).view(np.uint8)
            if fast is not None:
                try:
                    stored = fast.read_into(row, raw, verify=self._verify)
                except ShardDamage as damage:
                    raise self._corrupt(row, fast.file(row), str(damage)) from damage
                total = crc32c(raw, start=total) if k and self._verify else stored
            else:
                self._read_zarr(array, row, values)
                total = crc32c(raw, start=total)
        # Unverified, the sums of several arrays cannot be chained; a single one still comes for nothing.
        checkable = self._verify or bool(self._slow) or len(self.teacher.arrays) == 1
        if checkable and total != self._crcs[row]:
            file = self.teacher.path / self.teacher.arrays[0].name
            what = f"checksum is {total:08x}, the status word says {int(self._crcs[row]):08x}"
            raise self._corrupt(row, file, what)

    def close(self) -> None:
        for fast in self._fast.values():
            fast.close()

    def _read_zarr(self, array: EncodedArray, row: int, out: np.ndarray) -> None:
        try:
            out[...] = self._slow[array.name][row]
        except (ValueError, KeyError, IndexError, RuntimeError, OSError, TypeError, MemoryError) as error:
            raise self._corrupt(row, self.teacher.path / array.name, f"zarr-python cannot read it ({error})") from error

    def _corrupt(self, row: int, file: Path, what: str) -> StoreCorrupt:
        return StoreCorrupt(
            f"feature store {self._store.path}, teacher {self.teacher.name!r}, view {self._store.describe(row)}, file "
            f"{file}: {what}. Nothing was trained on it; recompute what is damaged with: "
            f"rsmtdf cache repair {self._store.path}"
        )


def _open_zarr(store: FeatureStore, teacher: StoredTeacher, array: EncodedArray, node: Path) -> Any:
    """The array through zarr-python.

    Raises:
        StoreCorrupt: it is not the array the codec asks for.
    """
    import zarr

    try:
        opened = zarr.open_array(node, mode="r")
    except (ValueError, KeyError, RuntimeError, OSError, TypeError) as error:
        raise _bad_array(store, teacher, node, str(error)) from error
    if opened.shape[1:] != array.shape or opened.dtype != array.dtype or opened.shape[0] < store.n_rows:
        found = f"{opened.dtype} {opened.shape}, expected {array.dtype} {(store.n_rows, *array.shape)}"
        raise _bad_array(store, teacher, node, found)
    return opened


def _bad_array(store: FeatureStore, teacher: StoredTeacher, node: Path, what: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"feature store {store.path}, teacher {teacher.name!r}, file {node / METADATA}: the metadata do not describe "
        f"its features ({what}). Restore the file from a copy, or write the store anew with: rsmtdf cache-features"
    )


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
