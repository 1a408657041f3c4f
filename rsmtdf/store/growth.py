"""How a store comes into being and grows. Every change ends with the replacement of the root's metadata.

Until then whatever was written lies past the committed rows, where nobody looks; a kill at any moment leaves the old
store or the new one. What a broken change left behind is overwritten by the next.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rsmtdf.errors import StoreError
from rsmtdf.files import PARTIAL, fsync_dir
from rsmtdf.objects import ObjectPath, StorePath
from rsmtdf.specs import STREAMS, DatasetSpec, Stream, ViewRecipe
from rsmtdf.store.arrays import (
    METADATA,
    PlainArray,
    array_metadata,
    chunk_length,
    group_metadata,
    set_length,
    write_metadata,
)
from rsmtdf.store.leases import locks_of
from rsmtdf.store.locks import LOCK_FILE
from rsmtdf.store.manifest import Column, Manifest, TileTable, commit, commit_first, library_versions
from rsmtdf.store.pixels import StoredPixels, resize_pixels
from rsmtdf.store.places import names, remove_tree
from rsmtdf.store.segments import HOLE_FILL, STRUCTURE, NewSegment, covered_rows, plan_growth, view_keys
from rsmtdf.store.status import StatusArray
from rsmtdf.store.stored_teacher import StoredTeacher, require_own_layout, resize_teacher
from rsmtdf.store.tiles import write_tiles

MAKING_TIMEOUT_S = 300.0
"""How long to wait for another process that is making the same store in object storage."""
TWINS = "provenance/twins"
"""Where second copies lie; see twins.py."""


def make_store(
    path: StorePath,
    *,
    recipe: ViewRecipe,
    dataset: DatasetSpec,
    data_root: str,
    experiment: Mapping[str, Any],
    shard_views: int,
) -> None:
    """Makes an empty store at `path`, which does not exist or is an empty folder. It appears whole or not at all.

    Raises:
        StoreError: something is there, the parent cannot be written, or `experiment` is no JSON data.
    """
    taken = (
        f"cannot make a feature store at {path}: something is there already. If another process has just made a store "
        "there, run the same command again to go on with it; otherwise choose another path"
    )
    if is_taken(path):
        raise StoreError(taken)
    if shard_views < 1:
        raise StoreError(f"a shard must hold at least 1 view, not {shard_views}")
    tiles = TileTable(count=0, id_bytes=0, bytes_chunk=4096, offsets_chunk=1024, sha256="")
    manifest = Manifest(
        recipe=recipe,
        dataset=dataset,
        data_root=data_root,
        experiment=experiment,
        versions=library_versions(),
        shard_views=shard_views,
        n_rows=0,
        tiles=tiles,
        segments=(),
        columns={},
        teachers={},
    )
    try:
        make_whole(path, lambda place: _write_nodes(place, manifest))
    except (TypeError, ValueError) as error:
        raise StoreError(f"the experiment's settings are no JSON data ({error}); {path} was not made") from error
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise StoreError(taken) from error
        raise StoreError(f"cannot make a feature store at {path}: {error.strerror}; nothing is left there") from error


def is_taken(path: StorePath) -> bool:
    """Whether something is at `path` that a new store must not replace."""
    if isinstance(path, ObjectPath):
        # Without the root's metadata the rest is what a creation that was cut short has left.
        return bool(set(names(path)) - {"tiles", "views", "teachers", "provenance"})
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def make_whole(path: StorePath, fill: Callable[[StorePath], Manifest]) -> None:
    """Makes a store appear at `path`, whole or not at all.

    Args:
        path: nothing is there, or an empty folder.
        fill: writes everything but the root's metadata to the place that it is given, and returns what these are for.

    Raises:
        OSError: it cannot be written, or a store has appeared there meanwhile (EEXIST, ENOTEMPTY).
    """
    if isinstance(path, ObjectPath):
        _make_objects(path, fill)
        return
    building = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        building.mkdir(parents=True)
        manifest = fill(building)
        (building / LOCK_FILE).touch()
        commit(building, manifest)
        os.rename(building, path)  # noqa: PTH104 - Path.rename would also replace a file
        fsync_dir(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _make_objects(path: ObjectPath, fill: Callable[[StorePath], Manifest]) -> None:
    """Makes the store in place: nothing is a store before its root's metadata, which come last."""
    locks = locks_of(path)
    with locks.mutex(timeout_s=MAKING_TIMEOUT_S):
        if (path / METADATA).exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        # What a creation that was cut short has left would be taken for this store's.
        for folder in ("tiles", "views", "teachers", TWINS):
            remove_tree(path / folder)
        manifest = fill(path)
        locks.still_held()
        if not commit_first(path, manifest):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _write_nodes(path: StorePath, manifest: Manifest) -> Manifest:
    """Writes everything of an empty store but the root's metadata, which the manifest returned is for."""
    for group in ("tiles", "views", "teachers"):
        write_metadata(path / group, group_metadata())
    write_metadata(path / "provenance", provenance_metadata())
    status = StatusArray(path=path / "views" / "status", shard_views=manifest.shard_views)
    write_metadata(status.path, status.metadata(0))
    return dataclasses.replace(manifest, tiles=write_tiles(path, manifest.tiles, old=(), new=()))


