"""Whole views: frozen bytes, replay, the paste, and who depends on whom."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsmtdf.errors import StoreMismatch
from rsmtdf.specs import ViewRecipe
from rsmtdf.views.matching import match_pool
from rsmtdf.views.params import draw_params, draw_table, resolve
from rsmtdf.views.view import View, cut_box, paste, render, render_both, view_crc

SMALL = ViewRecipe(crop_px=56, vflip_p=0.5, quarter_turns=True)
DUBAI = Path(__file__).parents[2].parent / "shared" / "data" / "dubai" / "images"


def world(side: int, salt: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A tile of integers only: ramps, checks and a hash-like texture, with an invalid corner."""
    y, x = np.mgrid[:side, :side]
    texture = ((x * 73 + y * 151 + salt * 37) * (x + 3 * y + 11) >> 3) & 63
    image = np.stack(
        [(x * 255 // side + texture) & 255, ((x // 16 + y // 16) % 2) * 120 + texture, 255 - y * 200 // side], -1
    )
    return image.astype(np.uint8), x + y >= side // 6


def frozen_views(max_crop: int = 518) -> dict[str, int]:
    """crc of views that together use every operation, by name."""
    out = {}
    cases = [("plain", 518, 512, 0), ("weak", 518, 512, 1), ("strong", 56, 100, 0), ("strong", 112, 64, 1)]
    cases += [("strong", 224, 256, 2), ("strong2", 224, 200, 3)] + [("strong", 518, 512, seed) for seed in range(6)]
    for stream, crop, tile, seed in cases:
        if crop > max_crop:
            continue
        recipe = ViewRecipe(crop_px=crop, vflip_p=0.5 * (crop < 518), quarter_turns=crop < 518)
        views = []
        for name in ("a/0_0", "a/0_1"):
            image, valid = world(tile, salt=len(views))
            params = draw_params(recipe, tile_id=name, tile_px=tile, stream=stream, seed=seed)
            views.append((render(image, valid, params, recipe=recipe), params))
        (mine, params), (other, _) = views
        out[f"{stream}/{crop}/{tile}/{seed}"] = view_crc(paste(mine, other, params))
    return out


FROZEN = {
    "plain/518/512/0": 3271815708,
    "weak/518/512/1": 1792244845,
    "strong/56/100/0": 801004225,
    "strong/112/64/1": 604205413,
    "strong/224/256/2": 3150007195,
    "strong2/224/200/3": 3034626206,
    "strong/518/512/0": 2951073196,
    "strong/518/512/1": 3247284764,
    "strong/518/512/2": 4237846354,
    "strong/518/512/3": 153883600,
    "strong/518/512/4": 1871383344,
    "strong/518/512/5": 3909811592,
}


def test_bytes_are_frozen() -> None:
    assert frozen_views() == FROZEN, (
        "the bytes of views changed: stores made before would no longer match their pixels. Undo it, or give "
        "ViewRecipe.version a new number with a decision note and a migration."
    )


def test_another_process_renders_the_same_bytes(run_python) -> None:
    code = (
        "import sys, runpy\n"
        "module = runpy.run_path(sys.argv[1])\n"
        "views = module['frozen_views'](max_crop=224)\n"
        "print(sum(views.values()))\n"
    )
    assert int(run_python(code, __file__)) == sum(frozen_views(max_crop=224).values())


def test_threads_render_the_same_bytes() -> None:
    image, valid = world(100)
    table = draw_table(SMALL, tile_ids=[f"t{i}" for i in range(40)], tile_px=100, stream="strong", seed=0)
    serial = [view_crc(render(image, valid, p, recipe=SMALL)) for p in table]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda p: view_crc(render(image, valid, p, recipe=SMALL)), table)) == serial
    assert len(set(serial)) == 40


@settings(max_examples=40)
@given(st.sampled_from([(56, 90), (112, 60), (31, 45)]), st.integers(0, 10**6), st.sampled_from(["strong", "strong2"]))
def test_weak_and_strong_show_the_same_place(sizes: tuple[int, int], seed: int, stream: str) -> None:
    crop, tile = sizes
    recipe = ViewRecipe(crop_px=crop, vflip_p=0.5, quarter_turns=True, jitter_p=0.5, blur_p=0.3)
    image, valid = world(tile)
    weak_params = draw_params(recipe, tile_id="t", tile_px=tile, stream="weak", seed=seed)
    params = draw_params(recipe, tile_id="t", tile_px=tile, stream=stream, seed=seed)
    weak, strong = render(image, valid, weak_params, recipe=recipe), render(image, valid, params, recipe=recipe)
    np.testing.assert_array_equal(weak.valid, strong.valid)
    p = resolve(params)
    if not (p.jitter or p.grey or p.blur_radius):
        np.testing.assert_array_equal(weak.pixels, strong.pixels)
    both = render_both(image, valid, params, recipe=recipe)
    assert [view_crc(v) for v in both] == [view_crc(weak), view_crc(strong)]
    assert not np.shares_memory(both[0].pixels, both[1].pixels)
    assert not np.shares_memory(both[0].valid, both[1].valid)


