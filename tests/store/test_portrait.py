"""Features as colours: the same ones always look the same, and a few loud channels or tokens do not drown the rest."""

from __future__ import annotations

import numpy as np
import pytest

from rsmtdf.store.portrait import CELL_PX, Panel, contact_sheet, pca_rgb


@pytest.fixture
def scene() -> tuple[np.ndarray, np.ndarray]:
    """Features [2, 12, 12, 32] of four kinds of ground in quarters, and the kind of each token."""
    kinds = np.zeros((2, 12, 12), int)
    kinds[:, 6:] += 2
    kinds[:, :, 6:] += 1
    rng = np.random.default_rng(0)
    means = rng.standard_normal((4, 32))
    return (means[kinds] + 0.1 * rng.standard_normal((2, 12, 12, 32))).astype(np.float32), kinds


def spread(rgb: np.ndarray, kinds: np.ndarray) -> float:
    """Distance between the kinds' mean colours over the scatter within a kind, the worst pair's."""
    colours = [rgb[kinds == k].astype(float) for k in range(4)]
    means = [c.mean(axis=0) for c in colours]
    within = max(c.std(axis=0).max() for c in colours) + 1
    return min(float(np.abs(means[i] - means[j]).max()) for i in range(4) for j in range(i)) / within


def test_kinds_of_ground_have_colours_of_their_own(scene):
    features, kinds = scene
    rgb = pca_rgb(features)
    assert (rgb.shape, rgb.dtype) == ((2, 12, 12, 3), np.uint8)
    assert spread(rgb, kinds) > 3
    assert rgb.min() == 0
    assert rgb.max() == 255


def test_neither_a_massive_channel_nor_an_outlier_token_takes_over(scene):
    features, kinds = scene
    loud = features.copy()
    loud[..., 5] = 1000 * np.random.default_rng(1).standard_normal(loud.shape[:3])
    loud[0, 3, 3] = 500
    inside = np.ones(kinds.shape, bool)
    inside[0, 3, 3] = False
    kinds = np.where(inside, kinds, -1)
    assert spread(pca_rgb(loud), kinds) > 3


def test_the_picture_does_not_depend_on_signs_or_scale_of_channels(scene):
    features, _ = scene
    assert np.array_equal(pca_rgb(features), pca_rgb(features.copy()))
    rescaled = features * np.linspace(0.1, 10, 32, dtype=np.float32) + 3
    assert np.abs(pca_rgb(rescaled).astype(int) - pca_rgb(features)).max() <= 1


def test_few_channels_and_constant_ones():
    assert pca_rgb(np.ones((1, 2, 2, 5), np.float32)).shape == (1, 2, 2, 3)
    assert pca_rgb(np.random.default_rng(0).standard_normal((1, 4, 4, 2)))[..., 2].max() == 0


def test_the_sheet_holds_every_panel(scene):
    features, _ = scene
    photo = np.full((2, 600, 600, 3), (90, 10, 200), np.uint8)
    panels = [
        Panel(title="view", subtitle="", images=photo),
        Panel(title="teacher with a very long name " * 5, subtitle="", images=pca_rgb(features)),
    ]
    sheet = np.asarray(contact_sheet(panels, captions=["one", "two"], title="t", note="n"))
    assert sheet.shape[1] > 2 * CELL_PX
    assert (sheet == (90, 10, 200)).all(axis=2).sum() == 2 * CELL_PX**2
    colours = {tuple(c) for c in pca_rgb(features).reshape(-1, 3).tolist()}
    assert colours <= {tuple(c) for c in sheet.reshape(-1, 3).tolist()}
