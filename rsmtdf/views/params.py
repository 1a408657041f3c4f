"""The resolved parameters of a view, and the keyed draws that give them.

Every number that shapes a view is one field of `PARAM_DTYPE`, so a store keeps a view's parameters as plain columns
and any later reader can replay it without our random numbers. Factors are integers (`UNIT` steps to 1, `HUE_TURN`
steps to the hue circle): the arithmetic on pixels is then integer too, hence the same on every CPU.

Each group of draws has its own key: (recipe version, tile id, purpose, seed). Within a group every draw takes its
word whether or not it is used, so changing a probability never shifts another draw; only the box, drawn until it
fits, takes a varying number, and it has a group of its own. `weak`, `strong` and `strong2` of one seed share the
purpose `geometry`, hence the geometry.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rsmtdf.errors import ConfigError, StoreMismatch
from rsmtdf.keyed import Draws
from rsmtdf.specs import STREAMS, Stream, ViewRecipe

RECIPE_VERSION = 1
"""The only `ViewRecipe.version` whose bytes this code makes."""

UNIT = 64
"""Brightness, contrast and saturation factors are stored in 1/64: 64 changes nothing."""

HUE_TURN = 192
"""Hue shifts are stored in 1/192 of the circle (32 steps to a sixth, so that the shift is a multiply and a shift)."""

BLUR_STEP = 64
"""Blur radii are multiples of 1/64 px: few enough that a test checks every kernel."""

MAX_BLUR_RADIUS = 4.0
"""In pixels: beyond, weights in 1/256 would be too coarse (the kernel's deviation is kept to 4 %)."""

JITTER_ORDERS: tuple[tuple[int, ...], ...] = tuple(itertools.permutations(range(4)))
"""`jitter_order` -> the order of (0 brightness, 1 contrast, 2 saturation, 3 hue); lexicographic, so 0 is 0, 1, 2, 3."""

_BOX_TRIES = 10_000

PARAM_DTYPE = np.dtype(
    [
        ("scaled_h", "<u2"),
        ("scaled_w", "<u2"),
        ("crop_y", "<u2"),
        ("crop_x", "<u2"),
        ("hflip", "u1"),
        ("vflip", "u1"),
        ("turns", "u1"),
        ("jitter", "u1"),
        ("jitter_order", "u1"),
        ("brightness", "u1"),
        ("contrast", "u1"),
        ("saturation", "u1"),
        ("hue", "i1"),
        ("grey", "u1"),
        ("blur_radius", "<f8"),
        ("cut_y", "<u2"),
        ("cut_x", "<u2"),
        ("cut_h", "<u2"),
        ("cut_w", "<u2"),
    ]
)
"""One field = one column of the store. Pixels unless `Resolved` says otherwise."""


class Resolved(NamedTuple):
    """One record of `PARAM_DTYPE` as Python numbers, in the order in which a view is made."""

    scaled_h: int
    """Height of the whole tile after the resize, in view pixels."""
    scaled_w: int
    crop_y: int
    """Top row of the crop in the resized tile, which is padded right and bottom to the crop where smaller."""
    crop_x: int
    hflip: int
    """1: mirrored left-right (first), `vflip` 1: mirrored top-bottom (second)."""
    vflip: int
    turns: int
    """Counter-clockwise quarter turns, after the flips."""
    jitter: int
    """1: the colour jitter applies; 0: the next five fields are neutral."""
    jitter_order: int
    """Index into `JITTER_ORDERS`."""
    brightness: int
    contrast: int
    saturation: int
    """Factors in 1/`UNIT`."""
    hue: int
    """Shift in 1/`HUE_TURN` of the circle."""
    grey: int
    blur_radius: float
    """Standard deviation in pixels; 0: no blur."""
    cut_y: int
    cut_x: int
    cut_h: int
    """The box that the partner's view replaces; `cut_h` 0: no paste."""
    cut_w: int


def resolve(params: np.ndarray | np.void) -> Resolved:
    """The one record in `params` (0-d, one element, or a row of a table) as Python numbers.

    Raises:
        StoreMismatch: `params` has other fields than `PARAM_DTYPE` or is not one record.
    """
    record = np.asarray(params)
    if record.dtype != PARAM_DTYPE or record.size != 1:
        raise StoreMismatch(
            f"view parameters must be one record of PARAM_DTYPE, found {record.size} of {record.dtype}; "
            "assemble store columns into np.empty(n, PARAM_DTYPE) and pass one row"
        )
    return Resolved(*record.reshape(()).item())


def draw_params(recipe: ViewRecipe, *, tile_id: str, tile_px: int, stream: Stream, seed: int) -> np.ndarray:
    """The parameters of the view (tile, stream, seed): a 0-d record of `PARAM_DTYPE`.

    Args:
        recipe: probabilities and ranges.
        tile_id: the tile's stable id; with stream and seed, the only source of randomness.
        tile_px: side of the tile array in pixels.
        stream: plain (no augmentation, the whole tile), weak (geometry), strong or strong2 (everything).
        seed: number of the view within the stream; `plain` is the same for every seed.

    Raises:
        ConfigError: the recipe or the stream cannot be drawn from.
    """
    return draw_table(recipe, tile_ids=[tile_id], tile_px=tile_px, stream=stream, seed=seed).reshape(())


def draw_table(recipe: ViewRecipe, *, tile_ids: Sequence[str], tile_px: int, stream: Stream, seed: int) -> np.ndarray:
    """The parameters of one view of each tile: [n] of `PARAM_DTYPE`, equal to `draw_params` stacked.

    Raises:
        ConfigError: the recipe or the stream cannot be drawn from.
    """
    check_recipe(recipe, tile_px=tile_px)
    if stream not in STREAMS:
        raise ConfigError(f"no stream {stream!r}; there are {', '.join(STREAMS)}")
    rows = [tuple(_draw(recipe, tile_id, tile_px, stream, seed)) for tile_id in tile_ids]
    return np.array(rows, dtype=PARAM_DTYPE)


def same_params(a: np.ndarray | np.void, b: np.ndarray | np.void) -> list[str]:
    """The names of the fields in which two records, or two tables of equal length, differ (none: a faithful replay).

    A field that either lacks counts as different.

    Raises:
        ValueError: tables of different shape.
    """
    first, second = np.asarray(a), np.asarray(b)
    if first.shape != second.shape:
        raise ValueError(f"cannot compare parameters of shape {first.shape} with {second.shape}")
    both = set(first.dtype.names or ()) & set(second.dtype.names or ())
    return [n for n in PARAM_DTYPE.names or () if n not in both or bool(np.any(first[n] != second[n]))]


def check_recipe(recipe: ViewRecipe, *, tile_px: int) -> None:
    """Passes if every view of tiles of `tile_px` can be drawn and stored.

    Raises:
        ConfigError: naming every field that is out of range, with the range.
    """
    r = recipe
    crop, long_side = r.crop_px, int(r.scale[1] * tile_px) if math.isfinite(r.scale[1]) else 0
    problems: list[str] = []

    def expect(ok: bool, message: str) -> None:
        if not ok:
            problems.append(message)

    expect(r.version == RECIPE_VERSION, f"version is {r.version}, this rsmtdf makes version {RECIPE_VERSION} only")
    expect(1 <= crop <= 65535, f"crop_px is {crop}, expected 1..65535")
    expect(1 <= tile_px <= 65535, f"tile_px is {tile_px}, expected 1..65535")
    expect(
        0 < r.scale[0] <= r.scale[1] and 1 <= long_side <= 65535,
        f"scale is {r.scale}, expected 0 < low <= high with 1..65535 px at high",
    )
    for name in ("hflip_p", "vflip_p", "jitter_p", "grey_p", "blur_p", "cutmix_p"):
        expect(0 <= getattr(r, name) <= 1, f"{name} is {getattr(r, name)}, expected 0..1")
    for name in ("brightness", "contrast", "saturation"):
        expect(0 <= getattr(r, name) <= 1, f"{name} is {getattr(r, name)}, expected 0..1")
    expect(0 <= r.hue <= 0.5, f"hue is {r.hue}, expected 0..0.5")
    expect(
        0 <= r.blur_radius[0] <= r.blur_radius[1] <= MAX_BLUR_RADIUS,
        f"blur_radius is {r.blur_radius}, expected 0 <= low <= high <= {MAX_BLUR_RADIUS} px",
    )
    area, ratio = r.cutmix_area, r.cutmix_ratio
    expect(0 < area[0] <= area[1] < 1, f"cutmix_area is {area}, expected 0 < low <= high < 1")
    # A ratio q fits an area a if q and 1/q are at most 1/a; else the redrawing would never end.
    expect(
        0 < ratio[0] <= ratio[1] and ratio[0] < 1 / area[1] and ratio[1] > area[1] if area[1] > 0 else False,
        f"cutmix_ratio is {ratio}, expected 0 < low <= high with boxes of area {area[1]} that fit the crop",
    )
    if problems:
        raise ConfigError("view recipe: " + "; ".join(problems))


def _draw(recipe: ViewRecipe, tile_id: str, tile_px: int, stream: Stream, seed: int) -> Resolved:
    if stream == "plain":
        return Resolved._make((recipe.crop_px, recipe.crop_px, 0, 0, 0, 0, 0, *_NO_PHOTOMETRIC, *_NO_BOX))
    geometry = _draw_geometry(recipe, Draws(recipe.version, tile_id, "geometry", seed), tile_px)
    if stream == "weak":
        return Resolved._make((*geometry, *_NO_PHOTOMETRIC, *_NO_BOX))
    photometric = _draw_photometric(recipe, Draws(recipe.version, tile_id, f"photometric/{stream}", seed))
    box = _draw_box(recipe, Draws(recipe.version, tile_id, f"cutmix/{stream}", seed))
    return Resolved._make((*geometry, *photometric, *box))


_Photometric = tuple[int, int, int, int, int, int, int, float]
_NO_PHOTOMETRIC: _Photometric = (0, 0, UNIT, UNIT, UNIT, 0, 0, 0.0)
_NO_BOX = (0, 0, 0, 0)


def _draw_geometry(recipe: ViewRecipe, draws: Draws, tile_px: int) -> tuple[int, int, int, int, int, int, int]:
    low, high = (max(1, int(s * tile_px)) for s in recipe.scale)
    scaled = draws.integer(low, high)  # tiles are square: the short side is the long side
    slack = max(0, scaled - recipe.crop_px)
    crop_y, crop_x = draws.integer(0, slack), draws.integer(0, slack)
    hflip, vflip = draws.chance(recipe.hflip_p), draws.chance(recipe.vflip_p)
    turns = draws.integer(0, 3)
    return scaled, scaled, crop_y, crop_x, int(hflip), int(vflip), turns if recipe.quarter_turns else 0


def _draw_photometric(recipe: ViewRecipe, draws: Draws) -> _Photometric:
    jitter = draws.chance(recipe.jitter_p)
    order = draws.integer(0, len(JITTER_ORDERS) - 1)
    amounts = [round(amount * UNIT) for amount in (recipe.brightness, recipe.contrast, recipe.saturation)]
    brightness, contrast, saturation = (draws.integer(UNIT - a, UNIT + a) for a in amounts)
    turn = int(recipe.hue * HUE_TURN)
    hue = draws.integer(-turn, turn)
    grey = draws.chance(recipe.grey_p)
    blur = draws.chance(recipe.blur_p)
    low, high = recipe.blur_radius
    first = math.ceil(low * BLUR_STEP)
    radius = draws.integer(first, max(first, int(high * BLUR_STEP))) / BLUR_STEP if blur else 0.0
    if not jitter:
        return 0, 0, UNIT, UNIT, UNIT, 0, int(grey), radius
    return 1, order, brightness, contrast, saturation, hue, int(grey), radius


def _draw_box(recipe: ViewRecipe, draws: Draws) -> tuple[int, int, int, int]:
    """(y, x, h, w); the area is drawn once, ratio and place until the box lies inside the crop (the published rule)."""
    if not draws.chance(recipe.cutmix_p):
        return _NO_BOX
    crop = recipe.crop_px
    area = draws.uniform(*recipe.cutmix_area) * crop * crop
    for _ in range(_BOX_TRIES):
        ratio = draws.uniform(*recipe.cutmix_ratio)
        h, w = max(1, int(math.sqrt(area * ratio))), max(1, int(math.sqrt(area / ratio)))
        y, x = draws.integer(0, crop - 1), draws.integer(0, crop - 1)
        if y + h <= crop and x + w <= crop:
            return y, x, h, w
    raise ConfigError(
        f"no CutMix box of {area:.0f} px and ratio in {recipe.cutmix_ratio} fitted a crop of {crop} px "
        f"in {_BOX_TRIES} draws; widen cutmix_ratio or lower cutmix_area"
    )
