from __future__ import annotations

import colorsys
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from rsmtdf.views import photometric
from rsmtdf.views.params import HUE_TURN, JITTER_ORDERS, MAX_BLUR_RADIUS, PARAM_DTYPE, UNIT, Resolved, resolve

CORNERS = np.array(list(itertools.product((0, 1, 127, 254, 255), repeat=3)), np.int16).T.copy()


def noise(n: int = 4000, seed: int = 0) -> np.ndarray:
    return np.concatenate([np.random.default_rng(seed).integers(0, 256, (3, n)).astype(np.int16), CORNERS], axis=1)


def parameters(**values: float) -> Resolved:
    record = np.zeros((), PARAM_DTYPE)
    neutral = {"scaled_h": 1, "scaled_w": 1, "brightness": UNIT, "contrast": UNIT, "saturation": UNIT}
    for name, value in (neutral | values).items():
        record[name] = value
    return resolve(record)


def on_canvas(part: np.ndarray, p: Resolved) -> np.ndarray:
    """`apply` to a crop that the tile covers wholly."""
    c = part.shape[0]
    return photometric.apply(part, (slice(0, c), slice(0, c)), p, crop_px=c)


def grey_of(colours: np.ndarray) -> np.ndarray:
    return (np.array([77, 150, 29]) @ colours.astype(int) + 128) // 256


