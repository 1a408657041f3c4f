"""Shard files: Zarr's `sharding_indexed` of one view per inner chunk, written whole and read by position.

A file is, for each view that is there, its bytes and their crc32c; then the index, (offset, size) per view, with a
crc32c of its own. A view that is absent has no bytes and 2**64 - 1 twice in the index: every reader gives fill
values for it. Reading one view is one `preadv` of payload and checksum straight into the caller's buffer (measured:
4x zarr-python, and faster than mmap from a cold cache).
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from rsmtdf.objects import StorePath
from rsmtdf.store.arrays import CRC_BYTES
from rsmtdf.store.checksum import crc32c, summed
from rsmtdf.store.places import put, read

ABSENT = 2**64 - 1
_ENTRY = 16
INDEXES_KEPT = 16384
"""Shard indexes that outlive their descriptor: 20 MB, and a seek less per view of a cold disk."""
_DAMAGE = {errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EBADMSG}
"""What the system says of files that are not as they were written. All else (permissions, a network share that is
gone, no descriptors left) says nothing about their bytes."""


class ShardDamage(Exception):
    """A view cannot be read from its shard file; the message says why. Callers turn it into `StoreCorrupt`.

    `place` is the view's, among those asked for.
    """

    def __init__(self, what: str, *, place: int = 0) -> None:
        super().__init__(what)
        self.place = place


class ShardUnreachable(Exception):
    """A shard could not be read now; nothing is known to be wrong with it. Callers turn it into `StoreError`.

    `outdated`: the reason may be that it was replaced since it was opened; try again after `Shards.forget`.
    """

    def __init__(self, what: str, *, outdated: bool = False) -> None:
        super().__init__(what)
        self.outdated = outdated


class Shards(Protocol):
    """Reads views of one sharded array, from any number of threads."""

    @property
    def by_shard(self) -> bool:
        """Whether the views of one shard are best asked for in one call: each call is a round trip."""
        ...

    def file(self, row: int) -> str:
        """The file that holds a row, for messages."""
        ...

    def read(self, rows: Sequence[int], outs: Sequence[np.ndarray], *, verify: bool) -> list[int]:
        """Reads views of one shard into `outs` (uint8 [view_bytes] each, contiguous) and returns the crc32c stored
        with each. With `verify`, the bytes are summed and compared with it.

        Raises:
            ShardDamage: the shard or a view in it is missing, cut short or altered.
            ShardUnreachable: it cannot be read now, which says nothing about its bytes.
        """
        ...

    def forget(self, row: int) -> None:
        """Drops what is remembered of the shard that holds `row`: it may have been replaced since."""
        ...


def write_shard_file(file: StorePath, views: Sequence[np.ndarray | None]) -> tuple[int, list[int]]:
    """Writes a shard atomically and durably.

    Args:
        file: its path.
        views: per view its values (all of one dtype and shape), or None where absent.

    Returns:
        Bytes of the file, and the crc32c per view (0 where absent).
    """
    index = np.full((len(views), 2), ABSENT, dtype="<u8")
    sums = [0] * len(views)
    parts: list[bytes | np.ndarray] = []
    at = 0
    for k, view in enumerate(views):
        if view is None:
            continue
        data = np.ascontiguousarray(view, dtype=view.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
        sums[k] = crc32c(data)
        parts += [data, sums[k].to_bytes(CRC_BYTES, "little")]
        index[k] = at, len(data) + CRC_BYTES
        at += len(data) + CRC_BYTES
    raw = index.tobytes()
    return put(file, *parts, raw + crc32c(raw).to_bytes(CRC_BYTES, "little")), sums


def drop_views(file: StorePath, slots: Collection[int], *, shard_views: int) -> int:
    """Rewrites a shard file without the views in `slots`, atomically and durably; bytes given back, 0 if none is there.

    The others are copied as they are, their checksums with them: damage stays as visible as it was.

    Raises:
        ShardDamage: the file is missing, or its index is damaged.
        StoreError: it cannot be read now.
    """
    if (blob := read(file)) is None:
        raise ShardDamage("the shard file is missing")
    index = parse_index(blob[-index_bytes(shard_views) :], shard_views).copy()
    gone = [k for k in slots if index[k, 0] != ABSENT]
    if not gone:
        return 0
    index[gone] = ABSENT
    parts: list[bytes] = []
    at = 0
    for k in np.flatnonzero(index[:, 0] != ABSENT).tolist():
        offset, length = index[k].tolist()
        parts.append(blob[offset : offset + length])
        if len(parts[-1]) != length:
            raise ShardDamage("the index points beyond the end of the shard file")
        index[k] = at, length
        at += length
    raw = index.astype("<u8").tobytes()
    return len(blob) - put(file, *parts, raw + crc32c(raw).to_bytes(CRC_BYTES, "little"))


def shard_name(shard: int, dims: int) -> str:
    """The file name of a shard of an array of `dims` dimensions that is cut along the first one only."""
    return ".".join(["c", str(shard)] + ["0"] * (dims - 1))


class OpenShards:
    """Open shard files with their indexes, for the readers of all arrays together: descriptors are a process's own.

    The file used longest ago is closed first, as soon as nobody reads from it.
    """

    def __init__(self, *, max_open: int | None = None) -> None:
        """`max_open`: descriptors held at most (besides those in use at the moment); None: a share of the limit."""
        self._max_open = _descriptor_budget() if max_open is None else max_open
        self._lock = threading.Lock()
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._indexes: OrderedDict[str, tuple[tuple[int, ...], memoryview]] = OrderedDict()

    def get(self, file: str, *, views: int, ahead: bool) -> OpenShard:
        """The shard at `file`, of `views` views; it stays open for as long as it is referred to.

        Args:
            ahead: when it is opened, ask the system to read all of it ahead.

        Raises:
            ShardDamage: it is missing, or its index is damaged.
            ShardUnreachable: it cannot be opened now.
        """
        shard = self._open.get(file)
        if shard is not None:
            # Without the lock: each of the two is atomic, and a shard that is closed in between still serves.
            try:  # noqa: SIM105 (as fast as can be)
                self._open.move_to_end(file)
            except KeyError:
                pass
            return shard
        with self._lock:
            known = self._indexes.get(file)
        loaded = self._load(file, views, known)  # takes a while on network disks: no lock held
        if ahead and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(loaded.fd, 0, 0, os.POSIX_FADV_WILLNEED)
        with self._lock:
            shard = self._open.setdefault(file, loaded)
            self._open.move_to_end(file)
            self._indexes[file] = (loaded.identity, loaded.index)
            self._indexes.move_to_end(file)
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
            while len(self._indexes) > INDEXES_KEPT:
                self._indexes.popitem(last=False)
        return shard

    def forget(self, file: str) -> None:
        """Has `file` opened again when it is next asked for."""
        with self._lock:
            self._open.pop(file, None)
            self._indexes.pop(file, None)

    def close(self) -> None:
        with self._lock:
            self._open.clear()
            self._indexes.clear()

    def _load(self, file: str, views: int, known: tuple[tuple[int, ...], memoryview] | None) -> OpenShard:
        try:
            shard = OpenShard(open_for_reading(file))
        except FileNotFoundError:
            raise ShardDamage("the shard file is missing") from None
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                with self._lock:
                    self._open.clear()  # others need descriptors too; these can be had again
                with contextlib.suppress(OSError):
                    return self._indexed(OpenShard(open_for_reading(file)), views, known)
            raise trouble(error, "the shard file cannot be opened") from error
        return self._indexed(shard, views, known)

    def _indexed(self, shard: OpenShard, views: int, known: tuple[tuple[int, ...], memoryview] | None) -> OpenShard:
        """The shard with its index: the `known` one where it is of this very file."""
        shard.index = known[1] if known and known[0] == shard.identity else _read_index(shard, views)
        return shard


class OpenShard:
    """A shard file's descriptor, closed with the last reference to it, and its index."""

    index: memoryview
    """As of `flat_index`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        found = os.fstat(fd)
        self.size = found.st_size
        self.identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def __del__(self) -> None:
        os.close(self.fd)


class ShardReader:
    """`Shards` in local files.

    Args:
        node: the array's folder.
        dims: of the array.
        view_bytes: payload of a view.
        shard_views: views per file.
        files: whose descriptors to use; closing them is for whoever made them.
        ahead: bool per shard: those of which all will be wanted soon after some; None: none.
    """

    by_shard = False

    def __init__(
        self,
        *,
        node: Path,
        dims: int,
        view_bytes: int,
        shard_views: int,
        files: OpenShards,
        ahead: np.ndarray | None = None,
    ) -> None:
        self._before, self._after = f"{node / 'c'}.", ".0" * (dims - 1)
        self._size = view_bytes + CRC_BYTES
        self._per = shard_views
        self._files = files
        self._ahead = ahead

    def file(self, row: int) -> str:
        return f"{self._before}{row // self._per}{self._after}"

    def read(self, rows: Sequence[int], outs: Sequence[np.ndarray], *, verify: bool) -> list[int]:
        return [self.read_into(row, out, verify=verify) for row, out in zip(rows, outs, strict=True)]

    def forget(self, row: int) -> None:
        self._files.forget(self.file(row))

    def read_into(self, row: int, out: np.ndarray, *, verify: bool) -> int:
        """`read` of one view."""
        shard, slot = divmod(row, self._per)
        opened = self._files.get(
            f"{self._before}{shard}{self._after}",
            views=self._per,
            ahead=self._ahead is not None and bool(self._ahead[shard]),
        )
        offset = view_offset(opened.index, slot, size=self._size)
        crc = bytearray(CRC_BYTES)
        try:
            n = os.preadv(opened.fd, [out.data, crc], offset)
        except OSError as error:
            raise trouble(error, "reading failed") from error
        if n != self._size:
            _read_fully(opened.fd, [out.data, memoryview(crc)], offset)
        stored = int.from_bytes(crc, "little")
        if verify and (found := summed(0, out)) != stored:
            raise changed(found, stored)
        return stored


def view_offset(index: memoryview, slot: int, *, size: int) -> int:
    """Where a view's bytes begin in its shard; `size` are they, with their checksum.

    Raises:
        ShardDamage: it is not there, or has another size.
    """
    offset: int = index[2 * slot]
    if offset == ABSENT:
        raise ShardDamage("the view is absent from its shard")
    if index[2 * slot + 1] != size:
        raise ShardDamage(f"the index gives the view {index[2 * slot + 1]} bytes, expected {size}")
    return offset


def changed(found: int, stored: int, *, place: int = 0) -> ShardDamage:
    """What it means that a payload has another checksum than the one beside it."""
    return ShardDamage(f"payload checksum is {found:08x}, expected {stored:08x}: bytes have changed", place=place)


def index_bytes(views: int) -> int:
    """The size of the index at the end of a shard of `views` views."""
    return views * _ENTRY + CRC_BYTES


def parse_index(raw: bytes | bytearray | memoryview, views: int) -> np.ndarray:
    """uint64 [views, 2]: (offset, size) of each view, from the last `index_bytes` of a shard file.

    Raises:
        ShardDamage: it is too short, or its checksum differs.
    """
    if len(raw) != index_bytes(views):
        raise ShardDamage(f"the shard file is cut short: {len(raw)} bytes, its index alone has {index_bytes(views)}")
    body = bytes(raw[:-CRC_BYTES])
    if crc32c(body) != int.from_bytes(raw[-CRC_BYTES:], "little"):
        raise ShardDamage("the shard index is damaged or the file is cut short")
    return np.frombuffer(body, "<u8").reshape(views, 2)


def flat_index(index: np.ndarray) -> memoryview:
    """Offset and size of each view, one after another, `ABSENT` where there is none. Items are ints at once: an array
    takes longer to give one than the rest of finding a view.
    """
    return index.astype(np.uint64, copy=False).reshape(-1).data


def _read_index(shard: OpenShard, views: int) -> memoryview:
    n = index_bytes(views)
    if shard.size < n:
        raise ShardDamage(f"the shard file is cut short: {shard.size} bytes, its index alone has {n}")
    raw = bytearray(n)
    _read_fully(shard.fd, [memoryview(raw)], shard.size - n)
    return flat_index(parse_index(raw, views))


def _read_fully(fd: int, buffers: list[memoryview], offset: int) -> None:
    """`preadv` until every buffer is full; network file systems may return less at a time."""
    left = sum(map(len, buffers))
    while left:
        try:
            n = os.preadv(fd, buffers, offset)
        except OSError as error:
            raise trouble(error, "reading failed") from error
        if n == left:
            return
        if n == 0:
            raise ShardDamage("the shard file is cut short")
        offset += n
        left -= n
        while buffers and n >= len(buffers[0]):
            n -= len(buffers.pop(0))
        if buffers:
            buffers[0] = buffers[0][n:]


def trouble(error: OSError, what: str) -> ShardDamage | ShardUnreachable:
    """What an error of the system means for the shard it came with."""
    what = f"{what} ({error.strerror or error})"
    if error.errno is None or error.errno in _DAMAGE:
        return ShardDamage(what)
    return ShardUnreachable(what, outdated=error.errno == errno.ESTALE)


def open_for_reading(file: Path | str) -> int:
    """A descriptor that gives the file's bytes as they are, on Windows too.

    Raises:
        OSError: it cannot be opened.
    """
    return os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def _descriptor_budget() -> int:
    """An eighth of what the process may open, at most 256: training opens images and logs too."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 64
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 256 if soft == resource.RLIM_INFINITY else max(4, min(256, soft // 8))
