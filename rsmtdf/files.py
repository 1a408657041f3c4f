"""Files that are either whole or absent: write beside the target, fsync, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on leaving without an error it becomes `path`, durably.

    On an error nothing is left behind and an existing `path` is untouched.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        yield temporary
        fd = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`, atomically and durably."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def free_bytes(path: Path) -> int:
    """Space left on the disk of `path`, which need not exist yet."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def remove_tree(folder: Path) -> int:
    """Removes `folder` and all below it, durably; bytes given back. A no-op where there is none."""
    if not folder.is_dir():
        return 0
    freed = 0
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            freed += path.lstat().st_size
            path.unlink()
    if folder.is_symlink():
        folder.unlink()
    else:
        folder.rmdir()
    fsync_dir(folder.parent)
    return freed


def fsync_dir(path: Path) -> None:
    """Makes renames inside folder `path` durable (a no-op where folders cannot be opened, as on Windows)."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
