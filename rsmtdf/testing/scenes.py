"""Generated images that are awkward the way real ones are, and tiny folder data sets in every supported form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp

from rsmtdf.data.synthetic import CLASSES, PALETTE, World
from rsmtdf.specs import DatasetSpec

TILE_PX = 64
SCALING = ((300.0, 4300.0), (250.0, 4250.0), (200.0, 4200.0))
"""What `write_awkward_scenes` multiplied the bytes by: (low, high) of R, G, B of its 16-bit scenes."""

MaskKind = Literal["index", "palette", "rgb"]
ImageKind = Literal["png", "jpg", "tif"]

_CRS = "EPSG:32650"
_GSD_M = 0.3
_NODATA = 65535
# (name, height, width, has a mask): no side a multiple of the tile, 3x4 + 2x3 + 1x1 = 19 tiles, an odd number.
_SCENES = (("north", 170, 230, True), ("south", 100, 150, True), ("corner", 50, 40, False))


@dataclass(frozen=True, slots=True, kw_only=True)
class AwkwardScenes:
    """Two folder data sets of the same ground: `deep` 4-band uint16, `alpha` 8-bit RGBA. Scenes have equal names."""

    deep: Path
    alpha: Path
    deep_spec: DatasetSpec
    alpha_spec: DatasetSpec
    tiles: int
    """Tiles of each, those with too few valid pixels included."""
    valid: dict[str, np.ndarray]
    """Scene name -> bool [h, w]."""
    labels: dict[str, np.ndarray]
    """Scene name -> class index uint8 [h, w], also of the scene without a mask."""


def write_awkward_scenes(root: Path, *, world: World | None = None) -> AwkwardScenes:
    """Georeferenced scenes with slanted nodata borders, as delivered by survey agencies, and their alpha twins.

    The 16-bit scenes store bands as near infrared, R, G, B without colour interpretation, so only `bands: [2, 3, 4]`
    reads them right; nodata is 65535. One scene of three has no mask.
    """
    world = world or World()
    valid: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for name in ("deep", "alpha"):
        for folder in ("images", "masks"):
            (root / name / folder).mkdir(parents=True, exist_ok=True)
    for index, (name, height, width, has_mask) in enumerate(_SCENES):
        rgb, label = world.scene(split="test", seed=101, index=index, side_px=max(height, width))
        rgb, label = rgb[:height, :width], label[:height, :width]
        valid[name], labels[name] = _slanted(height, width), label
        rgb[~valid[name]] = 0
        place = {"crs": _CRS, "transform": rasterio.Affine(_GSD_M, 0, 4e5 + 100 * index, 0, -_GSD_M, 4.4e6)}
        _write_deep(root / "deep" / "images" / f"{name}.tif", rgb, valid[name], place)
        _write_alpha(root / "alpha" / "images" / f"{name}.tif", rgb, valid[name], place)
        if has_mask:
            for kind in ("deep", "alpha"):
                Image.fromarray(label).save(root / kind / "masks" / f"{name}.png")
    common: dict[str, Any] = {"classes": CLASSES, "palette": PALETTE, "tile_px": TILE_PX}
    return AwkwardScenes(
        deep=root / "deep",
        alpha=root / "alpha",
        deep_spec=DatasetSpec(name="awkward-deep", bands=(2, 3, 4), scaling=SCALING, gsd_m=_GSD_M, **common),
        alpha_spec=DatasetSpec(name="awkward-alpha", gsd_m=_GSD_M, **common),
        tiles=sum(-(-h // TILE_PX) * -(-w // TILE_PX) for _, h, w, _ in _SCENES),
        valid=valid,
        labels=labels,
    )


def write_folder(
    root: Path,
    *,
    scenes: int,
    size: tuple[int, int],
    masks: MaskKind = "index",
    images: ImageKind = "png",
    unlabelled: int = 0,
    world: World | None = None,
    tile_px: int = TILE_PX,
) -> DatasetSpec:
    """A folder data set under `root`: images/scene<i>.<images>, masks/scene<i>.png (.tif beside .tif images).

    Args:
        root: made if need be.
        scenes: how many images; the last `unlabelled` of them have no mask.
        size: (height, width) of each.
        masks: class indices, the same as a palette image, or colours of the palette.
        images: file format; JPEG is lossy, so pixels come back only nearly equal.
        unlabelled: see `scenes`.
        world: to be shared between calls, which saves half a second.
        tile_px: of the spec.

    Returns:
        The spec that reads it.
    """
    world = world or World()
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "masks").mkdir(exist_ok=True)
    for index in range(scenes):
        rgb, label = world.scene(split="train", seed=102, index=index, side_px=max(*size, 16))
        rgb, label = np.ascontiguousarray(rgb[: size[0], : size[1]]), np.ascontiguousarray(label[: size[0], : size[1]])
        write_image(root / "images" / f"scene{index}.{images}", rgb)
        if index < scenes - unlabelled:
            write_mask(root / "masks" / f"scene{index}.{'tif' if images == 'tif' else 'png'}", label, kind=masks)
    return DatasetSpec(name="folder", classes=CLASSES, palette=PALETTE, tile_px=tile_px)


def write_image(path: Path, rgb: np.ndarray) -> None:
    """Writes RGB uint8 [h, w, 3] in the format that the suffix names."""
    if path.suffix == ".tif":
        _write_tif(path, rgb, {"crs": _CRS, "transform": rasterio.Affine(_GSD_M, 0, 4e5, 0, -_GSD_M, 4.4e6)})
    else:
        options: dict[str, Any] = {"quality": 95} if path.suffix == ".jpg" else {}
        Image.fromarray(rgb).save(path, **options)


def write_mask(
    path: Path, label: np.ndarray, *, kind: MaskKind, palette: Sequence[tuple[int, int, int]] = PALETTE
) -> None:
    """Writes class indices uint8 [h, w] as `kind` in the format that the suffix names (255 is black in colours)."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    if path.suffix == ".tif":
        place = {"crs": _CRS, "transform": rasterio.Affine(_GSD_M, 0, 4e5, 0, -_GSD_M, 4.4e6)}
        table = {i: tuple(int(v) for v in rgb) for i, rgb in enumerate(colours)} if kind == "palette" else None
        _write_tif(path, colours[label] if kind == "rgb" else label[..., None], place, colormap=table)
        return
    image = Image.fromarray(colours[label] if kind == "rgb" else label)
    if kind == "palette":
        image.putpalette(colours.tobytes())
    image.save(path)


