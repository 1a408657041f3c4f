"""Ownership in a store: one mutex for changes of its metadata, and claims on ranges of shards.

All of them are byte ranges of one file, so any number of shards costs one descriptor, and the kernel releases them
when their owner dies, kill -9 included. Linux's open-file-description locks are used: they hold between threads of
one process too, and no unrelated close() drops them, as it does with classic POSIX locks. Elsewhere one flock on
the whole file stands in, shared by all that one process owns: one writer per store.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import math
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from rsmtdf.errors import StoreBusy, StoreError

# Typed loosely, because what it holds differs between platforms; Windows has none.
fcntl: Any = importlib.import_module("fcntl") if os.name != "nt" else None

log = logging.getLogger(__name__)

LOCK_FILE = "provenance/locks"
"""In a store on a disk."""
_SLOT = 64
"""Bytes of the lock file per lock: they hold the owner's name, for the message of whoever is refused."""
_FLOCK = "hhqqi4x"
_BUSY = (errno.EAGAIN, errno.EACCES)
_POLL_S = 0.05


class Locks(Protocol):
    """Ownership in one store, wherever it lies."""

    def mutex(self, *, timeout_s: float) -> contextlib.AbstractContextManager[None]:
        """Holds the store's mutex, waiting for it at most `timeout_s`."""
        ...

    def claim(self, shards: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """Owns `shards` alone, all or none."""
        ...

    def all_shards(self, *, purpose: str) -> contextlib.AbstractContextManager[None]:
        """Owns every shard there is or will be; `purpose` is a verb for messages."""
        ...

    def still_held(self) -> None:
        """Passes while everything taken is still this process's; called before each commit."""
        ...


class StoreLocks:
    """The locks of a store on a disk. Slot 0 is the store's mutex, slot k + 1 the claim on shard k."""

    def __init__(self, *, store: Path, file: Path) -> None:
        self._store = store
        self._file = file
        self._whole = None if fcntl is None or _has_range_locks() else _WholeFile()

    @contextlib.contextmanager
    def mutex(self, *, timeout_s: float) -> Iterator[None]:
        """Holds the store's mutex, waiting for it at most `timeout_s`.

        Raises:
            StoreError: another process kept it for longer.
        """
        with self._open() as fd:
            deadline = time.monotonic() + timeout_s
            told = False
            while (owner := self._take(fd, 0, 1)) is not None:
                if not told:
                    log.info("waiting for %s, which is changing the feature store %s", owner, self._store)
                    told = True
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"feature store {self._store} is being changed by {owner} for more than {timeout_s:g} s; "
                        "wait until it has finished, or stop that process (its lock ends with it)"
                    )
                time.sleep(_POLL_S)
            yield

    @contextlib.contextmanager
    def claim(self, shards: Sequence[int]) -> Iterator[None]:
        """Owns `shards` alone, all or none.

        Raises:
            StoreBusy: one of them has another owner.
        """
        with self._open() as fd:
            for first, last in runs(shards):
                if (owner := self._take(fd, first + 1, last - first + 1)) is not None:
                    taken = self._taken(fd, first, last)
                    raise StoreBusy(
                        f"{taken} of feature store {self._store} is already claimed by {owner}; let it finish, "
                        "fill another store and merge the two, or stop that process (its claim ends with it)"
                    )
            yield

    @contextlib.contextmanager
    def all_shards(self, *, purpose: str) -> Iterator[None]:
        """Owns every shard there is or will be, which is refused while any writer holds a claim."""
        with self._open() as fd:
            if (owner := self._take(fd, 1, 0)) is not None:
                raise StoreBusy(
                    f"cannot {purpose} feature store {self._store} while {owner} is writing to it; "
                    "wait until it has finished, or stop that process"
                )
            yield

    def still_held(self) -> None:
        """Passes: the kernel takes no lock from a living process."""

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        try:
            self._file.parent.mkdir(exist_ok=True)  # a store whose notes were thrown away is a store
            fd = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StoreError(
                f"cannot write to feature store {self._store}: {error.strerror} ({self._file}); "
                "check its permissions, or use a copy on a disk that can be written"
            ) from error
        try:
            yield fd
        finally:
            if self._whole is not None:
                self._whole.release(fd)
            os.close(fd)  # which also unlocks ranges

    def _take(self, fd: int, slot: int, count: int) -> str | None:
        """Locks `count` slots from `slot` on (0: to infinity); None, or who has one of them."""
        if fcntl is None:
            return None  # no advisory locks: a single writer is the user's care, as the documentation says
        try:
            if self._whole is None:
                _lock(fd, slot * _SLOT, count * _SLOT)
            else:
                self._whole.take(fd, slot, count)
        except OSError as error:
            if error.errno in _BUSY:
                return self._owner(fd, slot, count)
            raise StoreError(
                f"the file system of feature store {self._store} has no file locks ({error.strerror}); "
                "write the store on a local or a POSIX network disk and copy it afterwards"
            ) from error
        note = f"process {os.getpid()} on {socket.gethostname()}".encode()[:_SLOT].ljust(_SLOT)
        if self._whole is None:
            os.pwrite(fd, note * max(count, 1), slot * _SLOT)
        else:
            os.pwrite(fd, note, 0)
        return None

    def _taken(self, fd: int, first: int, last: int) -> str:
        """For messages: which of the shards `first` to `last` somebody else has, as far as the kernel says."""
        if self._whole is not None:
            return f"shard {first}" if first == last else f"one of shards {first} to {last}"
        return f"shard {_first_locked(fd, (first + 1) * _SLOT, (last - first + 1) * _SLOT) // _SLOT - 1}"

    def _owner(self, fd: int, slot: int, count: int) -> str:
        at = _first_locked(fd, slot * _SLOT, count * _SLOT) if self._whole is None else 0
        note = os.pread(fd, _SLOT, at)
        return note.decode(errors="replace").strip(" \0") or "another process"


