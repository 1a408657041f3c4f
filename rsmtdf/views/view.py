"""The view: pixels and validity of one tile under one set of resolved parameters, byte for byte.

Stage 1 shows a view to the teachers and stage 2 to the student, perhaps months later on another machine, so the
bytes are a contract: any change to them needs a new `ViewRecipe.version` (a test with frozen checksums says so).
The crc32c of a view's pixels and validity is stored beside its features and checked in training.

`render` stops before the paste, because what is pasted is the partner's view *before its own paste*:

    mine, other = render(...), render(...)
    mixed = paste(mine, other, my_params), paste(other, mine, other_params)
"""

from __future__ import annotations

from dataclasses import dataclass

import google_crc32c
import numpy as np

from rsmtdf.errors import DatasetError, StoreMismatch
from rsmtdf.specs import IGNORE_INDEX, ViewRecipe
from rsmtdf.views import photometric
from rsmtdf.views.geometry import content_place, resample_nearest, resample_pixels
from rsmtdf.views.params import Resolved, resolve


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """An augmented crop of a tile: pixels uint8 [c, c, 3] (RGB) and valid bool [c, c], both C-contiguous."""

    pixels: np.ndarray
    valid: np.ndarray


def render(image: np.ndarray, valid: np.ndarray, params: np.ndarray | np.void, *, recipe: ViewRecipe) -> View:
    """The view of a tile before any paste. Thread-safe; the result is the caller's.

    Args:
        image: uint8 [h, w, 3], RGB; a transposed [3, h, w] is as fast.
        valid: bool [h, w].
        params: one record of `PARAM_DTYPE`.
        recipe: the recipe the parameters were drawn with; only its crop is used.

    Raises:
        DatasetError: image or valid of another shape or dtype.
        StoreMismatch: the parameters do not fit the recipe.
    """
    p, part, place, shown = _resample(image, valid, params, recipe)
    if photometric.is_identity(p):
        return View(_on_black(part, place, recipe.crop_px), shown)
    return View(photometric.apply(part, place, p, crop_px=recipe.crop_px), shown)


def render_both(
    image: np.ndarray, valid: np.ndarray, params: np.ndarray | np.void, *, recipe: ViewRecipe
) -> tuple[View, View]:
    """The weak view of these parameters' geometry and `render` of them all, for the price of one resample.

    Args and errors as `render`; the first view is what the stream `weak` gives for the same tile and seed.
    """
    p, part, place, shown = _resample(image, valid, params, recipe)
    weak = View(_on_black(part, place, recipe.crop_px), shown)
    if photometric.is_identity(p):
        return weak, View(weak.pixels.copy(), shown.copy())
    return weak, View(photometric.apply(part, place, p, crop_px=recipe.crop_px), shown.copy())


def render_label(
    label: np.ndarray,
    valid: np.ndarray,
    params: np.ndarray | np.void,
    *,
    recipe: ViewRecipe,
    ignore_index: int = IGNORE_INDEX,
) -> np.ndarray:
    """The label of a view, uint8 [c, c], before any paste: same geometry, nearest, `ignore_index` where not valid.

    Raises:
        DatasetError: label or valid of another shape or dtype.
        StoreMismatch: the parameters do not fit the recipe.
    """
    _check_tile(label, valid, "label", ())
    shown = _render_valid(valid, resolve(params), recipe.crop_px)
    return label_of_view(label, shown, params, recipe=recipe, ignore_index=ignore_index)


def label_of_view(
    label: np.ndarray,
    shown: np.ndarray,
    params: np.ndarray | np.void,
    *,
    recipe: ViewRecipe,
    ignore_index: int = IGNORE_INDEX,
) -> np.ndarray:
    """As `render_label`, from the valid mask of the view itself (`shown`, bool [c, c], before any paste) instead of the
    tile's.
    """
    p = resolve(params)
    crop = recipe.crop_px
    place = content_place(p, crop_px=crop)
    out = np.full((crop, crop), ignore_index, np.uint8)
    out[place] = resample_nearest(label, p, crop_px=crop)
    out[~shown] = ignore_index
    return out


def paste(view: View, partner: View, params: np.ndarray | np.void) -> View:
    """`view` with its CutMix box taken from `partner`, pixels and validity; `view` itself where there is no box.

    Args:
        view: as `render` made it.
        partner: the partner's view as `render` made it, before its own paste.
        params: the parameters of `view`.

    Raises:
        StoreMismatch: the box does not fit the views.
    """
    box = cut_box(params)
    if box is None:
        return view
    bounds = view.valid.shape
    if partner.valid.shape != bounds or box[0].stop > bounds[0] or box[1].stop > bounds[1]:
        raise StoreMismatch(
            f"a CutMix box ending at row {box[0].stop}, column {box[1].stop} does not fit views of "
            f"{bounds} and {partner.valid.shape} px; were they rendered with another recipe?"
        )
    pixels, valid = view.pixels.copy(), view.valid.copy()
    pixels[box] = partner.pixels[box]
    valid[box] = partner.valid[box]
    return View(pixels, valid)


def cut_box(params: np.ndarray | np.void) -> tuple[slice, slice] | None:
    """Rows and columns of the CutMix box; None where nothing is pasted. Pseudo-labels mix with the same box."""
    p = resolve(params)
    if p.cut_h == 0:
        return None
    return slice(p.cut_y, p.cut_y + p.cut_h), slice(p.cut_x, p.cut_x + p.cut_w)


def view_crc(view: View) -> int:
    """The crc32c of the pixel bytes followed by the validity bytes (0 or 1), as stored per view."""
    return int(google_crc32c.extend(google_crc32c.value(view.pixels.tobytes()), view.valid.tobytes()))


def _resample(
    image: np.ndarray, valid: np.ndarray, params: np.ndarray | np.void, recipe: ViewRecipe
) -> tuple[Resolved, np.ndarray, tuple[slice, slice], np.ndarray]:
    """The geometry of a view: parameters, the tile's pixels in it, where they lie, and the whole valid mask."""
    _check_tile(image, valid, "image", (3,))
    p = resolve(params)
    crop = recipe.crop_px
    place = content_place(p, crop_px=crop)
    return p, resample_pixels(image, p, crop_px=crop), place, _render_valid(valid, p, crop)


def _on_black(part: np.ndarray, place: tuple[slice, slice], crop_px: int) -> np.ndarray:
    if part.shape[:2] == (crop_px, crop_px):
        return part.copy()  # Pillow's bytes are read-only
    pixels = np.zeros((crop_px, crop_px, 3), np.uint8)
    pixels[place] = part
    return pixels


def _render_valid(valid: np.ndarray, p: Resolved, crop_px: int) -> np.ndarray:
    out = np.zeros((crop_px, crop_px), np.bool_)
    place = content_place(p, crop_px=crop_px)
    # Nearly every tile is wholly valid, and finding that out costs 5 us.
    out[place] = True if valid.all() else resample_nearest(valid, p, crop_px=crop_px)
    return out


def _check_tile(array: np.ndarray, valid: np.ndarray, what: str, channels: tuple[int, ...]) -> None:
    h_w = array.shape[:2]
    if array.dtype != np.uint8 or len(h_w) != 2 or array.shape[2:] != channels or 0 in h_w:
        expected = ", ".join(["h", "w", *map(str, channels)])
        raise DatasetError(f"a tile's {what} must be uint8 [{expected}], found {array.dtype} {list(array.shape)}")
    if valid.dtype != np.bool_ or valid.shape != h_w:
        raise DatasetError(
            f"a tile's valid mask must be bool {list(h_w)} like its {what}, found {valid.dtype} {list(valid.shape)}"
        )
