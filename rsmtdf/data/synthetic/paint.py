"""From ground truth to pixels: albedo, textures, cast shadows, then the light and the camera of the acquisition."""

from __future__ import annotations

import math

import numpy as np

from rsmtdf.data.synthetic.land import Land
from rsmtdf.data.synthetic.materials import INDEX, is_any
from rsmtdf.data.synthetic.noise import Bank
from rsmtdf.data.synthetic.plan import ScenePlan, Style

MARGIN_PX = 24
"""How far from a pixel its colour may depend on others: the longest shadow (15 px), the canopy shift and the blur."""

_SHADOW_STEPS = 6
_SHADOW_TINT = np.array([0.52, 0.55, 0.64], np.float32)
_HAZE = np.array([0.72, 0.76, 0.82], np.float32)


def paint(plan: ScenePlan, bank: Bank, land: Land, *, y0: int, x0: int) -> np.ndarray:
    """RGB uint8 [h, w, 3] of a window of land at (y0, x0); its outer `MARGIN_PX` lack neighbours and are off."""
    height, width = land.material.shape

    def look(sigma: float, name: str) -> np.ndarray:
        return bank.look(sigma, plan.glimpses[name], y0, x0, height, width)

    image = _albedo(plan, land)
    textures = {sigma: look(sigma, f"texture{sigma}") for sigma in (0.6, 1.2, 2.0, 8.0, 16.0)}
    canopy = textures[2.0] + 0.5 * textures[1.2]
    relief = _shifted(canopy, round(2 * math.sin(plan.sun)), round(2 * math.cos(plan.sun))) - canopy
    image += _texture(plan, land, textures, relief)[..., None]
    trees = is_any(land.material, "meadow", "lawn") & (textures[2.0] + 0.4 * textures[1.2] > plan.tree_level)
    image[trees] = plan.albedo[INDEX["deciduous"]] + np.float32(0.03) * relief[trees][:, None]
    image[_shadows(plan, land.height)] *= _SHADOW_TINT
    image = _light(image, plan.style, vignette=look(32.0, "vignette"))
    image = _blurred(image, plan.style.blur_px)
    grain = np.stack([look(0.0, band) for band in ("red", "green", "blue")], axis=-1)
    image += np.float32(plan.style.noise) * grain
    pixels: np.ndarray = (np.clip(image, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)
    return pixels


def _albedo(plan: ScenePlan, land: Land) -> np.ndarray:
    """The material's colour with the parcel's own tint (weaker on water, none on roofs), float32 [h, w, 3]."""
    share = np.ones(land.material.shape, np.float32)
    share[land.material == INDEX["water"]] = 0.2
    share[land.is_building] = 0
    image: np.ndarray = plan.albedo[land.material] + land.parcels.tint[land.parcel] * share[..., None]
    image[land.is_marking] += np.float32(0.22)
    return image


def _texture(plan: ScenePlan, land: Land, noise: dict[float, np.ndarray], relief: np.ndarray) -> np.ndarray:
    """What makes a surface recognisable beyond its colour, added to all bands: float32 [h, w]."""
    material, fine, parcels = land.material, noise[0.6], land.parcels
    shade = np.zeros(material.shape, np.float32)

    def add(where: np.ndarray, value: np.ndarray) -> None:
        np.add(shade, value, out=shade, where=where, casting="same_kind")

    crops = is_any(material, "crop_green", "crop_yellow", "crop_soil", "crop_dark")
    furrows = np.sin(land.u * parcels.furrow_rate[land.parcel]) * parcels.furrow_depth[land.parcel]
    add(crops, furrows + 0.012 * fine)
    add(is_any(material, "deciduous", "conifer"), 0.055 * relief + 0.02 * noise[1.2])
    add(is_any(material, "soil", "sand"), 0.035 * noise[2.0] + 0.03 * noise[8.0] + 0.018 * fine)
    add(is_any(material, "meadow", "lawn"), 0.016 * noise[1.2] + 0.025 * noise[8.0])
    add(is_any(material, "paved", "asphalt", "dirt"), 0.012 * fine)
    add(is_any(material, "water", "pond"), 0.004 * fine + 0.01 * noise[16.0])
    lit = 1.0 if math.sin(plan.sun - plan.angle) >= 0 else -1.0
    slopes = np.where(land.ridge_side, np.float32(0.07 * lit), np.float32(-0.05 * lit))
    add(land.is_building, slopes + 0.01 * fine + (0.1 * (plan.houses[4] - np.float32(0.5)))[land.house])
    return shade


def _shadows(plan: ScenePlan, height: np.ndarray) -> np.ndarray:
    """Where (bool) something higher stands towards the sun, near enough to shade the ground."""
    shaded = np.zeros(height.shape, bool)
    floor = height + np.float32(0.05)
    for step in range(1, _SHADOW_STEPS + 1):
        part = step / _SHADOW_STEPS
        dy, dx = round(-math.sin(plan.sun) * plan.shadow_px * part), round(-math.cos(plan.sun) * plan.shadow_px * part)
        shaded |= _shifted(height, dy, dx) > np.maximum(np.float32(0.95 * part), floor)
    return shaded


def _light(image: np.ndarray, style: Style, *, vignette: np.ndarray) -> np.ndarray:
    """The picture under its light: hue, saturation, gain, gamma, haze and uneven illumination."""
    grey = np.full((3, 3), 1 / 3)
    # A turn of the chroma plane by `hue`, scaled by `saturation`; grey stays grey.
    turn = math.sin(style.hue) / math.sqrt(3) * np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    matrix = grey + style.saturation * (math.cos(style.hue) * (np.eye(3) - grey) + turn)
    matrix = np.array(style.gain)[:, None] * matrix
    image = np.clip(image @ matrix.T.astype(np.float32), 0.005, 1.2) ** np.float32(style.gamma)
    image = image * np.float32(1 - style.haze) + np.float32(style.haze) * _HAZE
    lit: np.ndarray = image + np.float32(style.vignette) * vignette[..., None]
    return lit


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """A separable Gaussian of radius 2 (sigma is at most 0.7 px)."""
    weights = np.exp(-0.5 * (np.arange(3) / sigma) ** 2)
    weights = (weights / (weights[0] + 2 * weights[1:].sum())).astype(np.float32)
    for axis in (0, 1):
        edge = [(2, 2) if a == axis else (0, 0) for a in range(3)]
        wide = np.pad(image, edge, mode="edge")
        n = image.shape[axis]
        taps = [wide.take(range(k, k + n), axis=axis) for k in range(5)]
        image = weights[0] * taps[2] + weights[1] * (taps[1] + taps[3]) + weights[2] * (taps[0] + taps[4])
    return image


def _shifted(field: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """The field moved by (dy, dx); what enters is from the other side (inside `MARGIN_PX`, cut off later)."""
    return np.roll(field, (dy, dx), axis=(0, 1))
