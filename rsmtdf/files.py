"""Files that are either whole or absent: write beside the target, fsync, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import os
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
        # Windows flushes only what may be written to.
        fd = os.open(temporary, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
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


def fsync_dir(path: Path) -> None:
    """Makes renames inside folder `path` durable (a no-op where folders cannot be opened, as on Windows)."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
