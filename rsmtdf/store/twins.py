"""Twins: a second copy, inside the store, of everything small that nothing could recompute.

Features are made again from images and teachers. The manifest, the columns, the tile ids and each teacher's attributes
and statistics are not: one flipped bit in the root's `zarr.json` would cost a store of terabytes. So each of those
files also lies in `provenance/twins`, under the same path, written after the change that it belongs to has been
committed. A reader never looks there; `restore` does, and takes a twin only where the file itself is damaged and the
twin is sound.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from rsmtdf.errors import StoreError
from rsmtdf.objects import StorePath
from rsmtdf.store.arrays import CRC_BYTES, METADATA, PlainArray, group_metadata, metadata_bytes
from rsmtdf.store.checksum import crc32c
from rsmtdf.store.growth import TWINS, column_array, column_sha256
from rsmtdf.store.manifest import KEY, Manifest, checked, load
from rsmtdf.store.places import names, put, read_each, remove_tree
from rsmtdf.store.tiles import tile_arrays, tiles_sha256

log = logging.getLogger(__name__)


def keep_twins(path: StorePath, manifest: Manifest) -> None:
    """Brings the second copies of the store at `path` up to date with its committed state.

    Files that are damaged are not copied, so a good twin is never lost to them. A twin that cannot be written is a
    warning: the change itself is committed. The caller holds the store's mutex.
    """
    files = [METADATA, *_irreplaceable(manifest)]
    try:
        data = dict(zip(files, _read(path, files), strict=True))
        twins = dict(zip(files, _read(path / TWINS, files), strict=True))
        if data == twins:
            return
        # Tables of other values than the manifest's may be whole all the same.
        wrong = {
            f for table in _tables(manifest) if not table.agrees([data[f] for f in table.files]) for f in table.files
        }
        for file in files:
            found = data[file]
            if found is not None and found != twins[file] and file not in wrong and _is_sound(file, found, manifest):
                put(path / TWINS / file, found)
        for gone in set(names(path / TWINS / "teachers")) - set(manifest.teachers):
            remove_tree(path / TWINS / "teachers" / gone)
    except (OSError, StoreError) as error:
        log.warning("%s: the second copy of its small files could not be written: %s", path, error)


def damaged_files(path: StorePath) -> list[str]:
    """Those files of the store at `path` that are damaged or missing and have a sound twin, relative to it.

    Raises:
        StoreError: as `rsmtdf.store.manifest.load`, where neither the root nor its twin can be read.
    """
    return [file for file, _ in _restorable(path)]


def twins_state(path: StorePath, manifest: Manifest) -> tuple[list[str], int]:
    """Twins of the store at `path` that are damaged, relative to it, and how many are missing or behind.

    `keep_twins` writes all of these again.
    """
    files = [METADATA, *_irreplaceable(manifest)]
    damaged, behind = [], 0
    for file, data, twin in zip(files, _read(path, files), _read(path / TWINS, files), strict=True):
        if twin is not None and not _is_sound(file, twin, manifest):
            damaged.append(f"{TWINS}/{file}")
        elif twin != data and _sound(file, data, manifest):
            behind += 1
    return damaged, behind


def restore_twins(path: StorePath) -> list[str]:
    """Puts the twin in place of every file that is damaged or missing; those files, relative to the store.

    The caller owns the store: its mutex and all shards.

    Raises:
        StoreError: as `damaged_files`.
        OSError: a file cannot be written.
    """
    restored = []
    for file, twin in _restorable(path):
        put(path / file, twin)
        restored.append(file)
    return restored


def _restorable(path: StorePath) -> Iterator[tuple[str, bytes]]:
    """(file, content of its twin), the root first."""
    root, twin_root = read_each([path / METADATA, path / TWINS / METADATA])
    if not _sound(METADATA, root, None) and twin_root is not None and _sound(METADATA, twin_root, None):
        yield METADATA, twin_root
        manifest = load(path / TWINS)
    else:
        manifest = load(path)
    files = list(_irreplaceable(manifest))
    data = dict(zip(files, _read(path, files), strict=True))
    twins = dict(zip(files, _read(path / TWINS, files), strict=True))
    restored = set()
    for file in files:
        twin = twins[file]
        if twin is not None and _is_sound(file, twin, manifest) and not _sound(file, data[file], manifest):
            restored.add(file)
            yield file, twin
    # Whole chunks that are not those of the manifest: another process's, say, or of another moment.
    for table in _tables(manifest):
        now = [twins[f] if f in restored else data[f] for f in table.files]
        if not table.agrees(now) and table.agrees([twins[f] for f in table.files]):
            changed = [f for f in table.files if f not in restored and twins[f] != data[f]]
            yield from ((f, twin) for f in changed if (twin := twins[f]) is not None)


@dataclass(frozen=True)
class _Table:
    """Chunks whose values have one digest in the manifest: a column, or the tile ids."""

    arrays: tuple[tuple[PlainArray, int], ...]
    """Each with its number of values."""
    sha256: str
    digest: Callable[..., str]

    @property
    def files(self) -> list[str]:
        return [f for array, n in self.arrays for f in _chunks(str(array.path), n, array.chunk)]

    def agrees(self, blobs: Sequence[bytes | None]) -> bool:
        """Whether these contents of `files` have the digest."""
        left, values = list(blobs), []
        for array, n in self.arrays:
            parts = [left.pop(0) for _ in range(-(-n // array.chunk))]
            if any(b is None or not _is_sound("c", b, None) or len(b) != _chunk_bytes(array) for b in parts):
                return False
            raw = b"".join(b[:-CRC_BYTES] for b in parts if b is not None)
            values.append(np.frombuffer(raw, np.dtype(array.dtype).newbyteorder("<"))[:n].astype(array.dtype))
        return self.digest(*values) == self.sha256


def _tables(manifest: Manifest) -> Iterator[_Table]:
    here = Path()
    for name, column in manifest.columns.items():
        array = column_array(here, name, column)
        yield _Table(arrays=((array, manifest.n_rows),), sha256=column.sha256, digest=column_sha256)
    if (tiles := manifest.tiles).count:
        id_bytes, id_offsets = tile_arrays(here, tiles)
        arrays = ((id_bytes, tiles.id_bytes), (id_offsets, tiles.count + 1))
        yield _Table(arrays=arrays, sha256=tiles.sha256, digest=tiles_sha256)


def _chunk_bytes(array: PlainArray) -> int:
    return array.chunk * np.dtype(array.dtype).itemsize + CRC_BYTES


def _irreplaceable(manifest: Manifest) -> Iterator[str]:
    """The files that are kept twice, besides the root's metadata."""
    tiles = manifest.tiles
    yield from _chunks("tiles/id_bytes", tiles.id_bytes, tiles.bytes_chunk)
    yield from _chunks("tiles/id_offsets", tiles.count + 1, tiles.offsets_chunk)
    for name, column in manifest.columns.items():
        yield from _chunks(f"views/{name}", manifest.n_rows, column.chunk)
    for name in manifest.teachers:
        yield from (f"teachers/{name}/{file}" for file in (METADATA, "channel_mean/c.0", "channel_std/c.0"))


def _chunks(array: str, length: int, chunk: int) -> Iterator[str]:
    yield from (f"{array}/c.{k}" for k in range(-(-length // chunk)))


def _sound(file: str, data: bytes | None, manifest: Manifest | None) -> bool:
    return data is not None and _is_sound(file, data, manifest)


def _is_sound(file: str, data: bytes, manifest: Manifest | None) -> bool:
    """Whether the content of one of these files agrees with the checksum that it carries, to the last byte.

    A teacher's metadata must also be those of the teacher that `manifest` names.
    """
    if file.rpartition("/")[2] != METADATA:
        return len(data) > CRC_BYTES and crc32c(data[:-CRC_BYTES]) == int.from_bytes(data[-CRC_BYTES:], "little")
    try:
        attributes = checked(json.loads(data)["attributes"][KEY], PurePosixPath(file))
    except (StoreError, ValueError, KeyError, TypeError):
        return False
    teacher = PurePosixPath(file).parent.name
    if manifest is not None and file != METADATA and attributes["digest"] != manifest.teachers.get(teacher):
        return False
    return data == metadata_bytes(group_metadata({KEY: attributes}))


def _read(root: StorePath, files: list[str]) -> list[bytes | None]:
    return read_each([root / file for file in files])
