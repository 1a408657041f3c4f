"""Where inference looks: overlapping windows on a fixed grid, their weights, and the blocks that are written.

Windows have the size the student was trained at and overlap by half. Their grid hangs on the raster's origin, never
on a block, and each block takes every window that touches it: so the map does not depend on how it was cut into
blocks. (A block of 2048 px with windows of 518 px computes about 1.3 times the windows it would need alone.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of pixels."""

    y0: int
    x0: int
    height: int
    width: int


def starts(size: int, *, crop_px: int) -> range:
    """The first pixels of the windows along a side: 0, crop/2, crop, ... until the side is covered.

    The last window may reach beyond the side (by less than crop/2, or more where the side is shorter than the crop).
    """
    stride = max(1, crop_px // 2)
    return range(0, max(0, size - crop_px + stride - 1) // stride * stride + 1, stride)


def touching(start: int, length: int, *, size: int, crop_px: int) -> list[int]:
    """Those of `starts` whose window meets the pixels start..start+length."""
    return [s for s in starts(size, crop_px=crop_px) if s < start + length and s + crop_px > start]


def hann(crop_px: int) -> np.ndarray:
    """Float64 [crop]: sin^2 of half-pixel positions; never zero, and two that overlap by half add up to one."""
    window: np.ndarray = np.sin(np.pi * (np.arange(crop_px) + 0.5) / crop_px) ** 2
    return window


def shares(size: int, *, crop_px: int) -> dict[int, np.ndarray]:
    """Window start -> float32 [crop]: its share of each pixel along one side.

    Where a pixel has only one window (a raster's margin), that window has the whole of it. Over all windows the
    shares of a pixel add up to one; those beyond the raster are zero.
    """
    window = hann(crop_px)
    total = np.zeros(max(size, starts(size, crop_px=crop_px)[-1] + crop_px))
    for s in starts(size, crop_px=crop_px):
        total[s : s + crop_px] += window
    inside = np.arange(len(total)) < size
    return {
        s: (window / total[s : s + crop_px] * inside[s : s + crop_px]).astype(np.float32)
        for s in starts(size, crop_px=crop_px)
    }


def mirrored(start: int, length: int, size: int) -> np.ndarray:
    """Positions start..start+length of a side of `size` pixels, reflected at its ends without repeating them: int64.

    Reflects as often as needed, so a side may be much shorter than the window.
    """
    if size == 1:
        return np.zeros(length, np.int64)
    period = 2 * (size - 1)
    position = np.mod(np.arange(start, start + length, dtype=np.int64), period)
    reflected: np.ndarray = np.minimum(position, period - position)
    return reflected


def blocks(height: int, width: int, *, block_px: int) -> Iterator[Box]:
    """The raster in blocks of at most `block_px` pixels a side, row by row."""
    for y0 in range(0, height, block_px):
        for x0 in range(0, width, block_px):
            yield Box(y0, x0, min(block_px, height - y0), min(block_px, width - x0))
