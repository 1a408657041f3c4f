import concurrent.futures
import warnings

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning

from rsmtdf.data.raster import choose_bands, is_guess, read_header, read_pixels
from rsmtdf.errors import DatasetError


def read(path, bands=None, nodata=None, **options):
    return read_pixels(path, read_header(path), bands=bands, nodata=nodata, **options)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_pixels_come_back_as_written(tmp_path, write, picture, name):
    image = picture(20, 30)
    pixels = read(write(tmp_path / name, image))
    assert np.array_equal(pixels.bands, image)
    assert pixels.valid is None


def test_a_window_is_a_part_of_the_whole(tmp_path, write, picture):
    image = picture(20, 30)
    for name in ("a.png", "a.tif"):
        pixels = read(write(tmp_path / name, image), window=(5, 3, 10, 7))
        assert np.array_equal(pixels.bands, image[3:10, 5:15])


def test_colour_interpretation_decides_before_the_order(tmp_path, write, picture):
    image = picture(8, 8)
    order = [ColorInterp.blue, ColorInterp.green, ColorInterp.red]
    path = write(tmp_path / "bgr.tif", image, photometric="MINISBLACK", colours=order)
    assert choose_bands(read_header(path), None, where="x") == (3, 2, 1)
    assert np.array_equal(read(path).bands, image[..., ::-1])
    assert np.array_equal(read(path, bands=(1, 2, 3)).bands, image), "stated bands win"


def test_without_names_the_first_three_bands_are_taken_and_it_is_called_a_guess(tmp_path, write, picture):
    image = picture(8, 8, 5)
    path = write(tmp_path / "five.tif", image, photometric="MINISBLACK")
    header = read_header(path)
    assert is_guess(header, None)
    assert not is_guess(header, (1, 2, 3))
    assert np.array_equal(read(path).bands, image[..., :3])
    assert np.array_equal(read(path, bands=(4, 1, 2)).bands, image[..., [3, 0, 1]])


def test_alpha_is_a_mask_not_a_colour(tmp_path, write, picture):
    image = picture(8, 8, 4)
    image[:4, :, 3] = 0
    for name in ("a.png", "a.tif"):
        path = write(tmp_path / name, image, **({"photometric": "RGB", "alpha": "YES"} if name == "a.tif" else {}))
        pixels = read(path)
        assert np.array_equal(pixels.bands, image[..., :3])
        assert not pixels.valid[:4].any()
        assert pixels.valid[4:].all()


def test_a_pixel_is_nodata_only_where_all_used_bands_are(tmp_path, write, picture):
    image = picture(8, 8, 4)
    image[0, 0] = 0
    image[0, 1, :2] = 0
    image[0, 2, :3] = 0  # the fourth band is not used
    path = write(tmp_path / "n.tif", image, photometric="MINISBLACK", nodata=0)
    valid = read(path).valid
    assert not valid[0, 0]
    assert valid[0, 1]
    assert not valid[0, 2]
    assert valid[1:].all()
    assert read(path, bands=(4, 1, 2)).valid[0, 2], "another choice of bands, another answer"


def test_the_specs_nodata_overrides_the_files(tmp_path, write, picture):
    image = picture(8, 8)
    image[0, 0], image[0, 1] = 0, 7
    path = write(tmp_path / "n.tif", image, nodata=0)
    valid = read(path, nodata=7.0).valid
    assert valid[0, 0]
    assert not valid[0, 1]


def test_a_nodata_that_the_type_cannot_hold_marks_nothing(tmp_path, write, picture):
    assert read(write(tmp_path / "a.png", picture(8, 8)), nodata=-9999.0).valid is None


def test_internal_mask(tmp_path, write, picture):
    mask = np.full((8, 8), 255, np.uint8)
    mask[2:4] = 0
    path = write(tmp_path / "m.tif", picture(8, 8), mask=mask)
    assert read_header(path).has_mask
    assert np.array_equal(read(path).valid, mask > 0)
    assert np.array_equal(read(path, window=(1, 1, 5, 4)).valid, mask[1:5, 1:6] > 0)


def test_not_a_number_is_invalid(tmp_path, write):
    image = np.ones((4, 4, 3), np.float32)
    image[0, 0, 1], image[0, 1, 2] = np.nan, np.inf
    valid = read(write(tmp_path / "f.tif", image)).valid
    assert valid.sum() == 14
    assert not valid[0, 0]
    assert not valid[0, 1]


