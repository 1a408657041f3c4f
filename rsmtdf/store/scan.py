"""Reading whole shard files from front to back, and summing every view: how `cache verify` reaches disk speed.

A shard's payloads lie one after another, so a few megabytes at a time are read into one reused buffer and summed view
by view. google_crc32c holds the interpreter's lock while it sums (12 GB/s), reading does not: a few threads keep the
disk busy while one of them sums, and more would gain nothing.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rsmtdf.objects import ObjectPath, StorePath
from rsmtdf.store.arrays import CRC_BYTES
from rsmtdf.store.checksum import crc32c
from rsmtdf.store.codecs import EncodedArray
from rsmtdf.store.pixels import Payload
from rsmtdf.store.places import unreachable
from rsmtdf.store.shards import (
    ABSENT,
    ShardDamage,
    ShardUnreachable,
    index_bytes,
    open_for_reading,
    parse_index,
    shard_name,
    trouble,
)
from rsmtdf.store.status import DONE, crc_of, state_of

BLOCK_BYTES = 8 << 20
"""Read at a time: large enough for any disk, small enough for the processor's cache."""

Finding = tuple[int, StorePath, str]
"""Slot in the shard, file, what is wrong."""


class ShardScanner:
    """Checks shards of any teacher, from any number of threads; each thread has one buffer."""

    def __init__(self) -> None:
        self._local = threading.local()

    def scan(self, teacher: Payload, shard: int, words: np.ndarray) -> tuple[list[Finding], int]:
        """What is wrong with the views of one shard, and the bytes read.

        Args:
            teacher: whose features; or stored pixels, with the arrays that this shard has.
            shard: its number.
            words: uint64 [shard_views], the committed status words: those that are done are checked.

        Raises:
            ShardUnreachable, StoreError: a file cannot be read now, which says nothing about its bytes.
        """
        expected = crc_of(words)
        slots = np.flatnonzero(state_of(words) == DONE).tolist()
        sums = dict.fromkeys(slots, 0)
        found: dict[int, Finding] = {}
        read = 0
        for array in teacher.arrays:
            file = teacher.path / array.name / shard_name(shard, 1 + len(array.shape))
            try:
                read += self._scan_file(file, array, teacher.shard_views, sums, found)
            except ShardDamage as damage:  # of the file as a whole
                for slot in slots:
                    found.setdefault(slot, (slot, file, str(damage)))
        file = teacher.path / teacher.arrays[0].name / shard_name(shard, 1 + len(teacher.arrays[0].shape))
        for slot in slots:
            if slot not in found and sums[slot] != expected[slot]:
                what = f"checksum is {sums[slot]:08x}, the status word says {int(expected[slot]):08x}"
                found[slot] = (slot, file, what)
        return [found[slot] for slot in sorted(found)], read

    def _scan_file(
        self, file: StorePath, array: EncodedArray, views: int, sums: dict[int, int], found: dict[int, Finding]
    ) -> int:
        """Checks the views in `sums`, which go on with this array's bytes; the length of the file.

        Raises:
            ShardDamage: no view can be read from it.
        """
        entry = array.view_bytes + CRC_BYTES
        buffer = self._buffer(entry)
        with _opened(file, views) as opened:
            index = _index(opened, views)
            _check_extent(index, opened.size - index_bytes(views), entry)
            for block in _blocks(index, sorted(sums), entry, len(buffer) // entry, file, found):
                start = int(index[block[0], 0])
                memory = buffer[: len(block) * entry].data
                try:
                    opened.read(memory, start)
                except OSError:
                    self._one_by_one(opened, block, start, entry, file, sums, found)
                    continue
                for k, slot in enumerate(block):
                    _sum(buffer[k * entry : (k + 1) * entry], slot, file, sums, found)
        return opened.size

    def _one_by_one(
        self,
        opened: _Opened,
        block: Sequence[int],
        start: int,
        entry: int,
        file: StorePath,
        sums: dict[int, int],
        found: dict[int, Finding],
    ) -> None:
        """The views of a block that cannot be read at once: a bad sector need not cost its neighbours."""
        buffer = self._buffer(entry)
        for k, slot in enumerate(block):
            try:
                opened.read(buffer[:entry].data, start + k * entry)
            except OSError as error:
                damage = trouble(error, "reading failed")
                if isinstance(damage, ShardUnreachable):
                    raise damage from error
                found.setdefault(slot, (slot, file, str(damage)))
            else:
                _sum(buffer[:entry], slot, file, sums, found)

    def _buffer(self, entry: int) -> np.ndarray:
        """This thread's buffer, uint8, of at least one view."""
        have: np.ndarray | None = getattr(self._local, "buffer", None)
        if have is None or len(have) < entry:
            have = self._local.buffer = np.empty(max(BLOCK_BYTES, entry), np.uint8)
        return have


class _Opened(Protocol):
    """A shard file to read from."""

    @property
    def size(self) -> int: ...

    def read(self, memory: memoryview, offset: int) -> None:
        """Fills `memory`.

        Raises:
            OSError: the file cannot be read, or ends before.
        """
        ...


@dataclass(frozen=True)
class _OpenFile:
    fd: int
    size: int

    def read(self, memory: memoryview, offset: int) -> None:
        _read(self.fd, memory, offset)


class _OpenObject:
    """A shard in object storage. A request that fails says nothing about what is stored, so it ends the check."""

    def __init__(self, path: ObjectPath, *, tail: int) -> None:
        self._path = path
        with self._told():
            self._tail, self.size = path.read_tail(tail)

    def read(self, memory: memoryview, offset: int) -> None:
        if offset + len(memory) > self.size:
            raise OSError("the shard file is cut short")
        if offset + len(memory) == self.size and len(memory) <= len(self._tail):
            memory[:] = self._tail[len(self._tail) - len(memory) :]
            return
        with self._told():
            memory[:] = self._path.read_ranges([offset], [len(memory)])[0]

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise ShardDamage("the shard file is missing") from None
        except OSError as error:
            raise unreachable(self._path, error) from error


@contextlib.contextmanager
def _opened(file: StorePath, views: int) -> Iterator[_Opened]:
    if isinstance(file, ObjectPath):
        yield _OpenObject(file, tail=index_bytes(views))
        return
    try:
        fd = open_for_reading(file)
    except FileNotFoundError:
        raise ShardDamage("the shard file is missing") from None
    except OSError as error:
        raise trouble(error, "the shard file cannot be opened") from error
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        yield _OpenFile(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _index(opened: _Opened, views: int) -> np.ndarray:
    raw = bytearray(min(index_bytes(views), opened.size))
    try:
        opened.read(memoryview(raw), opened.size - len(raw))
    except OSError as error:
        raise trouble(error, "reading its index failed") from error
    return parse_index(bytes(raw), views)


def _check_extent(index: np.ndarray, end: int, entry: int) -> None:
    """Payloads of equal size must fill the file from its start to its index, in the order of their views.

    Raises:
        ShardDamage: they do not.
    """
    there = index[index[:, 0] != ABSENT]
    if (there[:, 1] != entry).any():
        raise ShardDamage(f"the index gives a view {int(there[there[:, 1] != entry][0, 1])} bytes, expected {entry}")
    if not np.array_equal(there[:, 0], np.arange(len(there), dtype=np.uint64) * np.uint64(entry)):
        raise ShardDamage("the index does not put its views one after another")
    if len(there) * entry != end:
        raise ShardDamage(f"its {len(there)} views end at byte {len(there) * entry}, but its index begins at {end}")


def _blocks(
    index: np.ndarray, slots: Sequence[int], entry: int, most: int, file: StorePath, found: dict[int, Finding]
) -> Iterator[list[int]]:
    """Runs of neighbouring views, at most `most` each; views that are absent are findings."""
    block: list[int] = []
    for slot in slots:
        if int(index[slot, 0]) == ABSENT:
            found.setdefault(slot, (slot, file, "the view is absent from its shard"))
            continue
        if block and (len(block) == most or int(index[slot, 0]) != int(index[block[-1], 0]) + entry):
            yield block
            block = []
        block.append(slot)
    if block:
        yield block


def _sum(entry: np.ndarray, slot: int, file: StorePath, sums: dict[int, int], found: dict[int, Finding]) -> None:
    """Compares a view's bytes with the checksum after them, and goes on with its sum over all arrays."""
    payload, stored = entry[:-CRC_BYTES], int.from_bytes(entry[-CRC_BYTES:].tobytes(), "little")
    crc = crc32c(payload)
    if crc != stored:
        what = f"payload checksum is {crc:08x}, expected {stored:08x}: bytes have changed"
        found.setdefault(slot, (slot, file, what))
    sums[slot] = crc32c(payload, start=sums[slot]) if sums[slot] else crc


def _read(fd: int, memory: memoryview, offset: int) -> None:
    """Fills `memory`; network file systems may return less at a time.

    Raises:
        OSError: the file cannot be read, or ends before.
    """
    while len(memory):
        n = os.preadv(fd, [memory], offset) if hasattr(os, "preadv") else _read_plainly(fd, memory, offset)
        if n == 0:
            raise OSError("the shard file is cut short")
        memory, offset = memory[n:], offset + n


def _read_plainly(fd: int, memory: memoryview, offset: int) -> int:
    """As `preadv`, where there is none; the descriptor is this thread's alone."""
    os.lseek(fd, offset, os.SEEK_SET)
    data = os.read(fd, len(memory))
    memory[: len(data)] = data
    return len(data)
