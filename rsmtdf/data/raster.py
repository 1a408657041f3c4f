"""Reading rasters: headers, windows, which three bands are R, G, B, and which pixels are valid.

Everything goes through rasterio, with only the PNG, JPEG and TIFF drivers enabled: a file's name never decides how
it is read, and a crafted text file cannot make another driver open something else. A raster is opened for one read
and closed again: rasterio's objects are not thread-safe, and open handles do not survive pickling or a fork.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, Interleaving, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from rsmtdf.errors import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

_DRIVERS = ["PNG", "JPEG", "GTiff"]
# Listing the folder of every opened file is quadratic in a folder of 20,000 crops; TRUE still finds side-car files.
_GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "TRUE"}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_PX = 2**36
"""Of a raster (262,144 x 262,144): listing the tiles of a larger one would take hundreds of megabytes, and headers
that claim more are broken or made to exhaust whoever believes them."""
MAX_STREAMED_PX = 2**29
"""Of a PNG or JPEG (23,170 x 23,170): for each tile it is decoded from its first row on."""
MAX_BLOCK_BYTES = 2**28
"""Of what must be decoded in one piece to read one pixel: an interlaced PNG, or a strip or block of a TIFF."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a raster says about itself without its pixels being read."""

    width: int
    height: int
    count: int
    dtype: str
    """NumPy's name of the first band's type; all bands must agree."""
    colours: tuple[str, ...]
    """Colour interpretation per band: red, green, blue, alpha, gray, palette, undefined, ..."""
    nodata: tuple[float | None, ...]
    """The file's nodata value per band."""
    has_mask: bool
    """An internal or side-car mask of the whole raster (not alpha, not nodata)."""
    gsd_m: float | None
    """Pixel width in metres, where a projected coordinate system says so."""

    @property
    def alpha(self) -> int | None:
        """The 1-based alpha band."""
        return self.colours.index("alpha") + 1 if "alpha" in self.colours else None

    @property
    def colour_bands(self) -> tuple[int, ...]:
        """The 1-based bands that are not alpha."""
        return tuple(i for i, colour in enumerate(self.colours, start=1) if colour != "alpha")

    @property
    def is_palette(self) -> bool:
        return len(self.colour_bands) == 1 and self.colours[self.colour_bands[0] - 1] == "palette"

    @property
    def size(self) -> str:
        return f"{self.width} x {self.height}"

    def has_validity(self, nodata: float | None) -> bool:
        """Whether some pixel could be invalid, so that only reading tells which are."""
        marked = self.has_mask or self.alpha is not None or self.is_palette
        return marked or nodata is not None or self.dtype.startswith("float") or None not in self.nodata[:3]


@dataclass(frozen=True, slots=True)
class Pixels:
    """A window of three bands as stored, before scaling."""

    bands: np.ndarray
    """[h, w, 3] in the file's dtype."""
    valid: np.ndarray | None
    """bool [h, w]; None where every pixel is valid."""


@contextlib.contextmanager
def open_raster(path: Path) -> Iterator[DatasetReader]:
    """The raster at `path`, for one read in this thread.

    Raises:
        DatasetError: it is missing, not a PNG, JPEG or TIFF, truncated, larger than memory can be asked to bear, or a
            read inside the block fails.
    """
    _allow_missing_georeference()
    if not path.is_file():
        raise DatasetError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    _require_whole_png(path)
    with rasterio.Env(**_GDAL):
        try:
            # Not rasterio.open: the warning filter below is keyed to the module that makes this call.
            source = DatasetReader(path, driver=_DRIVERS)
        except RasterioError as error:
            raise DatasetError(f"{path} cannot be opened: {_reason(error, path)}") from error
        with source:
            _require_bearable(source, path)
            try:
                yield source
            except (RasterioError, MemoryError) as error:
                raise DatasetError(f"{path} cannot be read: {_reason(error, path)}") from error


def read_header(path: Path) -> Header:
    """The header of the raster at `path`.

    Raises:
        DatasetError: it cannot be opened, or its bands have different or complex types.
    """
    with open_raster(path) as source:
        if len(set(source.dtypes)) != 1 or np.dtype(source.dtypes[0]).kind not in "uif":
            raise DatasetError(f"{path} has bands of type {', '.join(source.dtypes)}; expected one real type")
        crs, metres = source.crs, None
        if crs is not None and crs.is_projected:
            metres = abs(source.transform.a) * float(crs.linear_units_factor[1])
        flags = source.mask_flag_enums[0]
        return Header(
            width=source.width,
            height=source.height,
            count=source.count,
            dtype=source.dtypes[0],
            colours=tuple(c.name for c in source.colorinterp),
            nodata=tuple(None if n is None else float(n) for n in source.nodatavals),
            has_mask=MaskFlags.per_dataset in flags and ColorInterp.alpha not in source.colorinterp,
            gsd_m=metres or None,
        )