def test_a_palette_image_is_expanded_to_its_colours(tmp_path, picture):
    from PIL import Image

    image = (picture(8, 8) // 128) * 255
    Image.fromarray(image).quantize(8).save(tmp_path / "p.png")
    assert np.array_equal(read(tmp_path / "p.png").bands, image)


def test_one_band_says_what_to_set(tmp_path, write, picture):
    path = write(tmp_path / "grey.tif", picture(8, 8, 1).astype(np.uint16))
    with pytest.raises(DatasetError, match=r"grey.tif has 1 colour band\(s\) \(uint16\).*`bands: \[1, 1, 1\]`"):
        read(path)
    grey = read(path, bands=(1, 1, 1)).bands
    assert np.array_equal(grey[..., 0], grey[..., 2])


def test_a_band_that_is_not_there(tmp_path, write, picture):
    with pytest.raises(DatasetError, match=r"a.png has 3 band\(s\).*\[4, 1, 2\].*band 4"):
        read(write(tmp_path / "a.png", picture(8, 8)), bands=(4, 1, 2))


@pytest.mark.parametrize("name", ["t.png", "t.jpg", "t.tif"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_a_truncated_file_is_an_error_naming_it(tmp_path, write, picture, name, keep):
    # GDAL's fast path for whole PNGs returns uninitialised rows here, without an error.
    path = write(tmp_path / name, picture(200, 200))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(DatasetError, match=rf"{name} cannot be (opened|read): \S+"):
        read(path)


def test_a_png_with_bytes_after_its_end_is_whole(tmp_path, write, picture):
    image = picture(8, 8)
    path = write(tmp_path / "a.png", image)
    path.write_bytes(path.read_bytes() + b"garbage after the last chunk")
    assert np.array_equal(read(path).bands, image)


def test_no_image_at_all(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.tif").touch()
    (tmp_path / "folder.png").mkdir()
    for name, reason in [
        ("text.png", "cannot be opened"),
        ("empty.tif", "cannot be opened"),
        ("gone.png", "not exist"),
        ("folder.png", "is not a file"),
    ]:
        with pytest.raises(DatasetError, match=rf"{name}.*{reason}"):
            read_header(tmp_path / name)


def test_other_drivers_stay_closed(tmp_path, write, picture):
    write(tmp_path / "a.png", picture(8, 8))
    vrt = (
        '<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{tmp_path}/a.png</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    (tmp_path / "b.png").write_text(vrt)
    with pytest.raises(DatasetError, match=r"b.png cannot be opened"):
        read_header(tmp_path / "b.png")


def test_an_image_that_changed_its_size_since_it_was_listed(tmp_path, write, picture):
    path = write(tmp_path / "a.png", picture(8, 8))
    header = read_header(path)
    write(path, picture(8, 9))
    with pytest.raises(DatasetError, match=r"9 x 8 now, but was 8 x 8"):
        read_pixels(path, header, bands=None, nodata=None)


def test_resolution_in_metres(tmp_path, write, picture):
    metres = rasterio.Affine(0.5, 0, 0, 0, -0.5, 0)
    assert read_header(write(tmp_path / "m.tif", picture(8, 8), crs="EPSG:32633", transform=metres)).gsd_m == 0.5
    feet = read_header(write(tmp_path / "f.tif", picture(8, 8), crs="EPSG:2263", transform=metres)).gsd_m
    assert feet == pytest.approx(0.5 * 0.3048, rel=1e-4)
    assert read_header(write(tmp_path / "d.tif", picture(8, 8), crs="EPSG:4326", transform=metres)).gsd_m is None
    assert read_header(write(tmp_path / "n.png", picture(8, 8))).gsd_m is None


def test_silence_about_coordinates_ends_at_this_module(tmp_path, write, picture):
    path = write(tmp_path / "a.png", picture(8, 8))
    read(path)
    with pytest.warns(NotGeoreferencedWarning), rasterio.open(path):
        pass


def test_threads_neither_warn_nor_mix_up(tmp_path, write, picture):
    images = [picture(64, 64, seed=i) for i in range(8)]
    paths = [write(tmp_path / f"{i}.png", image) for i, image in enumerate(images)]
    with warnings.catch_warnings(record=True) as caught, concurrent.futures.ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        results = list(pool.map(lambda i: read(paths[i % 8]).bands, range(64)))
    assert all(np.array_equal(result, images[i % 8]) for i, result in enumerate(results))
    assert not caught
