"""Every kind of image that people have: read as the RGB bytes it means, or refused with what to do. No memory is spent
on what a header merely claims.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp

from rsmtdf.data import raster
from rsmtdf.data.dataset import Dataset, usable_tiles
from rsmtdf.data.raster import read_header, read_pixels
from rsmtdf.errors import DatasetError
from rsmtdf.specs import DatasetSpec

SIDE = 32
Y, X = np.mgrid[:SIDE, :SIDE].astype(np.uint8)
RGB = np.stack([Y * 7 + 1, X * 7 + 3, (X + Y) * 3 + 5], axis=2)
"""Smooth, so that JPEG keeps it; no zeros."""
WHERE = np.s_[8:16, 4:20]
"""What the tests mark as invalid."""
HOLE = np.zeros((SIDE, SIDE), bool)
HOLE[WHERE] = True
NORTH_UP = rasterio.Affine(2, 0, 0, 0, -2, 0)
UNIT = tuple((0.0, 255.0) for _ in range(3))


def holed(values: np.ndarray, fill: float) -> np.ndarray:
    out = values.copy()
    out[WHERE] = fill
    return out


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path: Path, width: int, height: int, *, data: bytes = b"", interlaced: bool = False) -> Path:
    """An RGB PNG whose header claims a size; `data` is what its rows are unpacked from."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, int(interlaced))
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in parts))
    return path


# Kinds that are read: file name, how it is written, stated scaling, largest difference from RGB in bytes

Writer = Callable[[Path, Any], object]


def pillow(mode: str | None = None, **options: Any) -> Writer:
    def save(path: Path, write: Any) -> None:
        image = Image.fromarray(RGB)
        (image if mode is None else image.convert(mode)).save(path, **options)

    return save


def tiff(make: Callable[[], np.ndarray], **profile: Any) -> Writer:
    return lambda path, write: write(path, make(), **profile)


def deep_png(path: Path, write: Any) -> None:
    shape = {"height": SIDE, "width": SIDE, "count": 3, "dtype": "uint16", "transform": NORTH_UP}
    with rasterio.open(path, "w", driver="PNG", **shape) as out:
        out.write(np.moveaxis(RGB.astype(np.uint16) * 257, 2, 0))


def rgba_png(path: Path, write: Any) -> None:
    Image.fromarray(np.dstack([RGB, np.where(HOLE, 0, 255).astype(np.uint8)])).save(path)


