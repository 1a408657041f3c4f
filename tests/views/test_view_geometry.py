from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rsmtdf.errors import DatasetError, StoreMismatch
from rsmtdf.specs import ViewRecipe
from rsmtdf.views.geometry import content_place, resample_pixels
from rsmtdf.views.params import PARAM_DTYPE, Resolved, draw_params, resolve
from rsmtdf.views.view import View, render, render_label

CROPS = (1, 13, 56, 112)


def aerial(crop: int, **more) -> ViewRecipe:
    return ViewRecipe(crop_px=crop, vflip_p=0.5, quarter_turns=True, **more)


def draw(recipe: ViewRecipe, tile_px: int, seed: int, stream: str = "weak") -> np.ndarray:
    return draw_params(recipe, tile_id="t", tile_px=tile_px, stream=stream, seed=seed)


def reference(image: np.ndarray, p: Resolved, crop: int, fill: int = 0) -> np.ndarray:
    """The plain way, as an independent check: the whole tile resized, padded, cropped, mirrored, turned."""
    if image.ndim == 3:
        full = np.asarray(Image.fromarray(image).resize((p.scaled_w, p.scaled_h), Image.Resampling.BILINEAR))
    else:
        rows = np.floor((np.arange(p.scaled_h) + 0.5) * image.shape[0] / p.scaled_h).astype(int)
        cols = np.floor((np.arange(p.scaled_w) + 0.5) * image.shape[1] / p.scaled_w).astype(int)
        full = image[rows[:, None], cols]
    side = (max(crop, p.scaled_h), max(crop, p.scaled_w))
    padded = np.full((*side, *image.shape[2:]), fill, image.dtype)
    padded[: p.scaled_h, : p.scaled_w] = full
    out = padded[p.crop_y : p.crop_y + crop, p.crop_x : p.crop_x + crop]
    if p.hflip:
        out = out[:, ::-1]
    if p.vflip:
        out = out[::-1]
    return np.rot90(out, p.turns)


@given(st.sampled_from(CROPS), st.integers(1, 90), st.integers(0, 10**6))
def test_pixels_are_the_resized_padded_cropped_turned_tile(crop: int, tile: int, seed: int) -> None:
    recipe = aerial(crop)
    image = np.random.default_rng(seed).integers(0, 256, (tile, tile, 3), dtype=np.uint8)
    params = draw(recipe, tile, seed)
    view = render(image, np.ones((tile, tile), bool), params, recipe=recipe)
    expected = reference(image, resolve(params), crop)
    # Pillow keeps a crop's corners in float32, which may tip a rounding of either pass; on noise, a shift by a tenth
    # of a pixel would give differences of 20.
    gap = np.abs(view.pixels.astype(int) - expected)
    assert gap.max() <= 2
    assert np.mean(gap > 1) < 0.01
    assert view.pixels.shape == (crop, crop, 3)
    assert view.pixels.flags.c_contiguous
    assert view.valid.flags.c_contiguous


@given(st.sampled_from(CROPS), st.integers(1, 90), st.integers(0, 10**6))
def test_labels_and_validity_are_the_nearest_resize_of_the_same_geometry(crop: int, tile: int, seed: int) -> None:
    recipe = aerial(crop)
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 7, (tile, tile), dtype=np.uint8)
    valid = rng.random((tile, tile)) < 0.8
    params = draw(recipe, tile, seed)
    p = resolve(params)
    view = render(np.zeros((tile, tile, 3), np.uint8), valid, params, recipe=recipe)
    np.testing.assert_array_equal(view.valid, reference(valid, p, crop))
    expected = reference(np.where(valid, label, np.uint8(255)), p, crop, fill=255)
    np.testing.assert_array_equal(render_label(label, valid, params, recipe=recipe), expected)
    ignored = np.where(expected == 255, 9, expected)
    np.testing.assert_array_equal(render_label(label, valid, params, recipe=recipe, ignore_index=9), ignored)


@given(st.sampled_from([56, 112, 224]), st.sampled_from([64, 100, 120]), st.integers(0, 10**6))
def test_pixels_and_labels_agree_within_half_a_tile_pixel(crop: int, tile: int, seed: int) -> None:
    recipe = aerial(crop)
    at = np.arange(tile, dtype=np.uint8)
    xs, ys = np.meshgrid(at, at)
    image = np.stack([2 * xs, 2 * ys, 0 * xs], axis=-1)  # where a pixel is, in half pixels
    valid = np.ones((tile, tile), bool)
    params = draw(recipe, tile, seed)
    pixels = render(image, valid, params, recipe=recipe).pixels.astype(float)
    for channel, label in ((0, xs), (1, ys)):
        nearest = render_label(label, valid, params, recipe=recipe)
        inside = (nearest > 2) & (nearest < tile - 3)  # at the tile's edge the filter is one-sided
        if inside.any():
            gap = np.abs(pixels[:, :, channel] / 2 - nearest)[inside]
            assert gap.max() <= 0.5 + 0.25 + 1e-9  # half a pixel, and the byte's rounding


