"""Blending: exact for models that look at one pixel, and independent of how the raster is cut into blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rsmtdf.inference.blend import Blend, Model, blend, block_valid, read_patch
from rsmtdf.inference.windows import Box, blocks
from rsmtdf.keyed import Draws
from rsmtdf.pixels import normalise

CPU = torch.device("cpu")


def _image(height: int, width: int) -> np.ndarray:
    return (Draws("blend", height, width).units(height * width * 3) * 256).astype(np.uint8).reshape(height, width, 3)


def _pointwise(x: torch.Tensor) -> torch.Tensor:
    """Two classes from the pixel's own colour."""
    return torch.stack([x[:, 0] + 2 * x[:, 1], x[:, 2] - x[:, 0]], dim=1)


def _contextual(x: torch.Tensor) -> torch.Tensor:
    """Three classes from the window's content and the place in it: differs from window to window."""
    smooth = F.avg_pool2d(x, 5, stride=1, padding=2)
    ramp = torch.linspace(0, 1, x.shape[-1]).expand_as(x[:, 0])
    return torch.stack([smooth[:, 0], smooth[:, 1] * ramp, x.mean(dim=(1, 2, 3))[:, None, None] + ramp], dim=1)


def _run(
    model: Model,
    image: np.ndarray,
    *,
    classes: int,
    crop_px: int,
    block_px: int,
    what: Blend = "logits",
    valid: np.ndarray | None = None,
    batch: int = 3,
) -> torch.Tensor:
    height, width = image.shape[:2]
    mask = np.ones((height, width), bool) if valid is None else valid

    def read(box: Box) -> tuple[np.ndarray, np.ndarray]:
        area = (slice(box.y0, box.y0 + box.height), slice(box.x0, box.x0 + box.width))
        assert image[area].shape[:2] == (box.height, box.width), "read beyond the raster"
        return image[area], mask[area]

    whole = torch.full((classes, height, width), torch.nan)
    for box in blocks(height, width, block_px=block_px):
        patch = read_patch(read, box, height=height, width=width, crop_px=crop_px)
        area = (slice(box.y0, box.y0 + box.height), slice(box.x0, box.x0 + box.width))
        assert np.array_equal(block_valid(patch), mask[area])
        size = {"height": height, "width": width, "crop_px": crop_px, "classes": classes}
        whole[:, area[0], area[1]] = blend(model, patch, **size, batch=batch, device=CPU, what=what)
    return whole


@settings(max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(4, 40), st.integers(5, 80))
def test_a_pointwise_model_is_reproduced(height: int, width: int, crop_px: int, block_px: int) -> None:
    image = _image(height, width)
    expected = _pointwise(normalise(torch.from_numpy(image)[None]))[0]
    found = _run(_pointwise, image, classes=2, crop_px=crop_px, block_px=block_px)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    probable = _run(_pointwise, image, classes=2, crop_px=crop_px, block_px=block_px, what="probabilities")
    torch.testing.assert_close(probable, expected.softmax(dim=0), atol=1e-5, rtol=1e-5)
    is_clear = (expected[0] - expected[1]).abs() > 1e-4
    assert torch.equal(probable.argmax(dim=0)[is_clear], expected.argmax(dim=0)[is_clear])


@settings(max_examples=25)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(4, 33), st.integers(3, 60), st.sampled_from([1, 4]))
def test_blocks_and_batches_do_not_change_a_bit(
    height: int, width: int, crop_px: int, block_px: int, batch: int
) -> None:
    image = _image(height, width)
    whole = _run(_contextual, image, classes=3, crop_px=crop_px, block_px=1000, batch=1)
    cut = _run(_contextual, image, classes=3, crop_px=crop_px, block_px=block_px, batch=batch)
    assert torch.isfinite(whole).all()
    assert torch.equal(whole, cut)


def test_the_blend_is_the_weighted_mean_of_the_windows() -> None:
    """A model that says which window it is: the middle of the overlap has equal parts of both."""
    calls: list[int] = []

    def model(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(x), 1, 8, 8)
        for i in range(len(x)):
            out[i] = len(calls)
            calls.append(1)
        return out

    found = _run(model, _image(8, 12), classes=1, crop_px=8, block_px=64)
    assert len(calls) == 2
    row = found[0, 0]
    assert torch.equal(row[:4], torch.zeros(4))
    assert torch.equal(row[8:], torch.ones(4))
    assert (torch.diff(row) >= 0).all()
    expected = torch.sin(torch.pi * (torch.arange(4) + 0.5) / 8) ** 2
    torch.testing.assert_close(row[4:8], expected)


def test_a_raster_smaller_than_the_window_is_reflected() -> None:
    seen: list[torch.Tensor] = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return x[:, :1]

    image = _image(3, 5)
    _run(model, image, classes=1, crop_px=8, block_px=64)
    (x,) = seen
    reflected = np.pad(image, ((0, 5), (0, 3), (0, 0)), mode="reflect")
    assert torch.equal(x, normalise(torch.from_numpy(reflected)[None]))


def test_windows_without_a_valid_pixel_are_not_computed_and_do_not_matter() -> None:
    image, valid = _image(64, 64), np.zeros((64, 64), bool)
    valid[40:, 44:] = True
    calls: list[int] = []

    def counting(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return _contextual(x)

    found = _run(counting, image, classes=3, crop_px=16, block_px=32, valid=valid)
    some = sum(calls)
    whole = _run(_contextual, image, classes=3, crop_px=16, block_px=32)
    assert torch.equal(found[:, valid], whole[:, valid])
    calls.clear()
    _run(counting, image, classes=3, crop_px=16, block_px=32)
    assert some < sum(calls) / 2


def test_a_model_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"returned \(1, 2, 8, 8\).*3 classes"):
        _run(_pointwise, _image(8, 8), classes=3, crop_px=8, block_px=8)