@pytest.mark.parametrize("factor", [0, 32, 63, 65, 96, 128])
def test_brightness_is_a_rounded_product(factor: int) -> None:
    before = noise()
    after = before.copy()
    photometric.brightness(after, factor)
    np.testing.assert_array_equal(after, np.clip((before.astype(int) * factor + 32) // 64, 0, 255))


@pytest.mark.parametrize("factor", [0, 32, 63, 65, 96, 128])
def test_contrast_pivots_on_the_mean_grey_with_the_padding_counted(factor: int) -> None:
    before = noise()
    after = before.copy()
    photometric.contrast(after, factor, padding=5000)
    weights = np.ones(before.shape[1])
    weights[-1] = 5000
    mean = np.average(
        (77 * before[0] + 150 * before[1].astype(int) + 29 * before[2].astype(int)) / 256, weights=weights
    )
    pivot = int(mean + 0.5)
    np.testing.assert_array_equal(
        after, np.clip((before.astype(int) * factor + pivot * (64 - factor) + 32) // 64, 0, 255)
    )


@pytest.mark.parametrize("factor", [0, 32, 63, 65, 96, 128])
def test_saturation_moves_from_each_pixels_grey(factor: int) -> None:
    before = noise()
    after = before.copy()
    photometric.saturation(after, factor)
    expected = np.clip((before.astype(int) * factor + grey_of(before) * (64 - factor) + 32) // 64, 0, 255)
    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize("steps", [-96, -48, -1, 1, 17, 32, 48, 96])
def test_hue_is_the_hsv_hue_within_rounding(steps: int) -> None:
    before = noise(1500)
    after = before.copy()
    photometric.hue(after, steps)
    hsv = [colorsys.rgb_to_hsv(*(v / 255 for v in rgb)) for rgb in before.T.tolist()]
    expected = np.array([colorsys.hsv_to_rgb((h + steps / HUE_TURN) % 1, s, v) for h, s, v in hsv]).T * 255
    assert np.abs(after - expected).max() <= 0.5 + 1e-9
    np.testing.assert_array_equal(after.max(axis=0), before.max(axis=0))
    np.testing.assert_array_equal(after.min(axis=0), before.min(axis=0))


def test_a_third_of_the_hue_circle_permutes_the_channels() -> None:
    before = noise()
    after = before.copy()
    photometric.hue(after, HUE_TURN // 3)
    np.testing.assert_array_equal(after, before[[2, 0, 1]])


@given(st.integers(0, 2000), st.integers(0, 10**6))
def test_grey_and_its_mean(n: int, seed: int) -> None:
    colours = np.random.default_rng(seed).integers(0, 256, (3, n + 1)).astype(np.int16)
    np.testing.assert_array_equal(photometric.grey(colours)[0], grey_of(colours))
    sums = colours[:, :-1].astype(int).sum(axis=1) + 7 * colours[:, -1].astype(int)
    mean = int(np.dot([77, 150, 29], sums)) / 256 / (n + 7)
    assert abs(photometric.mean_grey(colours, padding=7) - mean) <= 0.5


def test_the_mean_of_a_white_image_does_not_overflow() -> None:
    assert photometric.mean_grey(np.full((3, 518 * 518 + 1), 255, np.int16), padding=0) == 255


@pytest.mark.parametrize("operation", ["brightness", "saturation", "hue"])
def test_results_do_not_depend_on_the_blocks(operation: str) -> None:
    n = (1 << 17) + 5  # one block and a bit
    many = np.resize(noise(4000), (3, 4096)).repeat(33, axis=1)[:, :n].copy()
    few = many[:, -100:].copy()
    for colours in (many, few):
        getattr(photometric, operation)(colours, 50)
    np.testing.assert_array_equal(many[:, -100:], few)


@pytest.mark.parametrize("radius", [0.125, 0.25, 0.5, 1.0, 1.375, 1.5, 2.0, 4.0])
def test_blur_is_pillows_gaussian_up_to_rounding(radius: float) -> None:
    plane = np.random.default_rng(0).integers(0, 256, (60, 70), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(plane).filter(ImageFilter.GaussianBlur(radius))).astype(int)
    found = photometric.blur(plane.astype(np.int16), photometric.blur_kernel(radius))
    inside = (slice(14, -14), slice(14, -14))  # Pillow repeats the edge anew before each of its three boxes
    gap = np.abs(found - expected)[inside]
    assert gap.max() <= 3
    assert gap.mean() < 1


@given(st.integers(0, int(MAX_BLUR_RADIUS) * 64).map(lambda i: i / 64))
def test_kernels_sum_to_one_and_have_the_asked_deviation(radius: float) -> None:
    centre, *tail = photometric.blur_kernel(radius)
    assert centre + 2 * sum(tail) == 256
    assert all(w > 0 for w in tail)
    deviation = (2 * sum(i * i * w for i, w in enumerate(tail, 1)) / 256) ** 0.5
    assert abs(deviation - radius) <= 0.08 + 0.02 * radius  # 0.08: below it, 1/256 leaves the identity
    if radius <= 2:
        assert [centre, *tail] == sorted([centre, *tail], reverse=True)


def test_kernels_are_frozen() -> None:
    found = {radius: photometric.blur_kernel(radius) for radius in (0.0, 0.109375, 0.5, 1.0, 2.0)}
    expected = {
        0.0: [256],
        0.109375: [252, 2],
        0.5: [200, 27, 1],
        1.0: [106, 60, 14, 1],
        2.0: [48, 44, 32, 18, 8, 2],
    }
    assert found == expected, "a kernel is part of the view's bytes: bump ViewRecipe.version"


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.5, 2.0, 4.0]))
def test_blur_repeats_edges_however_small_the_plane(h: int, w: int, radius: float) -> None:
    plane = np.random.default_rng(h * 10 + w).integers(0, 256, (h, w)).astype(np.int16)
    weights = photometric.blur_kernel(radius)
    k = len(weights) - 1
    kernel = np.array([*weights[:0:-1], *weights])
    rows = np.pad(plane, ((0, 0), (k, k)), mode="edge").astype(int)
    rows = (sum(kernel[d] * rows[:, d : d + w] for d in range(2 * k + 1)) + 128) // 256
    both = np.pad(rows, ((k, k), (0, 0)), mode="edge")
    both = (sum(kernel[d] * both[d : d + h] for d in range(2 * k + 1)) + 128) // 256
    np.testing.assert_array_equal(photometric.blur(plane, weights), both)


@given(st.integers(0, 10**6), st.integers(0, 23), st.booleans(), st.sampled_from([0.0, 1.0]))
def test_padding_is_treated_like_any_other_black_pixel(seed: int, order: int, grey: bool, radius: float) -> None:
    rng = np.random.default_rng(seed)
    c = 20
    h, w, y, x = 12, 9, 5, 11
    part = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    whole = np.zeros((c, c, 3), np.uint8)
    place = (slice(y, y + h), slice(x, x + w))
    whole[place] = part
    p = parameters(
        jitter=1, jitter_order=order, brightness=90, contrast=40, saturation=33, hue=-30, grey=grey, blur_radius=radius
    )
    np.testing.assert_array_equal(photometric.apply(part, place, p, crop_px=c), on_canvas(whole, p))


def test_padding_turns_grey_with_less_contrast_as_published() -> None:
    part = np.full((10, 10, 3), 200, np.uint8)
    p = parameters(jitter=1, contrast=UNIT // 2)
    out = photometric.apply(part, (slice(0, 10), slice(0, 10)), p, crop_px=20)
    assert set(out[10:, 10:].ravel().tolist()) == {25}  # half of the mean grey, 50


def test_the_order_of_the_jitter_counts_and_follows_the_table() -> None:
    part = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    results = set()
    for order, steps in enumerate(JITTER_ORDERS):
        p = parameters(jitter=1, jitter_order=order, brightness=90, contrast=90, saturation=90, hue=40)
        colours = np.zeros((3, 257), np.int16)
        colours[:, :-1] = part.reshape(-1, 3).T
        for step in steps:
            if step == 1:
                photometric.contrast(colours, 90, padding=0)
            else:
                name, value = {0: ("brightness", 90), 2: ("saturation", 90), 3: ("hue", 40)}[step]
                getattr(photometric, name)(colours, value)
        out = on_canvas(part, p)
        np.testing.assert_array_equal(out.reshape(-1, 3).T, colours[:, :-1])
        results.add(out.tobytes())
    assert len(results) == 24


def test_neutral_parameters_change_nothing() -> None:
    part = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert photometric.is_identity(parameters())
    for p in (parameters(), parameters(jitter=1)):
        np.testing.assert_array_equal(on_canvas(part, p), part)
    assert not any(photometric.is_identity(parameters(**{name: 1})) for name in ("jitter", "grey", "blur_radius"))


def test_grey_views_have_equal_channels() -> None:
    part = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for radius in (0.0, 1.0):
        out = on_canvas(part, parameters(grey=1, blur_radius=radius))
        assert np.ptp(out, axis=2).max() == 0
    np.testing.assert_array_equal(on_canvas(part, parameters(grey=1))[..., 0].ravel(), grey_of(part.reshape(-1, 3).T))