def choose_bands(header: Header, bands: tuple[int, int, int] | None, *, where: str) -> tuple[int, ...]:
    """The 1-based bands that are R, G, B; one band where it is a palette image to be expanded.

    Raises:
        DatasetError: `bands` names one that is not there, or there are fewer than three colours.
    """
    if bands is not None:
        if missing := [b for b in bands if not 1 <= b <= header.count]:
            raise DatasetError(
                f"{where} has {header.count} band(s), but `bands: {list(bands)}` asks for band {missing[0]} "
                f"(bands are counted from 1)"
            )
        return bands
    if {"red", "green", "blue"} <= set(header.colours):
        return tuple(header.colours.index(colour) + 1 for colour in ("red", "green", "blue"))
    if len(header.colour_bands) >= 3:
        return header.colour_bands[:3]
    if header.is_palette:
        return header.colour_bands
    first = header.colour_bands[0] if header.colour_bands else 1
    raise DatasetError(
        f"{where} has {len(header.colour_bands)} colour band(s) ({header.dtype}), but three are needed; to show it "
        f"as grey, add `bands: [{first}, {first}, {first}]` to the data set's section of the YAML file"
    )


def is_guess(header: Header, bands: tuple[int, int, int] | None) -> bool:
    """Whether `choose_bands` falls back to the first three bands because no band is called red, green or blue."""
    return bands is None and not {"red", "green", "blue"} <= set(header.colours) and not header.is_palette


def read_pixels(
    path: Path,
    header: Header,
    *,
    bands: tuple[int, int, int] | None,
    nodata: float | None,
    window: tuple[int, int, int, int] | None = None,
    out_size: tuple[int, int] | None = None,
) -> Pixels:
    """Three bands of a window and its valid pixels.

    A pixel is invalid where all three bands equal nodata, any is not finite, alpha is 0, or the file's mask says so.

    Args:
        path: The raster.
        header: Its header, as `read_header` gave it.
        bands: 1-based bands for R, G, B, or None for the rule of `choose_bands`.
        nodata: Overrides the file's own nodata values.
        window: (x0, y0, width, height) in pixels; None for the whole raster.
        out_size: (height, width) to decimate to, nearest pixel; None for full resolution.
    """
    chosen = choose_bands(header, bands, where=str(path))
    area = None if window is None else Window(*window)
    height, width = out_size or (window[3], window[2]) if window else out_size or (header.height, header.width)
    with open_raster(path) as source:
        if (source.width, source.height) != (header.width, header.height):
            raise DatasetError(
                f"{path} is {source.width} x {source.height} now, but was {header.size} when the data set was "
                f"listed; do not change images while rsmtdf runs"
            )
        if header.is_palette and len(chosen) == 1:
            return _read_palette_image(source, chosen[0], area, (height, width))
        data = np.empty((height, width, 3), dtype=header.dtype)
        # GDAL writes straight into the interleaved array: no second pass over the pixels.
        source.read(list(chosen), window=area, out=np.moveaxis(data, 2, 0))
        valid = _finite(data)
        values = [nodata if nodata is not None else header.nodata[b - 1] for b in chosen]
        valid = _both(valid, _not_nodata(data, values))
        if header.alpha is not None:
            valid = _both(valid, source.read(header.alpha, window=area, out_shape=(height, width)) != 0)
        if header.has_mask:
            valid = _both(valid, source.read_masks(chosen[0], window=area, out_shape=(height, width)) != 0)
    return Pixels(data, None if valid is None or valid.all() else valid)


def _read_palette_image(source: DatasetReader, band: int, area: Window | None, shape: tuple[int, int]) -> Pixels:
    table = np.zeros((65536, 4), dtype=np.uint8)
    for index, colour in source.colormap(band).items():
        table[index] = colour
    rgba = table[source.read(band, window=area, out_shape=shape)]
    valid = rgba[..., 3] != 0
    return Pixels(np.ascontiguousarray(rgba[..., :3]), None if valid.all() else valid)