@given(st.sampled_from([13, 56]), st.integers(1, 60), st.integers(0, 10**6))
def test_only_what_the_tile_covers_is_valid(crop: int, tile: int, seed: int) -> None:
    recipe = aerial(crop)
    params = draw(recipe, tile, seed)
    view = render(np.full((tile, tile, 3), 200, np.uint8), np.ones((tile, tile), bool), params, recipe=recipe)
    inside = np.zeros((crop, crop), bool)
    inside[content_place(resolve(params), crop_px=crop)] = True
    np.testing.assert_array_equal(view.valid, inside)
    assert np.all(view.pixels[inside] == 200)
    assert np.all(view.pixels[~inside] == 0)


def test_padding_is_right_and_bottom_before_flips() -> None:
    recipe = ViewRecipe(crop_px=40, scale=(0.5, 0.5), hflip_p=0.0)
    image, valid = np.full((40, 40, 3), 9, np.uint8), np.ones((40, 40), bool)
    assert np.argwhere(render(image, valid, draw(recipe, 40, 0), recipe=recipe).valid).max(0).tolist() == [19, 19]
    flipped = dataclasses.replace(recipe, hflip_p=1.0)
    view = render(image, valid, draw(flipped, 40, 0), recipe=flipped)
    assert np.argwhere(view.valid).min(0).tolist() == [0, 20]
    assert np.argwhere(view.valid).max(0).tolist() == [19, 39]


def test_plain_is_the_tile_resized_to_the_crop() -> None:
    recipe = aerial(56)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    view = render(image, np.ones((40, 40), bool), draw(recipe, 40, 5, "plain"), recipe=recipe)
    np.testing.assert_array_equal(view.pixels, np.asarray(Image.fromarray(image).resize((56, 56), Image.BILINEAR)))
    assert view.valid.all()


@pytest.mark.parametrize("hflip", [0, 1])
@pytest.mark.parametrize("vflip", [0, 1])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_all_sixteen_orientations_of_a_rectangle(hflip: int, vflip: int, turns: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    record = np.zeros((), PARAM_DTYPE)
    for name, value in {"scaled_h": 8, "scaled_w": 12, "hflip": hflip, "vflip": vflip, "turns": turns}.items():
        record[name] = value
    recipe = ViewRecipe(crop_px=16)
    view = render(image, np.ones((8, 12), bool), record, recipe=recipe)
    np.testing.assert_array_equal(view.pixels, reference(image, resolve(record), 16))
    np.testing.assert_array_equal(view.valid, reference(np.ones((8, 12), bool), resolve(record), 16))


def test_channel_planes_give_the_same_pixels_as_interleaved_ones() -> None:
    planes = np.random.default_rng(0).integers(0, 256, (3, 30, 30), dtype=np.uint8)
    p = resolve(draw(aerial(56), 30, 1))
    seen = planes.transpose(1, 2, 0)
    expected = resample_pixels(np.ascontiguousarray(seen), p, crop_px=56)
    np.testing.assert_array_equal(resample_pixels(seen, p, crop_px=56), expected)
    np.testing.assert_array_equal(resample_pixels(seen[::-1], p, crop_px=56)[:0], expected[:0])
    odd = np.repeat(seen, 2, axis=1)[:, ::2]
    np.testing.assert_array_equal(resample_pixels(odd, p, crop_px=56), expected)


def test_parameters_of_another_recipe_are_refused() -> None:
    params = draw(ViewRecipe(crop_px=20, scale=(2.0, 2.0)), 40, 3)
    assert params["crop_y"] > 0
    with pytest.raises(StoreMismatch, match=r"crop of 79 px.*another recipe"):
        render(np.zeros((40, 40, 3), np.uint8), np.ones((40, 40), bool), params, recipe=ViewRecipe(crop_px=79))


@pytest.mark.parametrize(
    ("image", "valid"),
    [
        (np.zeros((8, 8, 3), np.uint16), np.ones((8, 8), bool)),
        (np.zeros((8, 8), np.uint8), np.ones((8, 8), bool)),
        (np.zeros((8, 8, 4), np.uint8), np.ones((8, 8), bool)),
        (np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), np.uint8)),
        (np.zeros((8, 8, 3), np.uint8), np.ones((8, 9), bool)),
        (np.zeros((0, 8, 3), np.uint8), np.ones((0, 8), bool)),
    ],
)
def test_tiles_of_another_shape_or_type_are_refused(image: np.ndarray, valid: np.ndarray) -> None:
    recipe = ViewRecipe(crop_px=8)
    with pytest.raises(DatasetError, match="must be"):
        render(image, valid, draw(recipe, 8, 0), recipe=recipe)


def test_labels_of_another_type_are_refused() -> None:
    recipe = ViewRecipe(crop_px=8)
    with pytest.raises(DatasetError, match=r"label must be uint8 \[h, w\], found int64"):
        render_label(np.zeros((8, 8), np.int64), np.ones((8, 8), bool), draw(recipe, 8, 0), recipe=recipe)


def test_a_view_owns_its_arrays() -> None:
    recipe = ViewRecipe(crop_px=8, scale=(1.0, 1.0), hflip_p=0.0)
    image, valid = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), bool)
    view: View = render(image, valid, draw(recipe, 8, 0), recipe=recipe)
    view.pixels[:] = 7
    view.valid[:] = False
    assert not image.any()
    assert valid.all()
