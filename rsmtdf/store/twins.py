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
from collections.abc import Iterator
from pathlib import PurePosixPath

from rsmtdf.errors import StoreError
from rsmtdf.objects import StorePath
from rsmtdf.store.arrays import CRC_BYTES, METADATA, group_metadata, metadata_bytes
from rsmtdf.store.checksum import crc32c
from rsmtdf.store.manifest import KEY, Manifest, checked, load
from rsmtdf.store.places import names, put, read_each, remove_tree

log = logging.getLogger(__name__)

TWINS = "provenance/twins"


def keep_twins(path: StorePath, manifest: Manifest) -> None:
    """Brings the second copies of the store at `path` up to date with its committed state.

    Files that are damaged are not copied, so a good twin is never lost to them. A twin that cannot be written is a
    warning: the change itself is committed. The caller holds the store's mutex.
    """
    files = [METADATA, *_irreplaceable(manifest)]
    try:
        for file, data, twin in zip(files, _read(path, files), _read(path / TWINS, files), strict=True):
            if data is not None and data != twin and _is_sound(file, data):
                put(path / TWINS / file, data)
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


def damaged_twins(path: StorePath, manifest: Manifest) -> list[str]:
    """Twins of the store at `path` that are there and damaged, relative to it; `keep_twins` writes them again."""
    files = [METADATA, *_irreplaceable(manifest)]
    pairs = zip(files, _read(path / TWINS, files), strict=True)
    return [f"{TWINS}/{file}" for file, twin in pairs if twin is not None and not _is_sound(file, twin)]


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
    if not _sound(METADATA, root) and twin_root is not None and _sound(METADATA, twin_root):
        yield METADATA, twin_root
        manifest = load(path / TWINS)
    else:
        manifest = load(path)
    files = list(_irreplaceable(manifest))
    for file, data, twin in zip(files, _read(path, files), _read(path / TWINS, files), strict=True):
        if twin is not None and _sound(file, twin) and not _sound(file, data):
            yield file, twin


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


def _sound(file: str, data: bytes | None) -> bool:
    return data is not None and _is_sound(file, data)


def _is_sound(file: str, data: bytes) -> bool:
    """Whether the content of one of these files agrees with the checksum that it carries, to the last byte."""
    if file.rpartition("/")[2] != METADATA:
        return len(data) > CRC_BYTES and crc32c(data[:-CRC_BYTES]) == int.from_bytes(data[-CRC_BYTES:], "little")
    try:
        attributes = checked(json.loads(data)["attributes"][KEY], PurePosixPath(file))
    except (StoreError, ValueError, KeyError, TypeError):
        return False
    return data == metadata_bytes(group_metadata({KEY: attributes}))


def _read(root: StorePath, files: list[str]) -> list[bytes | None]:
    return read_each([root / file for file in files])
