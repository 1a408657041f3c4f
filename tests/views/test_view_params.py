from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsmtdf.errors import ConfigError, StoreMismatch
from rsmtdf.specs import STREAMS, ViewRecipe
from rsmtdf.views.params import (
    HUE_TURN,
    JITTER_ORDERS,
    PARAM_DTYPE,
    UNIT,
    draw_params,
    draw_table,
    resolve,
    same_params,
)

RECIPE = ViewRecipe()
AERIAL = ViewRecipe(vflip_p=0.5, quarter_turns=True)
IDS = [f"scene{i // 10}/{i % 10}_0" for i in range(400)]
GEOMETRY = ["scaled_h", "scaled_w", "crop_y", "crop_x", "hflip", "vflip", "turns"]
PHOTOMETRIC = ["jitter", "jitter_order", "brightness", "contrast", "saturation", "hue", "grey", "blur_radius"]
BOX = ["cut_y", "cut_x", "cut_h", "cut_w"]


def table(recipe: ViewRecipe, stream: str, seed: int = 0, tile_px: int = 512) -> np.ndarray:
    return draw_table(recipe, tile_ids=IDS, tile_px=tile_px, stream=stream, seed=seed)


def test_columns_are_plain_little_endian_numbers() -> None:
    assert list(PARAM_DTYPE.names or ()) == GEOMETRY + PHOTOMETRIC + BOX
    for name in PARAM_DTYPE.names or ():
        field = PARAM_DTYPE[name]
        assert field.kind in "uif"
        assert field.newbyteorder("<") == field


@pytest.mark.parametrize("stream", STREAMS)
def test_a_table_is_its_records_stacked_in_any_order(stream: str) -> None:
    whole = table(AERIAL, stream)
    backwards = draw_table(AERIAL, tile_ids=IDS[::-1], tile_px=512, stream=stream, seed=0)[::-1]
    singly = np.stack([draw_params(AERIAL, tile_id=i, tile_px=512, stream=stream, seed=0) for i in reversed(IDS)][::-1])
    assert whole.dtype == PARAM_DTYPE
    assert same_params(whole, backwards) == []
    assert same_params(whole, singly) == []


def test_another_process_draws_the_same(run_python) -> None:
    code = (
        "import json\n"
        "from rsmtdf.specs import ViewRecipe\n"
        "from rsmtdf.views.params import draw_params\n"
        "p = draw_params(ViewRecipe(), tile_id='a/1_2', tile_px=512, stream='strong', seed=3)\n"
        "print(json.dumps(p.item()))\n"
    )
    here = draw_params(RECIPE, tile_id="a/1_2", tile_px=512, stream="strong", seed=3)
    assert tuple(json.loads(run_python(code))) == here.item()


def test_streams_of_one_seed_share_the_geometry_and_nothing_else() -> None:
    weak, strong, strong2 = (table(AERIAL, s) for s in ("weak", "strong", "strong2"))
    assert same_params(weak[GEOMETRY], strong[GEOMETRY]) == PHOTOMETRIC + BOX  # the missing fields; no difference
    np.testing.assert_array_equal(weak[GEOMETRY], strong[GEOMETRY])
    np.testing.assert_array_equal(strong[GEOMETRY], strong2[GEOMETRY])
    for name in ("brightness", "hue", "cut_y"):
        assert np.mean(strong[name] == strong2[name]) < 0.7


def test_weak_and_plain_have_no_photometric_part_and_no_box() -> None:
    neutral = dict.fromkeys(PHOTOMETRIC + BOX, 0) | dict.fromkeys(("brightness", "contrast", "saturation"), UNIT)
    for stream in ("weak", "plain"):
        rows = table(AERIAL, stream)
        for name, value in neutral.items():
            assert np.all(rows[name] == value), name


def test_plain_is_the_whole_tile_whatever_the_seed() -> None:
    p = resolve(draw_params(AERIAL, tile_id="a", tile_px=300, stream="plain", seed=0))
    assert (p.scaled_h, p.scaled_w, p.crop_y, p.crop_x, p.hflip, p.vflip, p.turns) == (518, 518, 0, 0, 0, 0, 0)
    assert same_params(table(AERIAL, "plain", seed=0), table(AERIAL, "plain", seed=5)) == []


