"""Land-cover maps on disk: a GeoTIFF with the source's georeference, or a palette PNG with an overlay.

A map holds class indices, 255 where the source had no valid pixel. It is written block by block under another name
and renamed at the end, so an interrupted or failed run leaves nothing that looks like a map.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image, PngImagePlugin
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetWriter

from rsmtdf.errors import ConfigError
from rsmtdf.files import whole_file
from rsmtdf.inference.windows import Box
from rsmtdf.specs import IGNORE_INDEX

TILE_PX = 256
"""Side of a GeoTIFF's internal tiles. Blocks must be multiples: a compressed tile written twice wastes its space."""

_PNG_MAX_PX = 100_000_000
_OVERLAY_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class MapFrame:
    """Size and place of a map: those of its source. `crs`, `transform` and `gcps` as rasterio has them, or None."""

    width: int
    height: int
    crs: Any = None
    transform: Any = None
    gcps: Any = None
    """(points, their crs)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Legend:
    """What the indices of a map mean; `tags` go into the file as they are."""

    classes: Sequence[str]
    palette: Sequence[tuple[int, int, int]]
    tags: Mapping[str, str]


class MapWriter(Protocol):
    """An open map."""

    def write(self, box: Box, labels: np.ndarray, rgb: np.ndarray) -> None:
        """Writes class indices uint8 [h, w] of a box; `rgb` uint8 [h, w, 3] is the source there."""
        ...


def map_format(path: Path) -> Literal["tif", "png"]:
    """The format a map's name asks for.

    Raises:
        ConfigError: another suffix than .tif, .tiff or .png.
    """
    suffix = path.suffix.lower()
    if suffix in {".tif", ".tiff"}:
        return "tif"
    if suffix == ".png":
        return "png"
    lossy = "; JPEG would blur class indices" if suffix in {".jpg", ".jpeg"} else ""
    raise ConfigError(f"cannot write a map to {path}: give a name that ends in .tif or .png{lossy}")


def overlay_path(path: Path) -> Path:
    """Where the overlay of a PNG map goes."""
    return path.with_name(f"{path.stem}.overlay.png")


def outputs(path: Path) -> list[Path]:
    """The files that a map at `path` consists of."""
    return [path] if map_format(path) == "tif" else [path, overlay_path(path)]


def check_destination(path: Path, *, overwrite: bool) -> None:
    """Stops before any work if a map cannot be written to `path`.

    Raises:
        ConfigError: a wrong suffix, no such folder, no right to write there, or a file is there already.
    """
    for output in outputs(path):
        if output.is_dir():
            raise ConfigError(f"cannot write a map to {output}: it is a folder; give a file name in it")
        if output.exists() and not overwrite:
            raise ConfigError(f"{output} exists already; give another name, or --overwrite to replace it")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"cannot write a map to {path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write a map to {path}: no right to write in {folder}")


@contextlib.contextmanager
def open_map(path: Path, frame: MapFrame, legend: Legend) -> Iterator[MapWriter]:
    """A map to be written, whole or not at all.

    Raises:
        ConfigError: see `map_format`, a PNG too large to be held in memory, or a disk that cannot be written to.
    """
    if map_format(path) == "tif":
        try:
            with whole_file(path) as part, _create_geotiff(part, frame) as dataset:
                yield _GeoTiffMap(dataset, legend)
        except (RasterioError, OSError) as error:
            # Reading the source raises errors of its own, so these are of writing: a full disk, a share that is gone.
            raise ConfigError(f"cannot write a map to {path}: {error}; nothing is left there") from error
        return
    if frame.width * frame.height > _PNG_MAX_PX:
        raise ConfigError(
            f"a PNG of {frame.width} x {frame.height} px would have to be held in memory; write {path.stem}.tif instead"
        )
    png = _PngMap(frame)
    try:
        with whole_file(path) as part, whole_file(overlay_path(path)) as overlay_part:
            yield png
            png.save(part, overlay_part, legend)
    except OSError as error:
        raise ConfigError(f"cannot write a map to {path}: {error}; nothing is left there") from error


class _GeoTiffMap:
    def __init__(self, dataset: DatasetWriter, legend: Legend) -> None:
        self._dataset = dataset
        dataset.write_colormap(1, _colours(legend))
        dataset.update_tags(**legend.tags)
        dataset.update_tags(1, **{f"CLASS_{i}": name for i, name in enumerate(legend.classes)})
        dataset.set_band_description(1, "class")

    def write(self, box: Box, labels: np.ndarray, rgb: np.ndarray) -> None:
        del rgb
        window = ((box.y0, box.y0 + box.height), (box.x0, box.x0 + box.width))
        self._dataset.write(labels, 1, window=window)


class _PngMap:
    def __init__(self, frame: MapFrame) -> None:
        self._labels = np.full((frame.height, frame.width), IGNORE_INDEX, np.uint8)
        self._rgb = np.zeros((frame.height, frame.width, 3), np.uint8)

    def write(self, box: Box, labels: np.ndarray, rgb: np.ndarray) -> None:
        area = (slice(box.y0, box.y0 + box.height), slice(box.x0, box.x0 + box.width))
        self._labels[area], self._rgb[area] = labels, rgb

    def save(self, path: Path, overlay: Path, legend: Legend) -> None:
        colours = np.zeros((256, 3), np.uint8)
        colours[: len(legend.palette)] = legend.palette
        info = PngImagePlugin.PngInfo()
        for key, value in legend.tags.items():
            info.add_text(key, value)
        for i, name in enumerate(legend.classes):
            info.add_text(f"CLASS_{i}", name)
        image = Image.fromarray(self._labels)
        image.putpalette(colours.tobytes())  # makes it a palette image: the values stay
        image.save(path, "PNG", transparency=IGNORE_INDEX, pnginfo=info)
        mixed = _OVERLAY_SHARE * colours[self._labels] + (1 - _OVERLAY_SHARE) * self._rgb
        mixed[self._labels == IGNORE_INDEX] = self._rgb[self._labels == IGNORE_INDEX]
        Image.fromarray(np.rint(mixed).astype(np.uint8)).save(overlay, "PNG")


def _create_geotiff(path: Path, frame: MapFrame) -> DatasetWriter:
    module = re.escape(__name__)
    # Maps in pixel space are legitimate (the stage says so once); this silences rasterio's warning for this call only.
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning, module=module)
    place: dict[str, Any] = {"crs": frame.crs} if frame.crs is not None else {}
    if frame.gcps is not None:
        place = {"gcps": frame.gcps[0], "crs": frame.gcps[1]}
    elif frame.transform is not None:
        place["transform"] = frame.transform
    return DatasetWriter(
        path,
        "w",
        driver="GTiff",
        width=frame.width,
        height=frame.height,
        count=1,
        dtype="uint8",
        nodata=IGNORE_INDEX,
        **place,
        tiled=True,
        blockxsize=TILE_PX,
        blockysize=TILE_PX,
        compress="deflate",
        BIGTIFF="IF_SAFER",
    )


def _colours(legend: Legend) -> dict[int, tuple[int, int, int, int]]:
    return {**{i: (*rgb, 255) for i, rgb in enumerate(legend.palette)}, IGNORE_INDEX: (0, 0, 0, 0)}