class _WholeFile:
    """The one flock behind everything that a `StoreLocks` owns, where a file's ranges cannot be locked.

    Taken with the first slot and given up with the last one; among themselves the owners are told apart here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shared = -1
        """A descriptor that the flock belongs to, while there are owners."""
        self._held: dict[int, list[tuple[int, float]]] = {}
        """Owner's descriptor -> first and one past the last of its slots."""

    def take(self, fd: int, slot: int, count: int) -> None:
        """Has the owner with descriptor `fd` hold `count` slots from `slot` on (0: to infinity).

        Raises:
            BlockingIOError: another owner has one of them, or another process has the file.
            OSError: the file system has no locks.
        """
        stop = slot + count if count else math.inf
        with self._lock:
            if any(slot < end and start < stop for held in self._held.values() for start, end in held):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            if not self._held:
                self._shared = self._flocked(fd)
            self._held.setdefault(fd, []).append((slot, stop))

    def release(self, fd: int) -> None:
        """Gives up all slots of the owner with descriptor `fd`, before it is closed."""
        with self._lock:
            if self._held.pop(fd, None) is not None and not self._held:
                # The first owner's descriptor may still be open, and shares the flock.
                fcntl.flock(self._shared, fcntl.LOCK_UN)
                os.close(self._shared)

    def _flocked(self, fd: int) -> int:
        """A copy of `fd` that holds the flock, and outlives its owner where others still need it."""
        shared = os.dup(fd)
        try:
            fcntl.flock(shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(shared)
            raise
        return shared


def runs(shards: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for k in sorted(set(shards)):
        if runs and runs[-1][1] == k - 1:
            runs[-1] = (runs[-1][0], k)
        else:
            runs.append((k, k))
    return runs


def _has_range_locks() -> bool:
    """Whether there are open-file-description locks; macOS has some too, with another `struct flock` than `_FLOCK`."""
    return sys.platform.startswith("linux") and hasattr(fcntl, "F_OFD_SETLK")


def _lock(fd: int, start: int, length: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0))


def _first_locked(fd: int, start: int, length: int) -> int:
    """Where in the range a conflicting lock begins."""
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0))
    kind, _, at, _, _ = struct.unpack(_FLOCK, found)
    return start if kind == fcntl.F_UNLCK else max(start, at)