def test_seeds_and_tiles_are_independent_draws() -> None:
    first, second = table(RECIPE, "strong", seed=0), table(RECIPE, "strong", seed=1)
    for name in ("scaled_h", "brightness", "hflip", "hue"):
        assert abs(np.corrcoef(first[name], second[name])[0, 1]) < 0.15
        assert abs(np.corrcoef(first[name][1:], first[name][:-1])[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("change", "may_differ"),
    [
        ({"hflip_p": 0.9}, ["hflip"]),
        ({"vflip_p": 0.5}, ["vflip"]),
        ({"quarter_turns": True}, ["turns"]),
        ({"scale": (0.7, 1.5)}, ["scaled_h", "scaled_w", "crop_y", "crop_x"]),
        ({"jitter_p": 0.1}, ["jitter", "jitter_order", "brightness", "contrast", "saturation", "hue"]),
        ({"brightness": 0.2}, ["brightness"]),
        ({"contrast": 0.2}, ["contrast"]),
        ({"saturation": 0.2}, ["saturation"]),
        ({"hue": 0.1}, ["hue"]),
        ({"grey_p": 0.8}, ["grey"]),
        ({"blur_p": 0.1}, ["blur_radius"]),
        ({"blur_radius": (1.0, 3.0)}, ["blur_radius"]),
        ({"cutmix_p": 0.1}, BOX),
        ({"cutmix_area": (0.1, 0.2)}, BOX),
    ],
)
def test_changing_one_field_of_the_recipe_shifts_no_other_draw(change: dict, may_differ: list[str]) -> None:
    differ = same_params(table(RECIPE, "strong"), table(dataclasses.replace(RECIPE, **change), "strong"))
    assert differ
    assert set(differ) <= set(may_differ)


def test_a_lower_probability_keeps_what_still_happens() -> None:
    often, seldom = table(RECIPE, "strong"), table(dataclasses.replace(RECIPE, cutmix_p=0.2), "strong")
    pasted = seldom["cut_h"] > 0
    assert 0.1 < pasted.mean() < 0.3
    np.testing.assert_array_equal(often[BOX][pasted], seldom[BOX][pasted])


def test_draws_fill_the_published_ranges() -> None:
    rows = np.concatenate([table(RECIPE, "strong", seed=s) for s in range(10)])
    n = len(rows)
    assert rows["scaled_h"].min() < 270
    assert rows["scaled_h"].max() > 1010
    assert rows["scaled_h"].min() >= 256
    assert rows["scaled_h"].max() <= 1024
    assert np.all(rows["crop_y"] <= np.maximum(rows["scaled_h"].astype(int) - 518, 0))
    assert np.all(rows["vflip"] == 0)
    assert np.all(rows["turns"] == 0)
    for name, p in (("hflip", 0.5), ("jitter", 0.8), ("grey", 0.2)):
        assert abs(rows[name].mean() - p) < 4 * math.sqrt(p * (1 - p) / n), name
    jittered = rows[rows["jitter"] == 1]
    for name in ("brightness", "contrast", "saturation"):
        assert (jittered[name].min(), jittered[name].max()) == (UNIT // 2, UNIT + UNIT // 2)
    assert (jittered["hue"].min(), jittered["hue"].max()) == (-HUE_TURN // 4, HUE_TURN // 4)
    assert set(jittered["jitter_order"].tolist()) == set(range(len(JITTER_ORDERS)))
    blurred = rows["blur_radius"][rows["blur_radius"] > 0]
    assert abs(len(blurred) / n - 0.5) < 0.05
    assert 0.1 <= blurred.min() < 0.15
    assert 1.95 < blurred.max() <= 2.0
    assert np.all(blurred * 64 == np.rint(blurred * 64))


def test_boxes_lie_inside_and_have_the_published_area_and_ratio() -> None:
    rows = np.concatenate([table(RECIPE, "strong", seed=s) for s in range(10)])
    boxes = rows[rows["cut_h"] > 0]
    y, x, h, w = (boxes[name].astype(np.float64) for name in BOX)
    assert abs(len(boxes) / len(rows) - 0.5) < 0.04
    assert np.all(y + h <= 518)
    assert np.all(x + w <= 518)
    assert np.all(h * w <= 0.4 * 518**2)
    assert np.all((h + 1) * (w + 1) >= 0.02 * 518**2)
    ratio = h / w
    assert 0.28 < ratio.min() < 0.4
    assert 2.8 < ratio.max() < 3.5
    # Uniform in the ratio, so most boxes are tall; a log-uniform draw would give as many wide ones.
    assert np.mean(ratio > 1) > 0.6


@given(crop=st.integers(1, 600), tile=st.integers(1, 700), seed=st.integers(0, 10**6))
def test_every_record_of_any_crop_and_tile_is_usable(crop: int, tile: int, seed: int) -> None:
    recipe = ViewRecipe(crop_px=crop, cutmix_p=1.0, vflip_p=0.5, quarter_turns=True)
    p = resolve(draw_params(recipe, tile_id="t", tile_px=tile, stream="strong", seed=seed))
    assert 1 <= p.scaled_h == p.scaled_w <= 2 * tile
    assert 0 <= p.crop_y <= max(0, p.scaled_h - crop)
    assert 0 <= p.crop_x <= max(0, p.scaled_w - crop)
    assert p.cut_h > 0
    assert p.cut_w > 0
    assert p.cut_y + p.cut_h <= crop
    assert p.cut_x + p.cut_w <= crop


def test_same_params_names_what_differs() -> None:
    a = table(RECIPE, "strong")
    b = a.copy()
    b["hue"][7] += 1
    b["cut_w"][9] += 1
    assert same_params(a, b) == ["hue", "cut_w"]
    assert same_params(a[3], a[3].copy()) == []
    assert same_params(draw_params(RECIPE, tile_id=IDS[3], tile_px=512, stream="strong", seed=0), a[3]) == []
    with pytest.raises(ValueError, match="shape"):
        same_params(a, a[:5])


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"crop_px": 0},
        {"scale": (0.0, 2.0)},
        {"scale": (2.0, 0.5)},
        {"scale": (0.5, 1000.0)},
        {"scale": (0.5, math.inf)},
        {"hflip_p": 1.5},
        {"jitter_p": math.nan},
        {"brightness": 1.5},
        {"hue": 0.6},
        {"blur_radius": (1.0, 20.0)},
        {"cutmix_area": (0.2, 1.0)},
        {"cutmix_area": (0.9, 0.95), "cutmix_ratio": (3.0, 4.0)},
        {"cutmix_ratio": (0.0, 1.0)},
    ],
)
def test_a_recipe_that_cannot_be_drawn_is_named(change: dict) -> None:
    with pytest.raises(ConfigError, match=list(change)[-1]):
        draw_params(dataclasses.replace(RECIPE, **change), tile_id="a", tile_px=512, stream="strong", seed=0)


def test_all_problems_of_a_recipe_are_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"crop_px is 0.*hue is 2"):
        draw_params(ViewRecipe(crop_px=0, hue=2.0), tile_id="a", tile_px=512, stream="weak", seed=0)


def test_an_unknown_stream_is_named() -> None:
    with pytest.raises(ConfigError, match="'strong3'"):
        draw_params(RECIPE, tile_id="a", tile_px=512, stream="strong3", seed=0)  # type: ignore[arg-type]


def test_resolve_wants_one_record() -> None:
    rows = table(RECIPE, "strong")
    assert resolve(rows[2]) == resolve(rows[2:3]) == resolve(np.asarray(rows[2]))
    with pytest.raises(StoreMismatch, match="400"):
        resolve(rows)
    with pytest.raises(StoreMismatch, match="PARAM_DTYPE"):
        resolve(rows[GEOMETRY][0])
