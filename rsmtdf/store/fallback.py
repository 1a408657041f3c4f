"""`ZarrViews`: views through zarr-python, for arrays of another layout (archives) and systems without `preadv`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rsmtdf.store.checksum import crc32c
from rsmtdf.store.codecs import EncodedArray
from rsmtdf.store.shards import ShardDamage, ShardUnreachable, trouble

_UNREADABLE = (ValueError, KeyError, IndexError, RuntimeError, TypeError, MemoryError)
"""What zarr-python raises for bytes that it cannot make sense of."""


class WrongArray(Exception):
    """The metadata describe no array that holds the features; the message says why."""


class ZarrViews:
    """`Shards` of any layout. Every byte is summed, whether asked for or not: missing chunks read as fill values."""

    by_shard = False

    def __init__(self, *, node: Any, array: EncodedArray, rows: int, shard_file: Any) -> None:
        """Opens the array.

        Args:
            node: its folder, or its place in object storage.
            array: what it is to hold.
            rows: how many views, at least.
            shard_file: row -> its file; None where the layout is not known: the array is named instead.

        Raises:
            WrongArray: it is none, or another.
            ShardUnreachable: it cannot be opened now.
        """
        import zarr

        self._node, self._shard_file = node, shard_file
        self._network = _network_errors() if not isinstance(node, Path) else ()
        try:
            self._array: Any = zarr.open_array(node if isinstance(node, Path) else node.zarr_store(), mode="r")
        except _UNREADABLE as error:
            raise WrongArray(str(error)) from error
        except OSError as error:
            if isinstance(found := trouble(error, "zarr-python cannot open it"), ShardUnreachable):
                raise found from error
            raise WrongArray(str(error)) from error
        except self._network as error:
            raise ShardUnreachable(f"zarr-python cannot open it ({error})") from error
        found_array = self._array
        if found_array.shape[1:] != array.shape or found_array.dtype != array.dtype or found_array.shape[0] < rows:
            raise WrongArray(f"{found_array.dtype} {found_array.shape}, expected {array.dtype} {(rows, *array.shape)}")

    def file(self, row: int) -> str:
        return str(self._node if self._shard_file is None else self._shard_file(row))

    def read(self, rows: Sequence[int], outs: Sequence[np.ndarray], *, verify: bool) -> list[int]:
        del verify
        return [self._read(row, out, place) for place, (row, out) in enumerate(zip(rows, outs, strict=True))]

    def forget(self, row: int) -> None:
        """Nothing is remembered between reads."""

    def _read(self, row: int, out: np.ndarray, place: int) -> int:
        try:
            view = np.ascontiguousarray(self._array[row])
            out[:] = view.reshape(-1).view(np.uint8)
        except _UNREADABLE as error:
            raise ShardDamage(f"zarr-python cannot read it ({error})", place=place) from error
        except OSError as error:
            found = trouble(error, "zarr-python cannot read it")
            raise found if isinstance(found, ShardUnreachable) else ShardDamage(str(found), place=place) from error
        except self._network as error:
            raise ShardUnreachable(f"zarr-python cannot read it ({error})") from error
        return crc32c(out)


def _network_errors() -> tuple[type[Exception], ...]:
    if importlib.util.find_spec("obstore") is None:
        return ()
    from obstore.exceptions import BaseError

    return (BaseError,)
