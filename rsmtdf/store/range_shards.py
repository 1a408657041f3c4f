"""`RangeShards`: shard files in object storage, read by byte ranges.

A request costs a round trip whatever it fetches, so a shard's index is fetched once, from the end of the object, and
the views that a batch wants of a shard are asked for together. Trying again is the storage library's affair. An object
may be replaced after its index was fetched, which then points at other views' bytes, whole and with sound checksums:
only the status words tell, so whoever compares them has the index forgotten and reads again.
"""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np

from rsmtdf.store.arrays import CRC_BYTES
from rsmtdf.store.checksum import summed
from rsmtdf.store.shards import (
    INDEXES_KEPT,
    ShardDamage,
    ShardUnreachable,
    changed,
    flat_index,
    index_bytes,
    parse_index,
    shard_name,
    view_offset,
)

_NO_RANGES = (
    "the server does not answer requests for byte ranges (python -m http.server does not); use one that does, or a "
    "copy on a disk"
)


class RangeObject(Protocol):
    """The part of `rsmtdf.objects.ObjectPath` that this needs. What it raises are OSErrors, as files do."""

    def __truediv__(self, name: str) -> Self: ...

    def read_tail(self, length: int) -> tuple[bytes, int]:
        """The last `length` bytes, or all of a shorter object, and the size of the object."""
        ...

    def read_ranges(self, starts: Sequence[int], lengths: Sequence[int]) -> Sequence[bytes | memoryview]:
        """The bytes of each range, in order."""
        ...


class RangeShards:
    """`Shards` in object storage.

    Args:
        node: the array.
        dims: of the array.
        view_bytes: payload of a view.
        shard_views: views per object.
    """

    by_shard = True

    def __init__(self, *, node: RangeObject, dims: int, view_bytes: int, shard_views: int) -> None:
        self._node, self._dims = node, dims
        self._view_bytes, self._per = view_bytes, shard_views
        self._lock = threading.Lock()
        self._indexes: OrderedDict[int, tuple[memoryview, int]] = OrderedDict()

    def file(self, row: int) -> str:
        return str(self._object(row // self._per))

    def read(self, rows: Sequence[int], outs: Sequence[np.ndarray], *, verify: bool) -> list[int]:
        shard = rows[0] // self._per
        with self._lock:
            known = self._indexes.get(shard)
        entries, end = known or self._index(shard)
        length = self._view_bytes + CRC_BYTES
        starts: list[int] = []
        for place, row in enumerate(rows):
            try:
                start = view_offset(entries, row % self._per, size=length)
                if start + length > end:
                    raise ShardDamage("the index points beyond the end of the shard file")
            except ShardDamage as damage:
                raise ShardDamage(str(damage), place=place) from None
            starts.append(start)
        parts = self._ranges(shard, starts, length)
        stored: list[int] = []
        for place, (part, out) in enumerate(zip(parts, outs, strict=True)):
            out[:] = np.frombuffer(part, np.uint8, count=self._view_bytes)
            stored.append(int.from_bytes(part[self._view_bytes :], "little"))
            if verify and (found := summed(0, out)) != stored[-1]:
                raise changed(found, stored[-1], place=place)
        return stored

    def forget(self, row: int) -> None:
        with self._lock:
            self._indexes.pop(row // self._per, None)

    def _index(self, shard: int) -> tuple[memoryview, int]:
        """As of `flat_index`, and where the index begins."""
        n = index_bytes(self._per)
        try:
            raw, size = self._object(shard).read_tail(n)
        except FileNotFoundError:
            raise ShardDamage("the shard file is missing") from None
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                raise ShardUnreachable(_NO_RANGES) from error
            raise ShardUnreachable(f"reading its index failed: {error.strerror or error}") from error
        if size < n:
            raise ShardDamage(f"the shard file is cut short: {size} bytes, its index alone has {n}")
        found = flat_index(parse_index(raw, self._per)), size - n
        with self._lock:
            self._indexes[shard] = found
            self._indexes.move_to_end(shard)
            while len(self._indexes) > INDEXES_KEPT:
                self._indexes.popitem(last=False)
        return found

    def _ranges(self, shard: int, starts: Sequence[int], length: int) -> Sequence[bytes | memoryview]:
        try:
            return self._object(shard).read_ranges(starts, [length] * len(starts))
        except FileNotFoundError:
            raise ShardDamage("the shard file is missing") from None
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                raise ShardUnreachable(_NO_RANGES) from error
            what = f"reading {len(starts)} view(s) of {length:,} bytes failed: {error.strerror or error}"
            # Ranges beyond the end of an object are EIO too.
            raise ShardUnreachable(what, outdated=error.errno == errno.EIO) from error

    def _object(self, shard: int) -> RangeObject:
        return self._node / shard_name(shard, self._dims)
