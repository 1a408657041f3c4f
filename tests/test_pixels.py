"""Pixels as models see them: the normalisation against NumPy, the resize against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rsmtdf.keyed import Draws
from rsmtdf.pixels import normalise, resize
from rsmtdf.specs import IMAGENET_MEAN, IMAGENET_STD


def pixels(*shape: int) -> torch.Tensor:
    values = Draws("pixels", *shape).units(int(np.prod(shape))) * 256
    return torch.from_numpy(values.astype(np.uint8).reshape(shape))


# --- normalise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-15), (torch.bfloat16, 3e-2)]
)
def test_normalise_is_the_formula(dtype, tolerance):
    x = pixels(2, 5, 7, 3)
    expected = (x.numpy().astype(np.float64) / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    y = normalise(x, dtype=dtype)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 5, 7)
    assert y.is_contiguous()
    np.testing.assert_allclose(y.double().numpy(), expected.transpose(0, 3, 1, 2), rtol=0, atol=3 * tolerance)


def test_normalise_of_known_pixels():
    y = normalise(torch.tensor([[[[0, 0, 0], [255, 255, 255]]]], dtype=torch.uint8))
    expected = torch.tensor([[-2.117904, -2.035714, -1.804444], [2.248908, 2.428571, 2.640000]]).T
    torch.testing.assert_close(y[0, :, 0], expected, rtol=0, atol=1e-6)


def test_normalise_takes_other_statistics():
    x = pixels(1, 4, 4, 3)
    y = normalise(x, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255), dtype=torch.float64)
    torch.testing.assert_close(y.permute(0, 2, 3, 1), x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalise_leaves_its_input_alone(dtype):
    x = pixels(1, 4, 4, 3)
    before = x.clone()
    normalise(x, dtype=dtype)
    assert torch.equal(x, before)


def test_normalise_does_not_depend_on_the_batch():
    x = pixels(3, 6, 6, 3)
    assert torch.equal(normalise(x)[1:2], normalise(x[1:2]))


# --- resize -----------------------------------------------------------------------------------------------------


def bilinear(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Corner-aligned bilinear sampling, written down: output i lies at i (n_in - 1) / (n_out - 1)."""
    for axis, n in zip((-2, -1), size, strict=True):
        old = x.shape[axis]
        at = np.arange(n) * ((old - 1) / (n - 1) if n > 1 else 0.0)
        low = np.minimum(np.floor(at).astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        shape = [1] * x.ndim
        shape[axis] = n
        t = (at - low).reshape(shape)
        x = np.take(x, low, axis) * (1 - t) + np.take(x, high, axis) * t
    return x


@pytest.mark.parametrize("size", [(4, 4), (16, 16), (3, 20), (7, 9), (1, 5)])
def test_resize_is_the_formula(size):
    x = normalise(pixels(2, 7, 9, 3), dtype=torch.float64)
    np.testing.assert_allclose(resize(x, size).numpy(), bilinear(x.numpy(), size), rtol=0, atol=1e-12)


def test_resize_to_the_same_size_is_the_tensor_itself():
    x = normalise(pixels(1, 8, 6, 3))
    assert resize(x, (8, 6)) is x


def test_resize_keeps_corners_and_does_not_antialias():
    x = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    x[0, 0, 0, 0] = x[0, 0, 8, 8] = 1.0
    y = resize(x, (3, 3))
    assert y[0, 0, 0, 0] == y[0, 0, 2, 2] == 1.0, "an antialiased resize would spread the corners"
    assert y.sum() == 2.0


def test_resize_passes_gradients():
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    resize(x, (7, 7)).sum().backward()
    assert float(x.grad.sum()) == pytest.approx(49.0)
