"""Inference on whole images, as published: stretched to the nearest multiple of the patch, logits stretched back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from rsmtdf.inference.model import Model
from rsmtdf.pixels import normalise, resize
from rsmtdf.specs import IGNORE_INDEX, Tile, TileReader


def fitted(size: int, *, patch_px: int) -> int:
    """The multiple of `patch_px` nearest to `size` (halves go up), at least one patch."""
    return max(1, int(size / patch_px + 0.5)) * patch_px


def whole_image(model: Model, x: torch.Tensor, *, patch_px: int) -> torch.Tensor:
    """Logits float32 [b, k, h, w] of normalised images [b, 3, h, w] of any size, both resizes with align_corners."""
    height, width = int(x.shape[-2]), int(x.shape[-1])
    size = (fitted(height, patch_px=patch_px), fitted(width, patch_px=patch_px))
    return resize(model(resize(x, size)).float(), (height, width))


def predicted_tiles(
    model: Model,
    reader: TileReader,
    tiles: Sequence[Tile],
    *,
    patch_px: int,
    device: torch.device,
    batch: int,
    workers: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of (prediction int64 [b, t, t], label uint8 [b, t, t]) over labelled tiles, in order, on `device`.

    Pixels that are not valid (padding, nodata) are labelled 255: a model cannot know what it was not shown. `workers`
    threads read ahead by at most two batches.
    """
    with ThreadPoolExecutor(max(1, workers)) as pool:
        pending: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
        ahead = iter(tiles)
        try:
            for first in range(0, len(tiles), batch):
                while len(pending) < 2 * batch and (tile := next(ahead, None)) is not None:
                    pending.append(pool.submit(_read, reader, tile))
                read = [pending.popleft().result() for _ in range(min(batch, len(tiles) - first))]
                pixels = torch.from_numpy(np.stack([rgb for rgb, _ in read])).to(device)
                label = torch.from_numpy(np.stack([values for _, values in read])).to(device)
                with torch.inference_mode():
                    logits = whole_image(model, normalise(pixels), patch_px=patch_px)
                    prediction = logits.argmax(dim=1)
                yield prediction, label
        finally:
            for future in pending:
                future.cancel()


def _read(reader: TileReader, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    rgb, valid = reader.read_image(tile)
    return rgb, np.where(valid, reader.read_label(tile), np.uint8(IGNORE_INDEX))
