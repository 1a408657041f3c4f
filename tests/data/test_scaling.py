import numpy as np
import pytest
import yaml

from rsmtdf.data.raster import Pixels, read_header
from rsmtdf.data.scaling import suggest_scaling, to_bytes, yaml_line
from rsmtdf.errors import DatasetError


def test_limits_map_to_0_and_255_rounded_and_clipped():
    values = np.array([0, 100, 101, 300, 498, 500, 65535], np.uint16)
    pixels = Pixels(np.stack([values] * 3, axis=-1)[None], None)
    out = to_bytes(pixels, ((100, 500), (0, 65535), (0, 255)))
    # (101 - 100) / 400 * 255 = 0.64 -> 1; 498 -> 253.7 -> 254
    assert out[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255, 255]
    assert out[0, :, 1].tolist() == [0, 0, 0, 1, 2, 2, 255]
    assert out[0, :, 2].tolist() == [0, 100, 101, 255, 255, 255, 255]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_every_type_gives_the_same_bytes(dtype):
    values = np.arange(0, 126, dtype=dtype).reshape(6, 7, 3)
    limits = ((-10.0, 100.0), (0.0, 125.0), (30.0, 31.0))
    expected = to_bytes(Pixels(values.astype(np.float64), None), limits)
    assert np.array_equal(to_bytes(Pixels(values, None), limits), expected)


def test_negative_values_of_signed_types():
    out = to_bytes(Pixels(np.full((1, 1, 3), -50, np.int16), None), ((-100, 0),) * 3)
    assert out.tolist() == [[[128, 128, 128]]]


def test_bytes_pass_unchanged_and_invalid_pixels_are_black():
    data = np.full((2, 2, 3), 7, np.uint8)
    valid = np.array([[True, False], [True, True]])
    out = to_bytes(Pixels(data, valid), None)
    assert out[..., 0].tolist() == [[7, 0], [7, 7]]
    floats = np.full((2, 2, 3), np.nan, np.float32)
    assert not to_bytes(Pixels(floats, np.zeros((2, 2), bool)), ((0, 1),) * 3).any()


def test_the_proposal_is_the_2_to_98_percentile_over_all_scenes_without_nodata(tmp_path, write):
    ramp = np.arange(1, 10001, dtype=np.uint16).reshape(100, 100)
    first = np.stack([ramp, ramp, ramp], -1)
    second = first + 10000
    first[:50], empty = 0, np.zeros_like(first)
    scenes = []
    for name, data in [("a", first), ("b", second), ("c", empty)]:
        path = write(tmp_path / f"{name}.tif", data, nodata=0)
        scenes.append((path, read_header(path)))
    expected = np.percentile(np.r_[np.arange(5001, 10001), np.arange(10001, 20001)], [2, 98])
    scaling = suggest_scaling(scenes, bands=None, nodata=None)
    assert scaling == ((round(expected[0]), round(expected[1])),) * 3


def test_nothing_valid_proposes_nothing(tmp_path, write):
    path = write(tmp_path / "a.tif", np.zeros((8, 8, 3), np.uint16), nodata=0)
    with pytest.raises(DatasetError, match=r"none of 1 scene.*valid pixel"):
        suggest_scaling([(path, read_header(path))], bands=None, nodata=None)


@pytest.mark.parametrize(
    "scaling", [((0.0, 3000.0), (12.0, 2000.0), (1.0, 2.0)), ((-0.5, 1e-05), (0.123456, 1.5e10), (1e-7, 2.5e20))]
)
def test_the_line_is_yaml_and_means_the_same(scaling):
    parsed = yaml.safe_load(yaml_line(scaling))["scaling"]
    assert all(isinstance(x, int | float) for pair in parsed for x in pair)
    assert tuple(tuple(map(float, pair)) for pair in parsed) == scaling
