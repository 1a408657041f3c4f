"""Where a view's pixels come from: resize, pad, crop, flips and turns, alike for pixels, labels and validity.

The tile is resized as a whole, padded right and bottom, cropped, mirrored, turned; only the crop's part is computed.
One rule places every sample: view row i (before flips) looks at the tile's row coordinate (crop_y + i + 1/2) * h /
scaled_h. Pixels are filtered around it (Pillow's bilinear, antialiased when shrinking, in integer arithmetic), labels
and validity take the tile pixel it falls into, found in integers; so both agree to half a tile pixel.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from rsmtdf.errors import StoreMismatch
from rsmtdf.views.params import Resolved

_TRANSPOSE = {
    (0, 1): Image.Transpose.ROTATE_90,
    (0, 2): Image.Transpose.ROTATE_180,
    (0, 3): Image.Transpose.ROTATE_270,
    (1, 0): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 1): Image.Transpose.TRANSPOSE,
    (1, 2): Image.Transpose.FLIP_TOP_BOTTOM,
    (1, 3): Image.Transpose.TRANSVERSE,
}
"""(mirrored, quarter turns counter-clockwise after it) -> Pillow's single operation."""


def content_size(p: Resolved, *, crop_px: int) -> tuple[int, int]:
    """(height, width) of the part of the crop, before flips and turns, that the resized tile covers.

    Raises:
        StoreMismatch: the crop does not lie in the padded tile, so the parameters are of another recipe.
    """
    for name, start, scaled in (("crop_y", p.crop_y, p.scaled_h), ("crop_x", p.crop_x, p.scaled_w)):
        if scaled < 1 or start > max(0, scaled - crop_px):
            raise StoreMismatch(
                f"view parameters do not fit a crop of {crop_px} px: {name} = {start} in a tile resized to "
                f"{scaled} px; were they drawn with another recipe?"
            )
    return min(crop_px, p.scaled_h), min(crop_px, p.scaled_w)


def content_place(p: Resolved, *, crop_px: int) -> tuple[slice, slice]:
    """Rows and columns of the finished view that the tile covers; the rest is padding."""
    h, w = content_size(p, crop_px=crop_px)
    y = crop_px - h if p.vflip else 0
    x = crop_px - w if p.hflip else 0
    for _ in range(p.turns % 4):
        y, x, h, w = crop_px - (x + w), y, w, h
    return slice(y, y + h), slice(x, x + w)


def resample_pixels(image: np.ndarray, p: Resolved, *, crop_px: int) -> np.ndarray:
    """The tile's part of the view: uint8 [rows, columns, 3] for `content_place`, read-only.

    Pillow's filter sees the tile beyond the crop, so this equals cropping the resized tile (up to Pillow keeping the
    crop's corners in float32).
    """
    h, w = image.shape[:2]
    rows, cols = content_size(p, crop_px=crop_px)
    box = (
        p.crop_x * w / p.scaled_w,
        p.crop_y * h / p.scaled_h,
        (p.crop_x + cols) * w / p.scaled_w,
        (p.crop_y + rows) * h / p.scaled_h,
    )
    part = _to_pillow(image).resize((cols, rows), Image.Resampling.BILINEAR, box=box)
    key = (p.hflip ^ p.vflip, (p.turns + 2 * p.vflip) % 4)
    if key != (0, 0):
        part = part.transpose(_TRANSPOSE[key])
    return np.asarray(part)


def resample_nearest(plane: np.ndarray, p: Resolved, *, crop_px: int) -> np.ndarray:
    """The tile's part of the view by nearest neighbour: [rows, columns] of `plane`'s dtype for `content_place`."""
    h, w = plane.shape
    rows, cols = content_size(p, crop_px=crop_px)
    part = plane.take(_nearest(p.crop_y, rows, h, p.scaled_h), axis=0)
    part = part.take(_nearest(p.crop_x, cols, w, p.scaled_w), axis=1)
    if p.hflip:
        part = part[:, ::-1]
    if p.vflip:
        part = part[::-1]
    return np.rot90(part, p.turns)


def _to_pillow(image: np.ndarray) -> Image.Image:
    """An RGB image of uint8 [h, w, 3]; one that is a view of [3, h, w], as rasters are read, is merged by plane."""
    planes = image.transpose(2, 0, 1)
    if planes.flags.c_contiguous and not image.flags.c_contiguous:
        return Image.merge("RGB", [Image.fromarray(plane) for plane in planes])
    return Image.fromarray(np.ascontiguousarray(image))


def _nearest(start: int, n: int, size: int, scaled: int) -> np.ndarray:
    """int64 [n]: the tile index under the centre of each view pixel, floor((start + i + 1/2) * size / scaled)."""
    return (2 * np.arange(start, start + n, dtype=np.int64) + 1) * size // (2 * scaled)
