from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rsmtdf.data.masks import MaskRule, read_labels
from rsmtdf.errors import DatasetError

VALUES = np.array([[0, 1, 2, 255]] * 4, np.uint8)


def read(path, spec, size=(4, 4), **options):
    return read_labels(path, MaskRule.of(spec), spec=spec, size=size, image="images/a.png", **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_an_index_band_is_class_indices(tmp_path, write, spec, dtype):
    path = write(tmp_path / "m.tif", VALUES.astype(dtype))
    assert np.array_equal(read(path, spec), VALUES)
    assert read(path, spec).dtype == np.uint8
    assert np.array_equal(read(path, spec, window=(1, 0, 2, 3)), VALUES[:3, 1:3])


def test_a_palette_png_is_indices_unless_its_colours_are_asked_for(tmp_path, spec):
    image = Image.fromarray(VALUES % 3)
    image.putpalette([0, 0, 255, 255, 0, 0, 0, 128, 0])
    image.save(tmp_path / "m.png")
    assert np.array_equal(read(tmp_path / "m.png", spec), VALUES % 3)
    colours = np.array([2, 1, 0], np.uint8)[VALUES % 3]
    assert np.array_equal(read(tmp_path / "m.png", replace(spec, mask_encoding="rgb")), colours)


def test_three_bands_are_colours_of_the_palette(tmp_path, write, spec):
    labels = VALUES % 3
    colours = np.array(spec.palette, np.uint8)[labels]
    assert np.array_equal(read(write(tmp_path / "m.png", colours), spec), labels)
    transparent = np.dstack([colours, np.full((4, 4), 255, np.uint8)])
    transparent[0, :, 3] = 0
    found = read(write(tmp_path / "a.png", transparent), spec)
    assert (found[0] == 255).all()
    assert np.array_equal(found[1:], labels[1:])


def test_a_colour_can_be_mapped_to_ignored(tmp_path, write, spec):
    colours = np.zeros((4, 4, 3), np.uint8)
    colours[0] = (255, 0, 0)
    path = write(tmp_path / "m.png", colours)
    with pytest.raises(DatasetError, match=r"m.png holds colour \(0, 0, 0\) \(12 pixels\)"):
        read(path, replace(spec, mask_encoding="rgb"))
    found = read(path, replace(spec, label_map=((0x000000, 255),)))
    assert (found[0] == 1).all()
    assert (found[1:] == 255).all()


def test_label_map_replaces_the_identity(tmp_path, write, spec):
    path = write(tmp_path / "m.png", np.array([[10, 20, 30, 255]] * 4, np.uint8))
    assert read(path, replace(spec, label_map=((10, 2), (20, 255), (30, 0))))[0].tolist() == [2, 255, 0, 255]
    assert read(path, replace(spec, label_map=((10, 2), (20, 0), (30, 0), (255, 1))))[0].tolist() == [2, 0, 0, 1]
    with pytest.raises(DatasetError, match=r"value 30 \(4 pixels\).*one of 10, 20, or 255"):
        read(path, replace(spec, label_map=((10, 2), (20, 0))))
    with pytest.raises(DatasetError, match=r"maps 10 to 3.*expected 0..2 or 255"):
        MaskRule.of(replace(spec, label_map=((10, 3),)))


def test_equal_bands_are_indices_where_the_encoding_says_so(tmp_path, write, spec):
    path = write(tmp_path / "m.png", np.dstack([VALUES] * 3))
    assert np.array_equal(read(path, replace(spec, mask_encoding="index")), VALUES)
    with pytest.raises(DatasetError, match=r"all grey.*`mask_encoding: index`"):
        read(path, spec)
    rgb = write(tmp_path / "rgb.png", np.array(spec.palette, np.uint8)[VALUES % 3])
    with pytest.raises(DatasetError, match=r"3 bands that differ.*`mask_encoding: rgb`"):
        read(rgb, replace(spec, mask_encoding="index"))
    grey = write(tmp_path / "grey.png", VALUES)
    with pytest.raises(DatasetError, match=r"1 colour band\(s\).*`mask_encoding: index`"):
        read(grey, replace(spec, mask_encoding="rgb"))


def test_a_value_outside_the_classes_names_file_value_count_and_what_it_may_be(tmp_path, write, spec):
    values = VALUES.copy()
    values[0, :3] = 77
    values[1, 0] = 9
    path = write(tmp_path / "odd.png", values)
    message = r"odd.png holds value 77 \(3 pixels\), value 9 \(1 pixels\); expected one of 0, 1, 2, or 255.*RGB.*0/255"
    with pytest.raises(DatasetError, match=message):
        read(path, spec)
    ignored = read(path, replace(spec, unknown_labels="ignore"))
    assert (ignored[0, :3] == 255).all()
    assert ignored[1].tolist() == [255, 1, 2, 255]


def test_a_jpeg_mask_is_called_by_its_name(tmp_path, write, spec):
    colours = np.array(spec.palette, np.uint8)[np.random.default_rng(0).integers(0, 3, (16, 16))]
    with pytest.raises(DatasetError, match="JPEG changes colours"):
        read(write(tmp_path / "m.jpg", colours), spec, size=(16, 16))


def test_the_masks_own_nodata_is_ignored_unless_it_is_a_class(tmp_path, write, spec):
    assert read(write(tmp_path / "a.tif", VALUES + 0 * 1, nodata=0), spec)[0].tolist() == [0, 1, 2, 255]
    sevens = np.where(VALUES == 2, 7, VALUES).astype(np.uint8)
    assert read(write(tmp_path / "b.tif", sevens, nodata=7), spec)[0].tolist() == [0, 1, 255, 255]


def test_float_masks_must_hold_whole_numbers(tmp_path, write, spec):
    values = VALUES.astype(np.float32)
    values[0, 0] = np.nan
    assert read(write(tmp_path / "a.tif", values), spec)[0].tolist() == [255, 1, 2, 255]
    values[0, 0] = 0.5
    with pytest.raises(DatasetError, match="float32 and holds fractions"):
        read(write(tmp_path / "b.tif", values), spec)


def test_another_size_than_the_image_names_both(tmp_path, write, spec):
    path = write(tmp_path / "m.png", VALUES)
    with pytest.raises(DatasetError, match=r"m.png is 4 x 4, but its image images/a.png is 5 x 4"):
        read(path, spec, size=(5, 4))