def see_through_palette(path: Path, write: Any) -> None:
    """Three colours, of which index 2 is transparent: that of the hole."""
    index = holed(Y // 16, 2)
    image = Image.frombytes("P", (SIDE, SIDE), index.tobytes())
    image.putpalette([10, 20, 30, 200, 100, 50, 1, 2, 3])
    image.save(path, transparency=2)


def deep(dtype: str, factor: float, offset: float) -> Callable[[], np.ndarray]:
    return lambda: (RGB.astype(np.float64) * factor + offset).astype(dtype)


def limits(factor: float, offset: float) -> tuple[tuple[float, float], ...]:
    return tuple((offset, 255 * factor + offset) for _ in range(3))


READ: list[Any] = [
    pytest.param("a.png", pillow(), None, 0, id="png"),
    pytest.param("a.png", pillow("P", palette=1, colors=256), None, 60, id="palette-png"),
    pytest.param("a.jpg", pillow(quality=95, subsampling=0), None, 12, id="jpeg"),
    pytest.param("a.jpg", pillow(quality=95, subsampling=0, progressive=True), None, 12, id="progressive-jpeg"),
    pytest.param("a.jpg", pillow("CMYK", quality=95), None, 12, id="cmyk-jpeg"),
    pytest.param("a.png", pillow(interlace=1), None, 0, id="interlaced-png"),
    pytest.param("a.tif", tiff(lambda: RGB, compress="LZW", predictor=2), None, 0, id="lzw-tiff"),
    pytest.param("a.tif", tiff(lambda: RGB, interleave="band", compress="DEFLATE"), None, 0, id="planar-tiff"),
    pytest.param(
        "a.tif",
        tiff(lambda: RGB, compress="JPEG", photometric="YCBCR", tiled=True, blockxsize=16, blockysize=16),
        None,
        24,
        id="ycbcr-jpeg-in-tiff",
    ),
    pytest.param("a.tif", tiff(lambda: RGB, BIGTIFF="YES"), None, 0, id="bigtiff"),
    pytest.param("a.tif", tiff(deep("uint16", 257, 0)), limits(257, 0), 0, id="uint16-tiff"),
    pytest.param("a.png", deep_png, limits(257, 0), 0, id="uint16-png"),
    pytest.param("a.tif", tiff(deep("int16", 100, -12000)), limits(100, -12000), 0, id="int16-tiff"),
    pytest.param("a.tif", tiff(deep("int8", 1, -128)), limits(1, -128), 0, id="int8-tiff"),
    pytest.param("a.tif", tiff(deep("uint32", 1e7, 0)), limits(1e7, 0), 0, id="uint32-tiff"),
    pytest.param("a.tif", tiff(deep("int32", 1e6, -1e8)), limits(1e6, -1e8), 0, id="int32-tiff"),
    pytest.param("a.tif", tiff(deep("float32", 1 / 256, 0)), limits(1 / 256, 0), 0, id="float32-tiff"),
    pytest.param("a.tif", tiff(deep("float64", 1e-3, 5.0)), limits(1e-3, 5.0), 0, id="float64-tiff"),
]


@pytest.mark.parametrize(("name", "make", "scaling", "tolerance"), READ)
def test_kinds_that_are_read(tmp_path, write, name, make, scaling, tolerance):
    (tmp_path / "images").mkdir()
    make(tmp_path / "images" / name, write)
    spec = DatasetSpec(name="kinds", classes=("a",), palette=((0, 0, 0),), tile_px=SIDE, scaling=scaling)
    data = Dataset(spec, tmp_path)
    (tile,) = usable_tiles(data, data.tiles()).kept
    pixels, valid = data.read_image(tile)
    assert np.abs(pixels.astype(int) - RGB).max() <= tolerance
    assert valid.all()


# Kinds that say which pixels are not ground

MARKED: list[Any] = [
    pytest.param("a.png", rgba_png, UNIT, None, id="rgba-png"),
    pytest.param("a.png", see_through_palette, None, None, id="palette-with-transparency"),
    pytest.param("a.tif", tiff(lambda: holed(RGB, 0), nodata=0), None, None, id="nodata"),
    pytest.param("a.tif", tiff(lambda: holed(RGB, 0)), None, 0.0, id="nodata-by-the-spec"),
    pytest.param(
        "a.tif", tiff(lambda: RGB, mask=np.where(HOLE, 0, 255).astype(np.uint8)), None, None, id="internal-mask"
    ),
    pytest.param(
        "a.tif",
        tiff(lambda: np.dstack([RGB, np.where(HOLE, 0, 255).astype(np.uint8)]), photometric="RGB", alpha="YES"),
        None,
        None,
        id="rgba-tiff",
    ),
    pytest.param("a.tif", tiff(lambda: holed(RGB.astype(np.float32), np.nan)), UNIT, None, id="not-a-number"),
    pytest.param("a.tif", tiff(lambda: holed(RGB.astype(np.float32), np.inf)), UNIT, None, id="infinite"),
    pytest.param(
        "a.tif", tiff(lambda: holed(RGB.astype(np.float32), np.nan), nodata=np.nan), UNIT, None, id="nodata-is-nan"
    ),
    pytest.param(
        "a.tif", tiff(lambda: holed(RGB.astype(np.float32), -9999), nodata=-9999), UNIT, None, id="float-nodata"
    ),
    pytest.param(
        "a.tif", tiff(lambda: holed(RGB.astype(np.int16), -32768), nodata=-32768), UNIT, None, id="signed-nodata"
    ),
]


@pytest.mark.parametrize(("name", "make", "scaling", "nodata"), MARKED)
def test_invalid_pixels_are_known_and_black(tmp_path, write, name, make, scaling, nodata):
    (tmp_path / "images").mkdir()
    make(tmp_path / "images" / name, write)
    spec = DatasetSpec(name="kinds", classes=("a",), palette=((0, 0, 0),), tile_px=SIDE, scaling=scaling, nodata=nodata)
    data = Dataset(spec, tmp_path)
    (tile,) = data.tiles()
    pixels, valid = data.read_image(tile)
    assert np.array_equal(valid, ~HOLE)
    assert not pixels[HOLE].any()
    assert pixels[~HOLE].any(axis=1).all()


# Kinds that are no three colours

ODD: list[Any] = [
    pytest.param("b.png", pillow("L"), "1 colour band", id="grey-png"),
    pytest.param("b.png", pillow("LA"), "1 colour band", id="grey-and-alpha"),
    pytest.param("b.png", pillow("1"), "1 colour band", id="one-bit-png"),
    pytest.param("b.jpg", pillow("L"), "1 colour band", id="grey-jpeg"),
    pytest.param("b.tif", tiff(lambda: RGB[..., :2]), "2 colour band", id="two-bands"),
    pytest.param("b.tif", tiff(lambda: RGB.astype(np.complex64)), "expected one real type", id="complex"),
    pytest.param("b.png", lambda path, write: path.touch(), "cannot be opened", id="zero-bytes-png"),
    pytest.param("b.tif", lambda path, write: path.touch(), "cannot be opened", id="zero-bytes-tiff"),
    pytest.param("b.jpg", lambda path, write: path.write_bytes(b"\xff\xd8\xff"), "cannot be opened", id="stub-jpeg"),
    pytest.param("b.png", lambda path, write: path.write_text("<html>404"), "cannot be opened", id="html"),
]


@pytest.mark.parametrize(("name", "make", "reason"), ODD)
def test_a_few_images_of_another_kind_are_left_out_with_the_reason(tmp_path, write, picture, spec, name, make, reason):
    for good in "acd":
        write(tmp_path / f"images/{good}.png", picture(SIDE, SIDE))
    make(tmp_path / "images" / name, write)
    data = Dataset(spec, tmp_path)
    assert {tile.id for tile in data.tiles()} == {"a/0_0", "c/0_0", "d/0_0"}
    assert list(data.unreadable) == [f"images/{name}"]
    assert reason in data.unreadable[f"images/{name}"]
    assert usable_tiles(data, data.tiles()).unreadable == data.unreadable


def test_where_half_lack_bands_it_is_the_description_that_is_wrong(tmp_path, write, picture, spec):
    for grey in "ab":
        write(tmp_path / f"images/{grey}.png", picture(SIDE, SIDE, 1)[..., 0])
    for good in "cd":
        write(tmp_path / f"images/{good}.png", picture(SIDE, SIDE))
    with pytest.raises(DatasetError, match=r"a.png has 1 colour band.*`bands: \[1, 1, 1\]`"):
        Dataset(spec, tmp_path).tiles()
    assert len(Dataset(replace(spec, bands=(1, 1, 1)), tmp_path).tiles()) == 4


# Size


@pytest.fixture
def peak() -> Callable[[], int]:
    """Bytes of the process's memory at their highest."""
    import resource

    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_header_that_claims_a_terapixel_is_refused_at_once(tmp_path, write, picture, spec, peak):
    write(tmp_path / "images/good.png", picture(SIDE, SIDE))
    png(tmp_path / "images/liar.png", 10**6, 10**6)
    shape = {"height": 10**6, "width": 10**6, "count": 3, "dtype": "uint8", "transform": NORTH_UP}
    tiled = {"tiled": True, "blockxsize": 8192, "blockysize": 8192, "SPARSE_OK": True, "BIGTIFF": "YES"}
    with rasterio.open(tmp_path / "images/sparse.tif", "w", driver="GTiff", **shape, **tiled):
        pass
    before = peak()
    data = Dataset(spec, tmp_path)
    assert [tile.id for tile in data.tiles()] == ["good/0_0"]
    for name in ("liar.png", "sparse.tif"):
        assert "is 1,000,000 x 1,000,000 px; at most 68,719,476,736 pixels" in data.unreadable[f"images/{name}"]
    assert peak() - before < 50e6


def test_a_png_that_would_be_decoded_from_its_start_for_each_tile_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"a PNG of more than 536,870,912 pixels.*gdal_translate -co TILED=YES"):
        read_header(png(tmp_path / "a.png", 30_000, 30_000))
    assert read_header(png(tmp_path / "b.png", 23_170, 23_170)).width == 23_170


