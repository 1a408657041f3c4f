"""From stored values to bytes: one (low, high) per output band for the whole data set, never per tile.

A per-tile stretch would make the same field bright beside a lake and dark beside a roof, and a student could not
undo it. So 8-bit data pass unchanged, and anything else needs stated limits; they are proposed here, measured over
all scenes, and enter the store's identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsmtdf.data.raster import Header, Pixels, read_pixels
from rsmtdf.errors import DatasetError

Scaling = tuple[tuple[float, float], ...]

_SAMPLE_PX = 4_000_000
_SAMPLE_SCENES = 512


def to_bytes(pixels: Pixels, scaling: Scaling | None) -> np.ndarray:
    """uint8 [h, w, 3]: (low, high) mapped to (0, 255), rounded, clipped; invalid pixels are black.

    Without `scaling` the data must be uint8 already (`Dataset` checks that before any pixel is read). The result
    may share memory with `pixels`.
    """
    data = pixels.bands
    if scaling is None:
        out = data
    elif data.dtype.kind in "ui" and data.dtype.itemsize <= 2:
        out = np.empty(data.shape, dtype=np.uint8)
        lowest = int(np.iinfo(data.dtype).min)
        values = np.arange(lowest, int(np.iinfo(data.dtype).max) + 1, dtype=np.float64)
        for band, limits in enumerate(scaling):
            out[..., band] = _stretch(values, limits)[data[..., band].astype(np.int32) - lowest]
    else:
        out = np.empty(data.shape, dtype=np.uint8)
        for band, limits in enumerate(scaling):
            out[..., band] = _stretch(data[..., band].astype(np.float64), limits)
    if pixels.valid is not None:
        out[~pixels.valid] = 0
    return out


def suggest_scaling(
    scenes: Sequence[tuple[Path, Header]], *, bands: tuple[int, int, int] | None, nodata: float | None
) -> Scaling:
    """The 2nd and 98th percentile of each output band over all scenes, invalid pixels left out.

    Every scene is read decimated by one common factor, so large scenes weigh as much as their area; of more than
    512 scenes, 512 evenly spaced ones are read.

    Raises:
        DatasetError: no scene has a valid pixel.
    """
    chosen = [scenes[round(i)] for i in np.linspace(0, len(scenes) - 1, min(len(scenes), _SAMPLE_SCENES))]
    total = sum(header.width * header.height for _, header in chosen)
    step = max(1.0, math.sqrt(total / _SAMPLE_PX))
    samples: list[np.ndarray] = []
    for path, header in chosen:
        size = (math.ceil(header.height / step), math.ceil(header.width / step))
        pixels = read_pixels(path, header, bands=bands, nodata=nodata, out_size=size)
        flat = pixels.bands.reshape(-1, 3)
        samples.append(flat if pixels.valid is None else flat[pixels.valid.reshape(-1)])
    values = np.concatenate(samples)
    if not len(values):
        raise DatasetError(
            f"none of {len(chosen)} scene(s) has a valid pixel, so no scaling can be proposed: "
            f"check the files' nodata value (`nodata:` overrides it)"
        )
    low, high = np.percentile(values.astype(np.float64), [2, 98], axis=0)
    digits = 0 if values.dtype.kind in "ui" else None
    return tuple(_limits(float(a), float(b), digits) for a, b in zip(low, high, strict=True))


def yaml_line(scaling: Scaling) -> str:
    """The line to paste into the data set's section of a YAML file."""
    return f"scaling: [{', '.join(f'[{_number(low)}, {_number(high)}]' for low, high in scaling)}]"


def _number(value: float) -> str:
    if value.is_integer() and abs(value) < 1e15:
        return f"{value:.0f}"
    text = f"{value:.6g}"
    return text if "." in text else text.replace("e", ".0e")  # YAML 1.1 reads 1e-05 as text


def _limits(low: float, high: float, digits: int | None) -> tuple[float, float]:
    if digits is not None:
        low, high = round(low), round(high)
    else:
        low, high = float(f"{low:.6g}"), float(f"{high:.6g}")
    return (float(low), float(high)) if high > low else (float(low), float(low) + 1.0)


def _stretch(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    low, high = limits
    scaled = (values - low) * 255.0 / (high - low)
    scaled = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0)
    stretched: np.ndarray = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    return stretched
