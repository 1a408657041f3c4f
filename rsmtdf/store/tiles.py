"""The tile table: ids as UTF-8 bytes and offsets, because Zarr's core has no string type."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import overload

import numpy as np

from rsmtdf.objects import StorePath
from rsmtdf.store.arrays import PlainArray, chunk_length, damaged
from rsmtdf.store.manifest import TileTable


class TileIds(Sequence[str]):
    """Tile ids by index, decoded from the store's bytes when asked for."""

    def __init__(self, id_bytes: np.ndarray, offsets: np.ndarray) -> None:
        self._blob = id_bytes.tobytes()
        self._offsets = offsets.astype(np.int64).tolist()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"tile {index} of {len(self)}")
        return self._blob[self._offsets[index] : self._offsets[index + 1]].decode()

    @cached_property
    def indices(self) -> Mapping[str, int]:
        """Tile id -> index."""
        return {t: k for k, t in enumerate(self)}


def read_tiles(path: StorePath, tiles: TileTable) -> TileIds:
    """The committed tile ids of the store at `path`.

    Raises:
        StoreCorrupt: they differ from what was committed.
    """
    if not tiles.count:
        return TileIds(np.empty(0, np.uint8), np.zeros(1, np.uint64))
    bytes_array, offsets_array = tile_arrays(path, tiles)
    data, offsets = bytes_array.read(tiles.id_bytes), offsets_array.read(tiles.count + 1)
    if tiles_sha256(data, offsets) != tiles.sha256:
        raise damaged(path / "tiles", "the digest of the tile ids is not the one in the store's manifest")
    return TileIds(data, offsets)


def write_tiles(path: StorePath, tiles: TileTable, *, old: Sequence[str], new: Sequence[str]) -> TileTable:
    """Appends tile ids and returns the table's new entry."""
    blobs = [t.encode() for t in (*old, *new)]
    offsets = np.zeros(len(blobs) + 1, np.uint64)
    offsets[1:] = np.cumsum([len(b) for b in blobs])
    data = np.frombuffer(b"".join(blobs), np.uint8)
    if not tiles.sha256 or tiles.count == 0:
        tiles = dataclasses.replace(
            tiles,
            bytes_chunk=chunk_length(len(data), low=4096, high=1 << 20),
            offsets_chunk=chunk_length(len(offsets)),
        )
    bytes_array, offsets_array = tile_arrays(path, tiles)
    # The first time, chunk lengths may change: nothing of the old arrays is kept.
    kept = (tiles.id_bytes, tiles.count + 1) if tiles.count else (0, 0)
    bytes_array.replace_tail(data[kept[0] :], keep=kept[0])
    offsets_array.replace_tail(offsets[kept[1] :], keep=kept[1])
    return dataclasses.replace(tiles, count=len(blobs), id_bytes=len(data), sha256=tiles_sha256(data, offsets))


def tile_arrays(path: StorePath, tiles: TileTable) -> tuple[PlainArray, PlainArray]:
    """The arrays `id_bytes` and `id_offsets`."""
    return (
        PlainArray(path=path / "tiles" / "id_bytes", dtype="uint8", chunk=tiles.bytes_chunk, dim="byte"),
        PlainArray(path=path / "tiles" / "id_offsets", dtype="uint64", chunk=tiles.offsets_chunk, dim="offset"),
    )


def tiles_sha256(id_bytes: np.ndarray, offsets: np.ndarray) -> str:
    """The digest of the tile ids that the manifest holds."""
    return hashlib.sha256(id_bytes.tobytes() + offsets.astype("<u8").tobytes()).hexdigest()
