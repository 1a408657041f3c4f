"""Shard files: Zarr's `sharding_indexed` of one view per inner chunk, written whole and read by position.

A file is, for each view that is there, its bytes and their crc32c; then the index, (offset, size) per view, with a
crc32c of its own. A view that is absent has no bytes and 2**64 - 1 twice in the index: every reader gives fill
values for it. Reading one view is one `preadv` of payload and checksum straight into the caller's buffer (measured:
4x zarr-python, and faster than mmap from a cold cache).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from rsmtdf.files import whole_file
from rsmtdf.store.arrays import CRC_BYTES
from rsmtdf.store.checksum import crc32c

ABSENT = 2**64 - 1
_ENTRY = 16


class ShardDamage(Exception):
    """A view cannot be read from its shard file; the message says why. Callers turn it into `StoreCorrupt`."""


def write_shard_file(file: Path, views: Sequence[np.ndarray | None]) -> tuple[int, list[int]]:
    """Writes a shard atomically and durably.

    Args:
        file: its path.
        views: per view its values (all of one dtype and shape), or None where absent.

    Returns:
        Bytes of the file, and the crc32c per view (0 where absent).
    """
    index = np.full((len(views), 2), ABSENT, dtype="<u8")
    sums = [0] * len(views)
    at = 0
    with whole_file(file) as temporary, temporary.open("wb") as out:
        for k, view in enumerate(views):
            if view is None:
                continue
            data = np.ascontiguousarray(view, dtype=view.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
            sums[k] = crc32c(data)
            out.write(data.data)
            out.write(sums[k].to_bytes(CRC_BYTES, "little"))
            index[k] = at, len(data) + CRC_BYTES
            at += len(data) + CRC_BYTES
        raw = index.tobytes()
        out.write(raw + crc32c(raw).to_bytes(CRC_BYTES, "little"))
        out.flush()
    return at + len(raw) + CRC_BYTES, sums


def drop_views(file: Path, slots: Collection[int], *, shard_views: int) -> int:
    """Rewrites a shard file without the views in `slots`, atomically and durably; bytes given back, 0 if none is there.

    The others are copied as they are, their checksums with them: damage stays as visible as it was.

    Raises:
        ShardDamage: the file is missing, or its index is damaged.
    """
    with _opened(file) as fd:
        index = _read_index(fd, shard_views)
        gone = [k for k in slots if index[k, 0] != ABSENT]
        if not gone:
            return 0
        size = os.fstat(fd).st_size
        index = index.copy()
        index[gone] = ABSENT
        at = 0
        with whole_file(file) as temporary, temporary.open("wb") as out:
            for k in np.flatnonzero(index[:, 0] != ABSENT).tolist():
                offset, length = (int(x) for x in index[k])
                blob = bytearray(min(length, size))
                _read_fully(fd, [memoryview(blob)], offset)
                out.write(blob)
                index[k] = at, length
                at += length
            raw = index.astype("<u8").tobytes()
            out.write(raw + crc32c(raw).to_bytes(CRC_BYTES, "little"))
            out.flush()
    return size - at - len(raw) - CRC_BYTES


def shard_name(shard: int, dims: int) -> str:
    """The file name of a shard of an array of `dims` dimensions that is cut along the first one only."""
    return ".".join(["c", str(shard)] + ["0"] * (dims - 1))


class ShardReader:
    """Reads views of one sharded array into given buffers, from any number of threads.

    Shard indexes are read and checked once; at most `max_open` files are kept open, least recently used first out.
    """

    def __init__(self, *, node: Path, dims: int, view_bytes: int, shard_views: int, max_open: int = 128) -> None:
        self._node = node
        self._dims = dims
        self._view_bytes = view_bytes
        self._per = shard_views
        self._max_open = max_open
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def file(self, row: int) -> Path:
        """The file that holds a row."""
        return self._node / shard_name(row // self._per, self._dims)

    def read_into(self, row: int, out: np.ndarray, *, verify: bool) -> int:
        """Reads a view's bytes into `out` (uint8 [view_bytes], contiguous) and returns the crc32c stored with them.

        With `verify`, the bytes are summed and compared with it.

        Raises:
            ShardDamage: the shard or the view in it is missing, cut short or altered.
        """
        shard, slot = divmod(row, self._per)
        crc = bytearray(CRC_BYTES)
        with self._use(shard) as opened:
            offset, size = (int(x) for x in opened.index[slot])
            if offset == ABSENT:
                raise ShardDamage("the view is absent from its shard")
            if size != self._view_bytes + CRC_BYTES:
                raise ShardDamage(f"the index gives the view {size} bytes, expected {self._view_bytes + CRC_BYTES}")
            _read_fully(opened.fd, [out.data, memoryview(crc)], offset)
        stored = int.from_bytes(crc, "little")
        if verify and (found := crc32c(out)) != stored:
            raise ShardDamage(f"payload checksum is {found:08x}, expected {stored:08x}: bytes have changed")
        return stored

    def close(self) -> None:
        with self._lock:
            for opened in self._open.values():
                opened.retire()
            self._open.clear()

    @contextlib.contextmanager
    def _use(self, shard: int) -> Iterator[_OpenShard]:
        """The open shard, which stays open while in use even where others push it out."""
        with self._lock:
            opened = self._open.get(shard)
            if opened is not None:
                opened.users += 1
                self._open.move_to_end(shard)
        if opened is None:
            opened = self._admit(shard, self._load(shard))  # loading takes a while on network disks: no lock held
        try:
            yield opened
        finally:
            with self._lock:
                opened.users -= 1
                opened.close_if_unused()

    def _admit(self, shard: int, loaded: _OpenShard) -> _OpenShard:
        """Registers a loaded shard as in use, or drops it for the one another thread registered meanwhile."""
        with self._lock:
            opened = self._open.setdefault(shard, loaded)
            opened.users += 1
            self._open.move_to_end(shard)
            if opened is not loaded:
                loaded.retire()
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)[1].retire()
        return opened

    def _load(self, shard: int) -> _OpenShard:
        fd = _open_file(self._node / shard_name(shard, self._dims))
        try:
            return _OpenShard(fd=fd, index=_read_index(fd, self._per))
        except BaseException:
            os.close(fd)
            raise


class _OpenShard:
    """A shard's descriptor and index. Guarded by its reader's lock."""

    def __init__(self, *, fd: int, index: np.ndarray) -> None:
        self.fd = fd
        self.index = index
        self.users = 0
        self._retired = False

    def retire(self) -> None:
        """Closes it as soon as nobody reads from it."""
        self._retired = True
        self.close_if_unused()

    def close_if_unused(self) -> None:
        if self._retired and self.users == 0 and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open_file(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise ShardDamage("the shard file is missing") from None
    except OSError as error:
        raise ShardDamage(f"the shard file cannot be opened ({error.strerror})") from error


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[int]:
    fd = _open_file(file)
    try:
        yield fd
    finally:
        os.close(fd)


def _read_index(fd: int, views: int) -> np.ndarray:
    """uint64 [views, 2]: (offset, size) of each view."""
    size = os.fstat(fd).st_size
    n = views * _ENTRY + CRC_BYTES
    if size < n:
        raise ShardDamage(f"the shard file is cut short: {size} bytes, its index alone has {n}")
    raw = bytearray(n)
    _read_fully(fd, [memoryview(raw)], size - n)
    body = bytes(raw[:-CRC_BYTES])
    if crc32c(body) != int.from_bytes(raw[-CRC_BYTES:], "little"):
        raise ShardDamage("the shard index is damaged or the file is cut short")
    return np.frombuffer(body, "<u8").reshape(views, 2)


def _read_fully(fd: int, buffers: list[memoryview], offset: int) -> None:
    """`preadv` until every buffer is full; network file systems may return less at a time."""
    while buffers:
        try:
            n = os.preadv(fd, buffers, offset)
        except OSError as error:
            raise ShardDamage(f"reading failed ({error.strerror})") from error
        if n == 0:
            raise ShardDamage("the shard file is cut short")
        offset += n
        while buffers and n >= len(buffers[0]):
            n -= len(buffers.pop(0))
        if buffers:
            buffers[0] = buffers[0][n:]
