"""`PixelReader`: stored pixels of views, every byte checked, for machines that would rather not make them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from rsmtdf.errors import StoreCorrupt, StoreError
from rsmtdf.store.arrays import METADATA, read_metadata, same_layout
from rsmtdf.store.checksum import Appending
from rsmtdf.store.codecs import EncodedArray
from rsmtdf.store.fallback import WrongArray, ZarrViews
from rsmtdf.store.pixels import StoredPixels, pack_valid, strong_shards, unpack_valid
from rsmtdf.store.range_shards import RangeShards
from rsmtdf.store.shards import OpenShards, ShardDamage, ShardReader, Shards, ShardUnreachable
from rsmtdf.store.status import DONE, crc_of, state_of
from rsmtdf.store.store import FeatureStore


class _Unread(Exception):
    """Why views could not be read; the message says what is wrong."""

    def __init__(
        self, array: EncodedArray, row: int | None, what: str, cause: ShardDamage | ShardUnreachable | None
    ) -> None:
        super().__init__(what)
        self.array, self.row, self.cause = array, row, cause

    @property
    def may_be_outdated(self) -> bool:
        """Whether it may only be that the shard was replaced since something of it was read."""
        return not isinstance(self.cause, ShardUnreachable) or self.cause.outdated


class PixelReader:
    """Reads stored pixels, from any number of threads. Use it as a context manager, or `close` it.

    The status words are read once, here: pixels stored later are not seen.
    """

    def __init__(self, store: FeatureStore, *, files: OpenShards | None = None) -> None:
        """Opens the pixels of `store`.

        Args:
            store: where they are.
            files: descriptors to share with other readers; None: its own.

        Raises:
            StoreIncomplete: the store keeps no pixels.
            StoreCorrupt: status words or metadata are damaged.
            StoreError: they cannot be reached.
        """
        self._store = store
        self._strong = strong_shards(store.segments, store.shard_views)
        self._pixels: StoredPixels = store.pixels_of_shard(min(self._strong, default=0))
        words = store.pixel_status()
        self._done, self._crcs = state_of(words) == DONE, crc_of(words)
        self._own = files is None
        self._files = OpenShards() if files is None else files
        arrays = {a.name: a for flat in (True, False) for a in self._of(flat=flat).arrays}
        self._shards = {name: self._open(array) for name, array in arrays.items()}
        self._appending = {name: Appending(array.view_bytes) for name, array in arrays.items()}

    def has(self, rows: Sequence[int]) -> bool:
        """Whether the pixels of all these views are stored."""
        return bool(self._done[list(rows)].all())

    def share(self, rows: np.ndarray) -> float:
        """The share of these views whose pixels are stored; 0 of none."""
        return float(self._done[rows].mean()) if len(rows) else 0.0

    def read(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Of each view `pixels` uint8 [c, c, 3], `valid` bool [c, c] before any paste and, of a strong one, `weak`
        uint8 [c, c, 3]; the caller's own. All must be stored (`has`).

        Raises:
            StoreCorrupt: one is damaged or missing.
            StoreError: it cannot be read now.
        """
        by_shard: dict[int, list[int]] = {}
        for row in dict.fromkeys(rows):
            by_shard.setdefault(row // self._store.shard_views, []).append(row)
        found: dict[int, dict[str, np.ndarray]] = {}
        for shard, some in by_shard.items():
            pixels = self._of(flat=shard not in self._strong)
            try:
                found |= self._attempt(pixels, some)
            except _Unread as unread:
                if not unread.may_be_outdated:
                    raise self._error(unread) from unread.cause
                found |= self._again(pixels, some)
        return [found[row] for row in rows]

    def stored(self, rows: Sequence[int]) -> dict[int, dict[str, np.ndarray]]:
        """Row -> its arrays as they are stored, for writing them again. Errors as `read`."""
        views = self.read(rows)
        return {row: arrays | {"valid": pack_valid(arrays["valid"])} for row, arrays in zip(rows, views, strict=True)}

    def close(self) -> None:
        if self._own:
            self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _of(self, *, flat: bool) -> StoredPixels:
        return StoredPixels(
            path=self._pixels.path, crop_px=self._pixels.crop_px, shard_views=self._pixels.shard_views, flat=flat
        )

    def _again(self, pixels: StoredPixels, rows: Sequence[int]) -> dict[int, dict[str, np.ndarray]]:
        """A second try: shards are replaced while they are read, and what is kept of them misleads."""
        for shards in self._shards.values():
            shards.forget(rows[0])
        try:
            return self._attempt(pixels, rows)
        except _Unread as unread:
            raise self._error(unread) from unread.cause

    def _attempt(self, pixels: StoredPixels, rows: Sequence[int]) -> dict[int, dict[str, np.ndarray]]:
        """Reads and checks views of one shard.

        Raises:
            _Unread: one cannot be read, or is not what its status word says.
        """
        out = {a.name: np.empty((len(rows), *a.shape), a.dtype) for a in pixels.arrays}
        totals = [0] * len(rows)
        for array in pixels.arrays:
            shards, outs = self._shards[array.name], list(out[array.name].reshape(len(rows), -1))
            try:
                sums = shards.read(rows, outs, verify=True)
            except ShardDamage as damage:
                raise _Unread(array, rows[damage.place], str(damage), damage) from damage
            except ShardUnreachable as error:
                raise _Unread(array, rows[0], str(error), error) from error
            append = self._appending[array.name]
            totals = [append(a, b) for a, b in zip(totals, sums, strict=True)]
        for row, total in zip(rows, totals, strict=True):
            if total != self._crcs[row]:
                what = f"checksum is {total:08x}, the status word says {self._crcs[row]:08x}"
                raise _Unread(pixels.arrays[0], row, what, None)
        valid = [unpack_valid(bits) for bits in out.pop("valid")]
        return {
            row: {name: values[k] for name, values in out.items()} | {"valid": valid[k]} for k, row in enumerate(rows)
        }

    def _open(self, array: EncodedArray) -> Shards:
        store, node = self._store, self._pixels.path / array.name
        dims, per = 1 + len(array.shape), store.shard_views
        fast: Shards
        if isinstance(node, Path):
            can = hasattr(os, "preadv")
            fast = ShardReader(node=node, dims=dims, view_bytes=array.view_bytes, shard_views=per, files=self._files)
        else:
            can = True
            fast = RangeShards(node=node, dims=dims, view_bytes=array.view_bytes, shard_views=per)
        known = same_layout(read_metadata(node), self._pixels.array_metadata(array, store.n_rows))
        if known and can:
            return fast
        try:
            return ZarrViews(node=node, array=array, rows=store.n_rows, shard_file=fast.file if known else None)
        except WrongArray as error:
            raise StoreCorrupt(
                f"feature store {store.path}, stored pixels, file {node / METADATA}: the metadata do not describe "
                f"them ({error}); put them right with: rsmtdf cache repair {store.path}"
            ) from error
        except ShardUnreachable as error:
            raise self._error(_Unread(array, None, str(error), error)) from error

    def _error(self, unread: _Unread) -> StoreError:
        store, row = self._store, unread.row
        where = f"feature store {store.path}, stored pixels, array {unread.array.name}"
        if row is not None:
            file = self._shards[unread.array.name].file(row)
            where = f"feature store {store.path}, stored pixels, view {store.describe(row)}, file {file}"
        if isinstance(unread.cause, ShardUnreachable):
            return StoreError(
                f"{where}: {unread}. Nothing is known to be wrong with what is stored there: when it can be read "
                "again, run the same command again"
            )
        return StoreCorrupt(
            f"{where}: {unread}. Nothing was trained on it; make what is damaged again with: rsmtdf cache repair "
            f"{store.path}, or go on without stored pixels: --set train.stored_pixels=never"
        )
