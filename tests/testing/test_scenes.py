"""The generated fixtures are what they say they are, read through the real data code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rsmtdf.data.dataset import Dataset
from rsmtdf.data.raster import read_header
from rsmtdf.data.synthetic import World
from rsmtdf.testing.scenes import write_awkward_scenes, write_folder


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_the_awkward_scenes_and_their_alpha_twins_hold_the_same_ground(tmp_path: Path, world: World) -> None:
    scenes = write_awkward_scenes(tmp_path, world=world)
    header = read_header(scenes.deep / "images" / "north.tif")
    assert (header.count, header.dtype, header.nodata[0]) == (4, "uint16", 65535)
    assert "red" not in header.colours
    assert header.gsd_m == pytest.approx(0.3)
    assert read_header(scenes.alpha / "images" / "north.tif").alpha == 4
    assert scenes.tiles % 2 == 1

    deep, alpha = Dataset(scenes.deep_spec, scenes.deep), Dataset(scenes.alpha_spec, scenes.alpha)
    tiles = deep.tiles()
    assert [t.id for t in tiles] == [t.id for t in alpha.tiles()]
    assert len(tiles) + len(deep.left_out) == scenes.tiles
    assert {t.scene for t in tiles if t.mask is None} == {"corner"}
    for tile in tiles:
        area = (slice(tile.y0, tile.y0 + tile.height), slice(tile.x0, tile.x0 + tile.width))
        inside = (slice(tile.height), slice(tile.width))
        (rgb, valid), (other, other_valid) = deep.read_image(tile), alpha.read_image(alpha.tile(tile.id))
        assert np.array_equal(valid[inside], scenes.valid[tile.scene][area])
        assert np.array_equal(other_valid, valid)
        assert np.array_equal(rgb, other)
        if tile.mask is not None:
            label = deep.read_label(tile)[inside]
            counted = label != 255
            assert np.array_equal(label[counted], scenes.labels[tile.scene][area][counted])
    assert all(0.4 < v.mean() < 0.95 for v in scenes.valid.values())


@pytest.mark.parametrize("masks", ["index", "palette", "rgb"])
@pytest.mark.parametrize("images", ["png", "jpg", "tif"])
def test_folders_read_alike_in_every_form(tmp_path: Path, world: World, masks: str, images: str) -> None:
    spec = write_folder(tmp_path, scenes=2, size=(40, 52), masks=masks, images=images, unlabelled=1, world=world)
    plain = write_folder(tmp_path / "plain", scenes=2, size=(40, 52), unlabelled=1, world=world)
    found, expected = Dataset(spec, tmp_path), Dataset(plain, tmp_path / "plain")
    first, second = found.tiles()
    assert first.mask is not None
    assert second.mask is None
    twin = expected.tile(first.id)
    assert np.array_equal(found.read_label(first), expected.read_label(twin))
    error = np.abs(found.read_image(first)[0].astype(int) - expected.read_image(twin)[0])
    assert error.mean() < (6 if images == "jpg" else 1e-9)