def _finite(data: np.ndarray) -> np.ndarray | None:
    if data.dtype.kind != "f":
        return None
    finite: np.ndarray = np.isfinite(data).all(axis=2)
    return finite


def _not_nodata(data: np.ndarray, values: list[float | None]) -> np.ndarray | None:
    """False where every band holds its nodata value; None where a band has none (or one its type cannot hold)."""
    invalid: np.ndarray | None = None
    for band, value in enumerate(values):
        if value is None or (data.dtype.kind != "f" and not _fits(value, data.dtype)):
            return None
        with np.errstate(over="ignore"):  # a float64 nodata of -1.8e308 in a float32 file
            hit = data[..., band] == np.asarray(value).astype(data.dtype)
        invalid = hit if invalid is None else invalid & hit
    return None if invalid is None else ~invalid


def _fits(value: float, dtype: np.dtype[Any]) -> bool:
    return float(value).is_integer() and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max


def _both(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    if a is None or b is None:
        return b if a is None else a
    both: np.ndarray = a & b
    return both


def _require_whole_png(path: Path) -> None:
    """Stops at a PNG that ends before its last chunk.

    GDAL's fast path for whole PNGs (3.10) reports broken bytes, but not missing ones: it returns the missing rows as
    uninitialised memory. Walking the chunk headers costs microseconds and keeps the fast path, twice as fast.
    """
    with path.open("rb") as file:
        if file.read(8) != _PNG_SIGNATURE:
            return
        end = file.seek(0, 2)
        file.seek(max(8, end - 12))
        if file.read(12)[4:8] == b"IEND":
            return
        position = 8
        while position + 8 <= end:
            file.seek(position)
            length, kind = file.read(4), file.read(4)
            if kind == b"IEND":
                return
            position += 12 + int.from_bytes(length, "big")
    raise DatasetError(f"{path} cannot be read: the PNG is truncated (it ends at byte {end}, before its IEND chunk)")


def _require_bearable(source: DatasetReader, path: Path) -> None:
    """Stops at a raster that cannot be read by window in bounded memory and time, before anything is decoded."""
    pixels, size = source.width * source.height, f"{path} is {source.width:,} x {source.height:,} px"
    if pixels > MAX_PX:
        raise DatasetError(
            f"{size}; at most {MAX_PX:,} pixels are read from one file. Cut it into several, if its header tells the "
            f"truth"
        )
    if source.driver in ("PNG", "JPEG") and pixels > MAX_STREAMED_PX:
        raise DatasetError(
            f"{size}; a {source.driver} of more than {MAX_STREAMED_PX:,} pixels is not read, because each tile of it "
            f"would be decoded from its first row on: make a tiled TIFF of it (gdal_translate -co TILED=YES)"
        )
    rows, columns = (source.height, source.width) if _is_interlaced(source, path) else source.block_shapes[0]
    bands = source.count if source.interleaving == Interleaving.pixel else 1
    block = rows * columns * bands * np.dtype(source.dtypes[0]).itemsize
    if block > MAX_BLOCK_BYTES:
        raise DatasetError(
            f"{size} in blocks of {columns:,} x {rows:,}: to read one pixel, {block / 1e6:,.0f} MB would have to be "
            f"decoded, and at most {MAX_BLOCK_BYTES / 1e6:,.0f} MB are; make a tiled TIFF of it "
            f"(gdal_translate -co TILED=YES)"
        )


def _is_interlaced(source: DatasetReader, path: Path) -> bool:
    """Whether a PNG is: then its first row is complete only at its end."""
    if source.driver != "PNG":
        return False
    with path.open("rb") as file:
        return file.read(29)[28:] == b"\x01"


def _reason(error: BaseException, path: Path) -> str:
    """The library's own words, without the repeated path and rasterio's pointer to the exception before it."""
    text = str(error.__cause__ or error) or type(error).__name__
    return text.replace(f"{path}: ", "").replace(f"'{path}' ", "").replace(f"{path}, ", "").strip()


def _allow_missing_georeference() -> None:
    """Lets this module, and only it, open rasters without coordinates in silence.

    Plain PNG tiles are the normal case here. `warnings.catch_warnings` would not be thread-safe; a filter keyed to
    this module is, and leaves the warning on for the caller's own use of rasterio. It is looked for at every call
    because others may reset the filters (pytest does, before each test).
    """
    module = re.escape(__name__)
    for action, _, category, pattern, _ in warnings.filters:
        if action == "ignore" and category is NotGeoreferencedWarning and getattr(pattern, "pattern", "") == module:
            return
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning, module=module)
