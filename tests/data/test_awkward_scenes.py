"""The generated awkward scenes, read back: bands by number, 16 bits, nodata against alpha, an odd number of tiles."""

import numpy as np
import pytest

from rsmtdf.data.check import check_dataset
from rsmtdf.data.dataset import Dataset, usable_tiles
from rsmtdf.testing.scenes import write_awkward_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_awkward_scenes(tmp_path_factory.mktemp("awkward"))


def test_deep_and_alpha_twins_are_the_same_data_set(scenes):
    deep, alpha = Dataset(scenes.deep_spec, scenes.deep), Dataset(scenes.alpha_spec, scenes.alpha)
    assert len(deep.tiles()) + len(deep.left_out) == scenes.tiles
    assert [t.id for t in deep.tiles()] == [t.id for t in alpha.tiles()]
    for one, other in zip(deep.tiles(), alpha.tiles(), strict=True):
        (rgb, valid), (twin_rgb, twin_valid) = deep.read_image(one), alpha.read_image(other)
        area = np.s_[one.y0 : one.y0 + one.height, one.x0 : one.x0 + one.width]
        expected = np.zeros_like(valid)
        expected[: one.height, : one.width] = scenes.valid[one.scene][area]
        assert np.array_equal(valid, expected)
        assert np.array_equal(twin_valid, expected)
        assert np.abs(rgb.astype(int) - twin_rgb).max() <= 1, "one byte of rounding through 16 bits"
        label = deep.read_label(one)
        assert np.array_equal(label, alpha.read_label(other))
        inner = label[: one.height, : one.width]
        if one.mask is None:
            assert (label == 255).all()
        else:
            known = inner != 255
            assert known.any()
            assert np.array_equal(inner[known], scenes.labels[one.scene][area][known])
    assert usable_tiles(deep, deep.tiles()).left_out == usable_tiles(alpha, alpha.tiles()).left_out
    assert check_dataset(deep).ok
    assert check_dataset(alpha).ok
