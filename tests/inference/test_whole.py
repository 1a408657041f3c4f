"""Whole-image inference as published, and reading labelled tiles ahead in order."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rsmtdf.inference.model import logits_of
from rsmtdf.inference.whole import fitted, predicted_tiles, whole_image
from rsmtdf.pixels import normalise
from rsmtdf.specs import Tile


@pytest.mark.parametrize(("size", "expected"), [(1024, 1022), (512, 518), (518, 518), (21, 28), (20, 14), (3, 14)])
def test_sizes_go_to_the_nearest_multiple_of_the_patch(size: int, expected: int) -> None:
    assert fitted(size, patch_px=14) == expected


def test_images_are_stretched_and_logits_stretched_back() -> None:
    seen: list[tuple[int, ...]] = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return F.avg_pool2d(x[:, :2], 2).repeat_interleave(2, -1).repeat_interleave(2, -2)

    x = torch.linspace(0, 1, 2 * 3 * 20 * 30).reshape(2, 3, 20, 30)
    found = whole_image(model, x, patch_px=8)
    assert seen == [(2, 3, 24, 32)]
    inner = F.interpolate(x, (24, 32), mode="bilinear", align_corners=True)
    expected = F.interpolate(model(inner), (20, 30), mode="bilinear", align_corners=True)
    assert torch.equal(found, expected)


def test_an_image_that_fits_is_passed_as_it_is() -> None:
    x = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole_image(lambda x: x * 2, x, patch_px=8), x * 2)


class _Reader:
    def __init__(self) -> None:
        self.reads: list[str] = []
        self.lock = threading.Lock()

    def read_image(self, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        with self.lock:
            self.reads.append(tile.id)
        valid = np.ones((8, 8), bool)
        valid[:, 6:] = False
        return np.full((8, 8, 3), int(tile.id.split("/")[0]), np.uint8), valid

    def read_label(self, tile: Tile) -> np.ndarray:
        return np.full((8, 8), int(tile.id.split("/")[0]) % 3, np.uint8)


def _tiles(n: int) -> list[Tile]:
    return [Tile(f"{i}/0_0", f"{i}.png", f"{i}.png", 0, 0, 8, 8) for i in range(n)]


@pytest.mark.parametrize("workers", [1, 3])
def test_tiles_come_in_order_in_batches_with_invalid_pixels_ignored(workers: int) -> None:
    threshold = normalise(torch.full((1, 1, 1, 3), 5, dtype=torch.uint8))[0, 0, 0, 0]

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros_like(x[:, 0]), x[:, 0] - threshold], dim=1)

    out = list(
        predicted_tiles(model, _Reader(), _tiles(11), patch_px=4, device=torch.device("cpu"), batch=4, workers=workers)
    )
    assert [len(p) for p, _ in out] == [4, 4, 3]
    prediction, label = (torch.cat(parts) for parts in zip(*out, strict=True))
    assert torch.equal(prediction[:, 0, 0], (torch.arange(11) > 5).long())
    assert torch.equal(label[:, 0, 0], (torch.arange(11) % 3).to(torch.uint8))
    assert (label[:, :, 6:] == 255).all()
    assert (label[:, :, :6] != 255).all()


def test_reading_stays_at_most_two_batches_ahead() -> None:
    reader = _Reader()
    batches = predicted_tiles(
        lambda x: x, reader, _tiles(40), patch_px=4, device=torch.device("cpu"), batch=2, workers=1
    )
    next(batches)
    next(batches)
    batches.close()
    assert len(reader.reads) <= 8


def test_mixed_precision_is_asked_for_by_name() -> None:
    class Output:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    weight = torch.rand(4, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    cpu = torch.device("cpu")
    kinds = {
        p: logits_of(lambda x: Output(F.conv2d(x, weight)), device=cpu, precision=p)(x).dtype
        for p in ("float32", "bfloat16")
    }
    assert kinds == {"float32": torch.float32, "bfloat16": torch.bfloat16}
