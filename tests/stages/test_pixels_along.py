"""Pixels that stage 1 stores along with features: written once, counted, and asked for where the disk is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rsmtdf.errors import StoreError
from rsmtdf.stages.cache.pixels import without_pixels
from rsmtdf.store.pixels import bytes_per_view
from tests.stages.test_fill import PER_SHARD, RECIPE, VIEWS, Means, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.store.add_pixels()
    return world


def files_of(world: World) -> dict[Path, tuple[int, int]]:
    """The files of the stored pixels, and what tells a file from one that was written in its place."""
    return {f: (f.stat().st_ino, f.stat().st_mtime_ns) for f in (world.store.path / "pixels").rglob("c.*")}


def test_another_teacher_leaves_stored_pixels_alone_and_all_bytes_are_counted(world: World) -> None:
    told: list[int] = []
    first = world.fill(Means("t"), progress=lambda views, written: told.append(written))
    files = files_of(world)
    second = world.fill(Means("u"))
    assert files
    assert files_of(world) == files
    pixels = first.bytes_written - second.bytes_written
    assert pixels >= VIEWS * bytes_per_view(RECIPE.crop_px, "weak")
    assert told[-1] == first.bytes_written == sum(row.bytes_written for row in first.ledger)


def test_pixels_that_another_teacher_finds_missing_are_stored(world: World) -> None:
    world.fill(Means("t"), shards=range(3))
    pixels = world.store.pixels
    assert pixels is not None
    pixels.status.chunk_file(1).unlink()
    world.fill(Means("u"))
    assert without_pixels(world.store, range(world.store.n_shards)) == {}


def test_shards_are_counted_whose_pixels_found_no_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, shards = os.replace, 5

    def full(source: str, target: str) -> None:
        """No room for pixels from the sixth shard on."""
        part = Path(target)
        if part.parent.name == "pixels" and part.name.startswith("c.") and int(part.name.split(".")[1]) >= shards:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StoreError) as caught:
            world.fill(Means("t"))
    committed = int((world.store.status("t") > 0).sum())
    bare = VIEWS - shards * PER_SHARD
    assert committed > shards * PER_SHARD
    assert f"This run committed {committed} views" in str(caught.value)
    assert f"{VIEWS - committed} views are missing, and the pixels of {bare}, " in str(caught.value)