def provenance_metadata() -> dict[str, Any]:
    """A zero-length array, because tools that walk the tree look for metadata in groups, but never inside arrays."""
    return array_metadata(shape=(0,), dtype="uint8", chunk=(1,), dims=("unused",))


def grow_store(
    path: StorePath,
    manifest: Manifest,
    new: Sequence[NewSegment],
    *,
    tile_ids: Sequence[str],
    columns: Mapping[str, np.ndarray],
    teachers: Mapping[str, StoredTeacher],
    pixels: StoredPixels | None,
    on_step: Callable[[str], None],
    still_held: Callable[[], None],
) -> Manifest:
    """Appends segments and commits. The caller owns the store and all its shards.

    Args:
        path: the store.
        manifest: its committed state.
        new: segments to append.
        tile_ids: ids it knows.
        columns: its committed columns, all rows.
        teachers: its teachers.
        pixels: its stored pixels, if it has any.
        on_step: called after each step with its name; an error it raises ends the change there.
        still_held: raises where the caller does not own the store any more; asked before the commit.

    Returns:
        The new committed state.
    """
    for teacher in teachers.values():
        require_own_layout(teacher)
    growth = plan_growth(
        new,
        n_rows=manifest.n_rows,
        shard_views=manifest.shard_views,
        tile_index={t: k for k, t in enumerate(tile_ids)},
        column_types={n: c.dtype for n, c in manifest.columns.items() if n not in STRUCTURE},
        taken=_taken(manifest, columns),
    )
    try:
        views = StatusArray(path=path / "views" / "status", shard_views=manifest.shard_views)
        for status in (views, *(t.status for t in teachers.values()), *([pixels.status] if pixels else [])):
            status.forget_beyond(manifest.n_rows)
        on_step("old words")
        tiles = write_tiles(path, manifest.tiles, old=tile_ids, new=growth.new_tiles)
        on_step("tiles")
        entries: dict[str, Column] = {}
        for name, values in growth.columns.items():
            entries[name] = _append_column(path, manifest, name, values, columns.get(name))
            on_step(f"column {name}")
        set_length(path / "views" / "status", growth.n_rows)
        on_step("view status")
        for teacher in teachers.values():
            resize_teacher(teacher, growth.n_rows)
            on_step(f"teacher {teacher.name}")
        if pixels is not None:
            resize_pixels(pixels, growth.n_rows)
            on_step("pixels")
        grown = dataclasses.replace(
            manifest,
            n_rows=growth.n_rows,
            tiles=tiles,
            segments=manifest.segments + growth.segments,
            columns=entries,
        )
        still_held()
        commit(path, grown)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"cannot extend feature store {path}: {error.strerror} ({error.filename}); it is as it was before. "
            "Free space or fix the permissions, then run the same command again"
        ) from error
    on_step("commit")
    return grown


def settle(
    path: StorePath, manifest: Manifest, teachers: Mapping[str, StoredTeacher], pixels: StoredPixels | None
) -> None:
    """Sets every array's length to the committed one, where a change that was cut short left it longer.

    Our own reader looks at the manifest only; this is for other Zarr readers, to which all arrays must agree.
    """
    for name in manifest.columns:
        set_length(path / "views" / name, manifest.n_rows)
    set_length(path / "views" / "status", manifest.n_rows)
    set_length(path / "tiles" / "id_bytes", manifest.tiles.id_bytes)
    set_length(path / "tiles" / "id_offsets", manifest.tiles.count + 1)
    for teacher in teachers.values():
        resize_teacher(teacher, manifest.n_rows)
    if pixels is not None:
        resize_pixels(pixels, manifest.n_rows)


def column_array(path: StorePath, name: str, column: Column) -> PlainArray:
    return PlainArray(
        path=path / "views" / name, dtype=column.dtype, chunk=column.chunk, dim="view", fill=HOLE_FILL.get(name)
    )


def column_sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()).hexdigest()


def _append_column(
    path: StorePath, manifest: Manifest, name: str, values: np.ndarray, old: np.ndarray | None
) -> Column:
    """Writes a column's new rows and returns its new entry; a column the store did not have is filled before them."""
    keep = manifest.n_rows
    entry = manifest.columns.get(name)
    if entry is None or old is None:
        fill = np.nan if values.dtype.kind == "f" else HOLE_FILL.get(name, 0)
        old = np.full(keep, fill, dtype=values.dtype)
        entry = Column(dtype=values.dtype.name, chunk=chunk_length(keep + len(values)), sha256="")
        column_array(path, name, entry).replace_tail(np.concatenate([old, values]), keep=0)
    else:
        column_array(path, name, entry).replace_tail(values, keep=keep)
    return dataclasses.replace(entry, sha256=column_sha256(np.concatenate([old, values])))


def _taken(manifest: Manifest, columns: Mapping[str, np.ndarray]) -> dict[Stream, np.ndarray]:
    """Stream -> keys of the views the store has."""
    if not manifest.segments:
        return {}
    tile, seed = columns["tile"], columns["seed"]
    real = covered_rows(manifest.segments, manifest.n_rows)
    taken: dict[Stream, np.ndarray] = {}
    for code, stream in enumerate(STREAMS):
        rows = real & (columns["stream"] == code)
        if rows.any():
            taken[stream] = np.sort(view_keys(tile[rows], seed[rows]))
    return taken
