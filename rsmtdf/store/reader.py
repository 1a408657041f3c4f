"""`FeatureReader`: encoded features of one teacher's views, verified, straight into the caller's memory.

A view is one `preadv` of payload and checksum. An array whose layout is not the store's own (a compressed archive) or
a platform without `preadv` is read through zarr-python, under the same checks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from rsmtdf.errors import StoreCorrupt, StoreIncomplete
from rsmtdf.objects import StorePath
from rsmtdf.store.arrays import METADATA, read_metadata, same_layout
from rsmtdf.store.checksum import crc32c
from rsmtdf.store.codecs import EncodedArray
from rsmtdf.store.places import zarr_source
from rsmtdf.store.shards import ShardDamage, ShardReader
from rsmtdf.store.status import DONE, crc_of, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import StoredTeacher

_HAS_PREADV = hasattr(os, "preadv")


class FeatureReader:
    """Reads views of one teacher, from any number of threads. Use it as a context manager, or `close` it.

    The status words are read once, here: views committed later are not seen.
    """

    def __init__(
        self, store: FeatureStore, teacher: str, *, threads: int = 1, verify: bool = True, force_zarr: bool = False
    ) -> None:
        """Opens the features of `teacher`.

        Args:
            store: where they are.
            teacher: its name there.
            threads: views of one `get_many` that are read at a time.
            verify: check every byte read against the checksums beside it and in the status.
            force_zarr: read through zarr-python even where the fast path would do.

        Raises:
            StoreIncomplete: the store has no such teacher.
            StoreCorrupt: status words or metadata are damaged.
        """
        self.teacher = store.teacher(teacher)
        self._store = store
        self._verify = verify
        words = store.status(teacher)
        self._done = state_of(words) == DONE
        self._crcs = crc_of(words)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="features") if threads > 1 else None
        self._fast: dict[str, ShardReader] = {}
        self._slow: dict[str, Any] = {}
        for array in self.teacher.arrays:
            node = self.teacher.path / array.name
            found = read_metadata(node)
            if (
                isinstance(node, Path)
                and _HAS_PREADV
                and not force_zarr
                and same_layout(found, self.teacher.array_metadata(array, store.n_rows))
            ):
                self._fast[array.name] = ShardReader(
                    node=node, dims=1 + len(array.shape), view_bytes=array.view_bytes, shard_views=store.shard_views
                )
            else:
                self._slow[array.name] = _open_zarr(store, self.teacher, array, node)

    def is_done(self, rows: np.ndarray) -> np.ndarray:
        """bool, per row: whether its features are committed."""
        return np.asarray(self._done[rows], dtype=bool)

    def get_many(
        self, view_ids: np.ndarray | Sequence[int], out: Mapping[str, np.ndarray] | None = None
    ) -> Mapping[str, np.ndarray]:
        """Array name -> values [b, ...] as stored, in the order of `view_ids` (rows of the store).

        Args:
            view_ids: which views; any order, repeats allowed.
            out: arrays to fill, C-contiguous, of the stored dtypes; None: new ones.

        Raises:
            StoreIncomplete: a view is not done.
            StoreCorrupt: a view is damaged or missing; nothing in `out` is to be used.
        """
        if out is None:
            out = {a.name: np.empty((len(view_ids), *a.shape), a.dtype) for a in self.teacher.arrays}
        filled = out

        def read(slot: int) -> None:
            self._read_into(int(view_ids[slot]), {name: values[slot] for name, values in filled.items()})

        if self._pool is None:
            for slot in range(len(view_ids)):
                read(slot)
        else:
            list(self._pool.map(read, range(len(view_ids))))
        return out

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        for fast in self._fast.values():
            fast.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read_into(self, row: int, out: Mapping[str, np.ndarray]) -> None:
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

    def _read_zarr(self, array: EncodedArray, row: int, out: np.ndarray) -> None:
        try:
            out[...] = self._slow[array.name][row]
        except (ValueError, KeyError, IndexError, RuntimeError, OSError, TypeError, MemoryError) as error:
            raise self._corrupt(row, self.teacher.path / array.name, f"zarr-python cannot read it ({error})") from error

    def _corrupt(self, row: int, file: StorePath, what: str) -> StoreCorrupt:
        return StoreCorrupt(
            f"feature store {self._store.path}, teacher {self.teacher.name!r}, view {self._store.describe(row)}, file "
            f"{file}: {what}. Nothing was trained on it; recompute what is damaged with: "
            f"rsmtdf cache repair {self._store.path}"
        )


def _open_zarr(store: FeatureStore, teacher: StoredTeacher, array: EncodedArray, node: StorePath) -> Any:
    """The array through zarr-python.

    Raises:
        StoreCorrupt: it is not the array the codec asks for.
    """
    import zarr

    try:
        opened = zarr.open_array(zarr_source(node), mode="r")
    except (ValueError, KeyError, RuntimeError, OSError, TypeError) as error:
        raise _bad_array(store, teacher, node, str(error)) from error
    if opened.shape[1:] != array.shape or opened.dtype != array.dtype or opened.shape[0] < store.n_rows:
        found = f"{opened.dtype} {opened.shape}, expected {array.dtype} {(store.n_rows, *array.shape)}"
        raise _bad_array(store, teacher, node, found)
    return opened


def _bad_array(store: FeatureStore, teacher: StoredTeacher, node: StorePath, what: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"feature store {store.path}, teacher {teacher.name!r}, file {node / METADATA}: the metadata do not describe "
        f"its features ({what}). Restore the file from a copy, or write the store anew with: rsmtdf cache-features"
    )
