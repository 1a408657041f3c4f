"""What a store asks of the place it lies in, whether a folder of this machine or a prefix of an object store.

Everywhere in a store a file is whole or absent: on a disk by temporary file, fsync and rename (`rsmtdf.files`), on an
object store by the put itself. Folders exist on disks only; on an object store they are part of the key.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rsmtdf.errors import StoreError
from rsmtdf.files import fsync_dir, whole_file
from rsmtdf.objects import ObjectPath, StorePath

PARALLEL_GETS = 32
"""Small objects fetched at a time: what counts there is the latency of a request."""
BEGUN_BYTES = 8 << 20
"""After as many the disk is set to work: it writes while the next are summed and copied, and less is left to fsync."""


def put(path: StorePath, *parts: bytes | np.ndarray) -> int:
    """Makes `path` the parts, one after another, atomically and durably; the bytes written.

    Args:
        path: the file; its folder is made where it is missing.
        parts: bytes, or contiguous uint8 arrays (which are not copied on a disk).

    Raises:
        OSError: it cannot be written; whatever was there before is untouched.
    """
    if isinstance(path, ObjectPath):
        data = (
            parts[0]
            if len(parts) == 1 and isinstance(parts[0], bytes)
            else b"".join(p if isinstance(p, bytes) else p.data for p in parts)
        )
        path.write_bytes(data)
        return len(data)
    try:
        return _put_file(path, parts)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _put_file(path, parts)


def put_each(path: StorePath, parts: Iterable[bytes | np.ndarray]) -> int:
    """As `put`, of parts that are made while those before are written; its folder is there."""
    if isinstance(path, ObjectPath):
        return put(path, *parts)
    return _put_file(path, parts)


def read(path: StorePath) -> bytes | None:
    """The content of a small file; None where there is none.

    Raises:
        StoreError: it cannot be read now, which says nothing about what is in it.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreachable(path, error) from error


def read_head(path: StorePath, length: int) -> bytes | None:
    """The first `length` bytes of a file that has as many; None where there is none.

    Raises:
        StoreError: as `read`.
    """
    try:
        if isinstance(path, ObjectPath):
            return bytes(path.read_ranges([0], [length])[0])
        with path.open("rb") as file:
            return file.read(length)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreachable(path, error) from error


@contextlib.contextmanager
def explained(path: StorePath) -> Iterator[None]:
    """Turns an OSError about a file of the store at `path` into a StoreError that says what to do.

    Raises:
        StoreError: a file of the store could not be read or written.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError) or not str(error.filename or "").startswith(str(path)):
            raise
        raise StoreError(
            f"feature store {path}: {error.strerror} ({error.filename}). Nothing half-written counts; free space, or "
            "mend the disk, the network or the permissions, then run the same command again"
        ) from error


def unreachable(path: StorePath, error: OSError) -> StoreError:
    """The error for what cannot be read now, whatever is in it."""
    if error.errno == errno.ENOTSUP:
        return StoreError(
            f"{path}: {error.strerror}. A store there can be trained from; for this, copy it to a disk or a bucket"
        )
    return StoreError(
        f"cannot read {path}: {error.strerror or error}. Nothing is known to be wrong with the store: check the disk, "
        "the network and the permissions, then run the same command again"
    )


def read_each(paths: Sequence[StorePath]) -> list[bytes | None]:
    """As `read` of each file; many requests at a time where each takes a while."""
    if paths and isinstance(paths[0], ObjectPath):
        with ThreadPoolExecutor(PARALLEL_GETS, thread_name_prefix="gets") as pool:
            return list(pool.map(read, paths))
    return [read(p) for p in paths]


def names(folder: StorePath) -> list[str]:
    """The names in a folder; none where it does not exist."""
    try:
        if isinstance(folder, ObjectPath):
            return folder.names()
        with os.scandir(folder) as entries:
            return [e.name for e in entries]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreachable(folder, error) from error


def can_list(folder: StorePath) -> bool:
    """Whether `names` works there; a plain web server cannot say what it has."""
    return not (isinstance(folder, ObjectPath) and folder.bucket.is_web)


def files(folder: StorePath) -> Iterator[StorePath]:
    """Every file below a folder."""
    if isinstance(folder, ObjectPath):
        yield from (folder / key for key, _ in _walk(folder))
    else:
        yield from (file for file in folder.rglob("*") if file.is_file())


def sizes(folder: StorePath) -> Iterator[tuple[str, int]]:
    """Name and bytes of each file below a folder; files that vanish meanwhile (temporary ones) do not count."""
    if isinstance(folder, ObjectPath):
        yield from ((key.rpartition("/")[2], n) for key, n in _walk(folder))
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    yield from sizes(Path(entry.path))
                else:
                    yield entry.name, entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue


def tree_bytes(folder: StorePath) -> int:
    """Bytes of all files below a folder."""
    return sum(n for _, n in sizes(folder))


def remove(path: StorePath) -> None:
    """Removes a file, durably, if it is there."""
    path.unlink(missing_ok=True)
    if isinstance(path, Path) and path.parent.is_dir():
        fsync_dir(path.parent)


def remove_tree(folder: StorePath) -> int:
    """Removes a folder and all below it, durably, if it is there; bytes given back."""
    if not isinstance(folder, ObjectPath) and not folder.is_dir():
        return 0
    freed = tree_bytes(folder)
    if isinstance(folder, ObjectPath):
        folder.remove_tree()
    else:
        shutil.rmtree(folder)
        fsync_dir(folder.parent)
    return freed


def size(path: StorePath) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return path.size() if isinstance(path, ObjectPath) else path.stat().st_size
    except FileNotFoundError:
        return None


def zarr_source(node: StorePath) -> Any:
    """What zarr-python opens the node from."""
    return node.zarr_store(read_only=True) if isinstance(node, ObjectPath) else node


def absolute(path: StorePath) -> str:
    """The path as it can be written down."""
    return str(path if isinstance(path, ObjectPath) else path.resolve())


def free_bytes(path: StorePath) -> int | None:
    """Free space where `path` lies or will lie; None where there is no limit (object stores)."""
    if isinstance(path, ObjectPath):
        return None
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _walk(folder: ObjectPath) -> list[tuple[str, int]]:
    try:
        return list(folder.walk())
    except OSError as error:
        raise unreachable(folder, error) from error


def _put_file(path: Path, parts: Iterable[bytes | np.ndarray]) -> int:
    with whole_file(path) as temporary, temporary.open("wb") as out:
        n = begun = 0
        for part in parts:
            n += out.write(part if isinstance(part, bytes) else part.data)
            if n - begun >= BEGUN_BYTES:
                out.flush()
                _begin_writing(out.fileno(), begun, n - begun)
                begun = n
        out.flush()
    return n


def _begin_writing(fd: int, start: int, length: int) -> None:
    """Has the system begin to write these bytes to the disk. It is said that they are not needed, which drops what is
    on the disk already: pages on their way there stay. Durable they are by fsync alone.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # advice only
            os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)