def test_an_interlaced_png_must_fit_into_memory(tmp_path):
    with pytest.raises(DatasetError, match=r"in blocks of 10,000 x 10,000: to read one pixel, 300 MB"):
        read_header(png(tmp_path / "a.png", 10_000, 10_000, interlaced=True))
    assert read_header(png(tmp_path / "b.png", 10_000, 10_000)).width == 10_000


def test_a_tiff_in_one_strip_must_fit_into_memory(tmp_path, monkeypatch, write):
    """The limit is lowered: writing such a file takes as much memory as reading it."""
    path = write(tmp_path / "a.tif", np.ones((512, 512, 3), np.uint8), compress="DEFLATE", blockysize=512)
    assert read_header(path).width == 512
    monkeypatch.setattr(raster, "MAX_BLOCK_BYTES", 512 * 512 * 3 - 1)
    with pytest.raises(DatasetError, match=r"in blocks of 512 x 512: .*gdal_translate -co TILED=YES"):
        read_header(path)
    tiled = write(tmp_path / "b.tif", np.ones((512, 512, 3), np.uint8), tiled=True, blockxsize=256, blockysize=256)
    assert read_header(tiled).width == 512


def test_a_bomb_of_a_png_is_read_by_rows(tmp_path, peak):
    """Two hundred megabytes of nothing in two hundred kilobytes: a window of it costs rows, not the image."""
    side = 8_000
    packer = zlib.compressobj(6)
    rows = b"\0" * ((1 + 3 * side) * 100)
    data = b"".join(packer.compress(rows) for _ in range(side // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    parts = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in parts))
    before = peak()
    pixels = read_pixels(path, read_header(path), bands=None, nodata=None, window=(64, 512, 64, 64))
    assert not pixels.bands.any()
    assert peak() - before < 80e6


def test_a_large_tiled_tiff_is_read_by_window(tmp_path, peak):
    """12 gigapixels, nearly all of them never written."""
    side = 110_000
    shape = {"height": side, "width": side, "count": 3, "dtype": "uint8", "transform": NORTH_UP}
    tiled = {"tiled": True, "blockxsize": 512, "blockysize": 512, "SPARSE_OK": True, "BIGTIFF": "YES"}
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "mosaic.tif"
    window = rasterio.windows.Window(99_840, 49_920, 512, 512)
    ramp = np.broadcast_to(np.arange(512, dtype=np.uint16) % 251 + 1, (3, 512, 512)).astype(np.uint8)
    with rasterio.open(path, "w", driver="GTiff", **shape, **tiled) as out:
        out.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
        out.write(ramp, window=window)
    before = peak()
    data = Dataset(DatasetSpec(name="big", classes=("a",), palette=((0, 0, 0),), tile_px=4096), tmp_path)
    pixels, valid = data.read_image(data.tile("mosaic/12_24"))
    assert valid.all()
    y, x = 49_920 - 12 * 4096, 99_840 - 24 * 4096
    assert np.array_equal(pixels[y : y + 512, x : x + 512, 0], ramp[0])
    assert pixels.any(axis=2).sum() == 512 * 512
    assert peak() - before < 400e6
