"""Blending overlapping windows into the scores of one block of a raster, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from rsmtdf.inference.model import Model
from rsmtdf.inference.windows import Box, mirrored, shares, touching
from rsmtdf.pixels import normalise

Read = Callable[[Box], tuple[np.ndarray, np.ndarray]]
"""RGB uint8 [h, w, 3] and valid bool [h, w] of a box inside the raster."""
Blend = Literal["probabilities", "logits"]
"""What is averaged: softmax probabilities (one over-confident window cannot outvote three), or logits as they are."""


@dataclass(frozen=True, slots=True)
class Patch:
    """What a block needs to know of the raster: the pixels under every window that touches it."""

    box: Box
    around: Box
    rgb: np.ndarray
    """uint8 [h, w, 3] of `around`."""
    valid: np.ndarray
    """bool [h, w] of `around`."""


def read_patch(read: Read, box: Box, *, height: int, width: int, crop_px: int) -> Patch:
    """Reads block `box` of a raster of height x width with the margin its windows need."""
    rows = touching(box.y0, box.height, size=height, crop_px=crop_px)
    columns = touching(box.x0, box.width, size=width, crop_px=crop_px)
    bottom, right = min(rows[-1] + crop_px, height), min(columns[-1] + crop_px, width)
    around = Box(rows[0], columns[0], bottom - rows[0], right - columns[0])
    rgb, valid = read(around)
    return Patch(box, around, rgb, valid)


@torch.inference_mode()
def blend(
    model: Model,
    patch: Patch,
    *,
    height: int,
    width: int,
    crop_px: int,
    classes: int,
    batch: int,
    device: torch.device,
    what: Blend = "probabilities",
    tick: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """The blended scores of a block, float32 [classes, h, w] on `device`.

    Windows without a valid pixel are not computed: what they would say of is not valid anyway (scores 0 there).

    Args:
        model: see `Model`; called with at most `batch` windows of crop_px x crop_px.
        patch: from `read_patch`, of a raster of `height` x `width`.
        height: of the raster.
        width: of the raster.
        crop_px: side of a window.
        classes: number of channels the model returns.
        batch: windows per call.
        device: where the model is.
        what: see `Blend`.
        tick: called after each batch with its number of windows.

    Raises:
        ValueError: the model returns another shape.
    """
    box = patch.box
    row_shares = _on(device, shares(height, crop_px=crop_px))
    column_shares = _on(device, shares(width, crop_px=crop_px))
    blended = torch.zeros((classes, box.height, box.width), dtype=torch.float32, device=device)
    windows = [
        (y, x)
        for y in touching(box.y0, box.height, size=height, crop_px=crop_px)
        for x in touching(box.x0, box.width, size=width, crop_px=crop_px)
        if _is_any_valid(patch, y, x, crop_px)
    ]
    for first in range(0, len(windows), batch):
        group = windows[first : first + batch]
        pixels = np.stack([_pixels(patch, y, x, crop_px, height=height, width=width) for y, x in group])
        logits = model(normalise(torch.from_numpy(pixels).to(device))).float()
        if logits.shape != (len(group), classes, crop_px, crop_px):
            raise ValueError(
                f"the model returned {tuple(logits.shape)} for {tuple(pixels.shape)} and {classes} classes"
            )
        values = logits.softmax(dim=1) if what == "probabilities" else logits
        # Window by window in grid order: each pixel's sum has the same order in every division into blocks.
        for (y, x), value in zip(group, values, strict=True):
            top, bottom = max(y, box.y0), min(y + crop_px, box.y0 + box.height)
            left, right = max(x, box.x0), min(x + crop_px, box.x0 + box.width)
            rows, columns = slice(top - y, bottom - y), slice(left - x, right - x)
            share = row_shares[y][rows, None] * column_shares[x][None, columns]
            target = blended[:, top - box.y0 : bottom - box.y0, left - box.x0 : right - box.x0]
            target += share * value[:, rows, columns]
        if tick is not None:
            tick(len(group))
    return blended


def block_valid(patch: Patch) -> np.ndarray:
    """bool [h, w]: which pixels of the block itself are valid."""
    y, x = patch.box.y0 - patch.around.y0, patch.box.x0 - patch.around.x0
    return patch.valid[y : y + patch.box.height, x : x + patch.box.width]


def _pixels(patch: Patch, y: int, x: int, crop_px: int, *, height: int, width: int) -> np.ndarray:
    """The window's pixels, uint8 [crop, crop, 3], reflected at the raster's ends.

    A window reaches beyond the raster by less than half its side unless it covers it all, so what is mirrored into
    it lies in the window itself, and so in the patch.
    """
    top, left = y - patch.around.y0, x - patch.around.x0
    if y + crop_px <= height and x + crop_px <= width:
        return patch.rgb[top : top + crop_px, left : left + crop_px]
    rows = mirrored(y, crop_px, height) - patch.around.y0
    columns = mirrored(x, crop_px, width) - patch.around.x0
    return patch.rgb.take(rows, axis=0).take(columns, axis=1)


def _is_any_valid(patch: Patch, y: int, x: int, crop_px: int) -> bool:
    top, left = y - patch.around.y0, x - patch.around.x0
    return bool(patch.valid[top : top + crop_px, left : left + crop_px].any())


def _on(device: torch.device, weights: dict[int, np.ndarray]) -> dict[int, torch.Tensor]:
    return {start: torch.from_numpy(share).to(device) for start, share in weights.items()}