def _slanted(height: int, width: int) -> np.ndarray:
    """Valid pixels of a flight strip that lies aslant in its frame: bool [height, width]."""
    yy, xx = np.mgrid[:height, :width]
    u, v = (xx + 0.25 * yy) / width, (yy - 0.2 * xx) / height
    inside: np.ndarray = (u > 0.12) & (u < 1.05) & (v > -0.1) & (v < 0.85)
    return inside


def _write_deep(path: Path, rgb: np.ndarray, valid: np.ndarray, place: dict[str, Any]) -> None:
    bands = [np.rint(rgb[..., i] / 255 * (high - low) + low) for i, (low, high) in enumerate(SCALING)]
    infrared = 3000 - bands[0] // 2
    data = np.stack([infrared, *bands], axis=-1).astype(np.uint16)
    data[~valid] = _NODATA
    _write_tif(path, data, {**place, "nodata": _NODATA}, colours=[ColorInterp.undefined] * 4)


def _write_alpha(path: Path, rgb: np.ndarray, valid: np.ndarray, place: dict[str, Any]) -> None:
    data = np.concatenate([rgb, np.where(valid, 255, 0).astype(np.uint8)[..., None]], axis=-1)
    _write_tif(path, data, place, colours=[ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha])


def _write_tif(
    path: Path,
    data: np.ndarray,
    place: dict[str, Any],
    *,
    colours: list[ColorInterp] | None = None,
    colormap: dict[int, tuple[int, ...]] | None = None,
) -> None:
    height, width, count = data.shape
    size = {"width": width, "height": height, "count": count, "dtype": data.dtype.name}
    with rasterio.open(path, "w", driver="GTiff", compress="deflate", **size, **place) as dataset:
        if colours is not None:
            dataset.colorinterp = colours
        if colormap is not None:
            dataset.write_colormap(1, colormap)
        dataset.write(np.moveaxis(data, -1, 0))