def pool_views(salts: dict[str, int], *, seed: int, mixed: bool = True) -> dict[str, int]:
    """crc of every strong view of a pool whose tile `id` shows `world(salt)`; all pastes from unpasted partners."""
    ids = sorted(salts)
    order, partner = match_pool(SMALL, tile_ids=ids, stream="strong", seed=seed, generation=0)
    table = draw_table(SMALL, tile_ids=[ids[i] for i in order], tile_px=64, stream="strong", seed=seed)
    plain = [render(*world(64, salts[ids[i]]), p, recipe=SMALL) for i, p in zip(order, table, strict=True)]
    done = [paste(v, plain[partner[r]], table[r]) if mixed else v for r, v in enumerate(plain)]
    return {ids[i]: view_crc(v) for i, v in zip(order, done, strict=True)}


@settings(max_examples=15)
@given(st.integers(2, 9), st.integers(0, 1000), st.data())
def test_a_tile_concerns_its_own_and_its_partners_view_only(n: int, seed: int, data) -> None:
    ids = [f"t{i}" for i in range(n)]
    salts = {name: i for i, name in enumerate(ids)}
    changed = data.draw(st.sampled_from(ids))
    before = pool_views(salts, seed=seed)
    after = pool_views(salts | {changed: 999}, seed=seed)
    order, partner = match_pool(SMALL, tile_ids=ids, stream="strong", seed=seed, generation=0)
    mates = {ids[order[r]]: ids[order[partner[r]]] for r in range(n)}
    assert {name for name in ids if before[name] != after[name]} <= {changed, mates[changed]}
    assert before[changed] != after[changed]


def test_the_paste_is_the_partners_view_before_its_own_paste() -> None:
    image_a, valid = world(64, 1)
    image_b, _ = world(64, 2)
    seen = 0
    for seed in range(60):
        a, b = (draw_params(SMALL, tile_id=t, tile_px=64, stream="strong", seed=seed) for t in ("a", "b"))
        mine, other = render(image_a, valid, a, recipe=SMALL), render(image_b, valid, b, recipe=SMALL)
        untouched = view_crc(mine), view_crc(other)
        mixed = paste(mine, other, a)
        box = cut_box(a)
        if box is None:
            assert mixed is mine
            continue
        inside = np.zeros((56, 56), bool)
        inside[box] = True
        p = resolve(a)
        assert inside.sum() == p.cut_h * p.cut_w > 0
        np.testing.assert_array_equal(mixed.pixels[inside], other.pixels[inside])
        np.testing.assert_array_equal(mixed.valid[inside], other.valid[inside])
        np.testing.assert_array_equal(mixed.pixels[~inside], mine.pixels[~inside])
        np.testing.assert_array_equal(mixed.valid[~inside], mine.valid[~inside])
        assert (view_crc(mine), view_crc(other)) == untouched, "a paste must not write into its sources"
        # Pasting both ways round is not pasting in turn: the second source must be the unpasted view.
        both = cut_box(b)
        if both is not None and inside[both].any():
            in_turn, right = paste(other, mixed, b), paste(other, mine, b)
            seen += view_crc(in_turn) != view_crc(right)
    assert seen > 3


def test_the_lone_tile_of_an_odd_pool_is_pasted_on_itself_unchanged() -> None:
    image, valid = world(64)
    recipe = ViewRecipe(crop_px=56, cutmix_p=1.0)
    params = draw_params(recipe, tile_id="a", tile_px=64, stream="strong", seed=0)
    view = render(image, valid, params, recipe=recipe)
    assert view_crc(paste(view, view, params)) == view_crc(view)


def test_a_box_that_does_not_fit_is_refused() -> None:
    params = draw_params(ViewRecipe(cutmix_p=1.0), tile_id="a", tile_px=64, stream="strong", seed=0)
    small = View(np.zeros((20, 20, 3), np.uint8), np.ones((20, 20), bool))
    with pytest.raises(StoreMismatch, match="does not fit"):
        paste(small, small, params)


def test_the_crc_covers_pixels_then_validity() -> None:
    view = View(np.arange(12, dtype=np.uint8).reshape(2, 2, 3), np.array([[True, False], [True, True]]))
    assert view_crc(view) == google_crc32c.value(bytes(range(12)) + b"\1\0\1\1")
    for change in (view.pixels, view.valid):
        before = view_crc(view)
        change[0, 0] = 7 if change is view.pixels else False
        assert view_crc(view) != before
    assert google_crc32c.value(b"123456789") == 0xE3069283  # the polynomial: Castagnoli


def test_real_tiles_have_plausible_strong_views() -> None:
    if not DUBAI.is_dir():
        pytest.skip("the Dubai sample (../shared/data/dubai) is not beside this checkout")
    from PIL import Image

    with Image.open(sorted(DUBAI.glob("*.jpg"))[0]) as file:
        image = np.asarray(file.convert("RGB"))[:256, :256]
    valid = np.ones(image.shape[:2], bool)
    recipe = ViewRecipe(crop_px=224)
    table = draw_table(recipe, tile_ids=[f"t{i}" for i in range(60)], tile_px=256, stream="strong", seed=0)
    means = [render(image, valid, p, recipe=recipe) for p in table]
    inside = np.array([v.pixels[v.valid].mean() for v in means])
    assert abs(inside.mean() / image.mean() - 1) < 0.1  # the jitter is about 1
    assert inside.std() > 10
