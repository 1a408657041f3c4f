"""The ground truth of a window of a scene: which material lies where, how high it stands, and the parcels' frames.

Parcels are the cells of a jittered grid in the scene's main direction; every parcel attribute is a hash of its cell,
so any window of a scene of any size is computed alone and agrees with its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from rsmtdf.data.synthetic.materials import HEIGHTS, INDEX, ROOFS
from rsmtdf.data.synthetic.noise import Bank, hash_units
from rsmtdf.data.synthetic.plan import LAND_USES, Curve, ScenePlan

_SETTLEMENT = LAND_USES.index("settlement")
# What grows or lies on a parcel of each land use; one is picked by the parcel's hash.
_SURFACES = (
    ("meadow",),
    ("lawn", "lawn", "paved"),
    ("soil", "sand"),
    ("deciduous", "conifer"),
    ("crop_green", "crop_yellow", "crop_soil", "crop_dark"),
    ("pond",),
    ("paved",),
)


Numbers = Callable[[int], np.ndarray]
"""Uniform float32 numbers of a channel, one per parcel."""


@dataclass(frozen=True, slots=True)
class Parcels:
    """Attributes of all parcels that a window meets: arrays over parcels, float32 unless said."""

    use: np.ndarray  # int64, index into LAND_USES
    material: np.ndarray  # uint8
    cos: np.ndarray
    sin: np.ndarray
    tint: np.ndarray  # [n, 3]
    furrow_rate: np.ndarray  # radians per px
    furrow_depth: np.ndarray
    house_u: np.ndarray
    house_v: np.ndarray
    salt: np.ndarray  # int64


@dataclass(frozen=True, slots=True)
class Land:
    """A window of ground truth; arrays are [h, w]."""

    material: np.ndarray  # uint8
    height: np.ndarray  # float32, 0..1
    parcels: Parcels
    parcel: np.ndarray  # int64, index into parcels
    u: np.ndarray  # float32, position across the parcel's furrows, px
    is_building: np.ndarray  # bool
    ridge_side: np.ndarray  # bool: which side of its roof's ridge a building pixel is on
    house: np.ndarray  # int64 0..511, which house numbers a settlement pixel looks up
    is_marking: np.ndarray  # bool, painted lane lines


def lay_land(plan: ScenePlan, bank: Bank, *, y0: int, x0: int, height: int, width: int) -> Land:
    """The ground truth of pixels y0..y0+height, x0..x0+width of a scene (also beyond its border)."""
    yy, xx = np.mgrid[y0 : y0 + height, x0 : x0 + width].astype(np.float32)

    def look(sigma: float, name: str) -> np.ndarray:
        return bank.look(sigma, plan.glimpses[name], y0, x0, height, width)

    warp_x = 3 * look(16.0, "warp_x") + np.float32(0.8) * look(4.0, "warp_x")
    warp_y = 3 * look(16.0, "warp_y") + np.float32(0.8) * look(4.0, "warp_y")
    parcel, parcels = _parcels(plan, xx + warp_x, yy + warp_y)
    cos, sin = parcels.cos[parcel], parcels.sin[parcel]
    u, v = cos * xx + sin * yy, cos * yy - sin * xx
    material = parcels.material[parcel]

    water = _waters(plan, xx, yy, shore=look(8.0, "shore"), lake=look(32.0, "lake"))
    material[water] = INDEX["water"]

    settled = (parcels.use[parcel] == _SETTLEMENT) & ~water
    street, building, ridge_side, house = _settlement(plan, parcels, parcel, u, v, settled)
    material[street] = INDEX["asphalt"]
    roof = np.array(ROOFS, np.uint8)[np.minimum(np.searchsorted(plan.roofs, plan.houses[3]), len(ROOFS) - 1)]
    material[building] = roof[house[building]]

    road, marking = _main_roads(plan, xx, yy)
    material[road] = INDEX["dirt" if plan.are_roads_dirt else "asphalt"]
    building &= ~road
    storeys = np.where(building, 0.25 + 0.75 * plan.houses[4][house], 0).astype(np.float32)
    return Land(
        material=material,
        height=HEIGHTS[material] + storeys,
        parcels=parcels,
        parcel=parcel,
        u=u,
        is_building=building,
        ridge_side=ridge_side,
        house=house,
        is_marking=marking,
    )


def _parcels(plan: ScenePlan, xx: np.ndarray, yy: np.ndarray) -> tuple[np.ndarray, Parcels]:
    """(parcel index of each pixel, the parcels): the nearest of the 3x3 cell centres around, in a maximum norm."""
    c, s = math.cos(plan.angle), math.sin(plan.angle)
    a = (np.float32(c / plan.parcel_px)) * xx + np.float32(s / plan.parcel_px) * yy
    b = (np.float32(c / plan.parcel_px)) * yy - np.float32(s / plan.parcel_px) * xx
    ia, ib = np.floor(a).astype(np.int64), np.floor(b).astype(np.int64)
    first_a, first_b = int(ia.min()) - 1, int(ib.min()) - 1
    rows, columns = int(ia.max()) + 2 - first_a, int(ib.max()) + 2 - first_b
    cells = np.mgrid[first_a : first_a + rows, first_b : first_b + columns].reshape(2, -1)

    def numbers(channel: int) -> np.ndarray:
        return hash_units(plan.salt, channel, cells[0], cells[1])

    centre_a = (cells[0] + 0.15 + 0.7 * numbers(0)).astype(np.float32)
    centre_b = (cells[1] + 0.15 + 0.7 * numbers(1)).astype(np.float32)
    stretch = 0.7 + 0.8 * numbers(2)
    home = (ia - first_a) * columns + (ib - first_b)
    best = np.full(xx.shape, np.inf, np.float32)
    parcel = home.copy()
    for step in (di * columns + dj for di in (-1, 0, 1) for dj in (-1, 0, 1)):
        cell = home + step
        distance = np.maximum(np.abs(a - centre_a[cell]), np.abs(b - centre_b[cell]) * stretch[cell])
        closer = distance < best
        np.copyto(best, distance, where=closer)
        np.copyto(parcel, cell, where=closer)
    return parcel, _attributes(plan, numbers)


def _attributes(plan: ScenePlan, numbers: Numbers) -> Parcels:
    """The attributes of the cells behind `numbers(channel)` (uniform, one per cell)."""
    shares = np.cumsum(plan.land_use) / np.sum(plan.land_use)
    use = np.minimum(np.searchsorted(shares, numbers(3), side="right"), len(LAND_USES) - 1)
    options = max(len(s) for s in _SURFACES)
    table = np.array([[INDEX[s[i * len(s) // options]] for i in range(options)] for s in _SURFACES], np.uint8)
    material = table[use, (numbers(4) * options).astype(np.int64)]
    turned = numbers(5) < 0.25
    angle = plan.angle + 0.12 * _bell(numbers, 6) + np.where(turned, math.pi * numbers(9), 0)
    brightness = 0.03 * _bell(numbers, 10)
    tint = np.stack([brightness + 0.025 * _bell(numbers, 13 + 3 * band) for band in range(3)], axis=-1)
    is_large = numbers(22) < 0.25
    return Parcels(
        use=use,
        material=material,
        cos=np.cos(angle).astype(np.float32),
        sin=np.sin(angle).astype(np.float32),
        tint=tint.astype(np.float32),
        furrow_rate=(2 * math.pi / ((3.2 + 3.8 * numbers(23)) * plan.scale)).astype(np.float32),
        furrow_depth=(0.02 + 0.055 * numbers(24)).astype(np.float32),
        house_u=((13 + 7 * numbers(25)) * plan.scale * np.where(is_large, 1.9, 1.0)).astype(np.float32),
        house_v=((11 + 7 * numbers(26)) * plan.scale * np.where(is_large, 1.6, 1.0)).astype(np.float32),
        salt=(numbers(27) * 512).astype(np.int64),
    )


def _bell(numbers: Numbers, channel: int) -> np.ndarray:
    """Roughly normal numbers of unit variance from three channels (the sum of three uniforms)."""
    return 2 * (numbers(channel) + numbers(channel + 1) + numbers(channel + 2) - 1.5)


def _waters(plan: ScenePlan, xx: np.ndarray, yy: np.ndarray, *, shore: np.ndarray, lake: np.ndarray) -> np.ndarray:
    """Where (bool) rivers and lakes lie; `shore` roughens their edges."""
    water = lake + np.float32(0.15) * shore > plan.lake_level
    for river in _passing(plan.rivers, xx, yy, margin=12):
        water |= river.frame(xx, yy)[0] - 2 * shore < np.float32(river.half_width)
    return water


def _settlement(
    plan: ScenePlan, parcels: Parcels, parcel: np.ndarray, u: np.ndarray, v: np.ndarray, settled: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(street, building, ridge side, house number): plots on the parcel's own grid, a street every few plots."""
    plot_u, plot_v = parcels.house_u[parcel], parcels.house_v[parcel]
    iu, iv = np.floor(u / plot_u).astype(np.int64), np.floor(v / plot_v).astype(np.int64)
    in_u, in_v = u - iu * plot_u, v - iv * plot_v
    beside_u, beside_v = iu % 3 == 0, iv % plan.street_period == 0
    street_px = np.float32(plan.street_px)
    street = settled & ((beside_u & (in_u < street_px)) | (beside_v & (in_v < street_px)))
    house = (iu * 7349 + iv * 9151 + parcels.salt[parcel] * 3571) & 511
    # A house beside a street keeps off it: its half sides shrink and its centre moves by the same length.
    setback_u = np.where(beside_u, street_px / 2 + np.float32(0.6), np.float32(0))
    setback_v = np.where(beside_v, street_px / 2 + np.float32(0.6), np.float32(0))
    numbers = plan.houses
    half_u = plot_u * (0.5 * (0.55 + np.float32(0.3) * numbers[1][house])) - setback_u
    half_v = plot_v * (0.5 * (0.55 + np.float32(0.32) * numbers[2][house])) - setback_v
    from_u, from_v = in_u - plot_u / 2 - setback_u, in_v - plot_v / 2 - setback_v
    is_built = (numbers[0] < plan.built_share)[house]
    building = settled & ~street & is_built & (np.abs(from_u) < half_u) & (np.abs(from_v) < half_v)
    return street, building, from_v > 0, house


def _main_roads(plan: ScenePlan, xx: np.ndarray, yy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where (bool) main roads and their dashed lines lie; dirt roads and narrow ones have no lines."""
    road, marking = np.zeros(xx.shape, bool), np.zeros(xx.shape, bool)
    for curve in _passing(plan.roads, xx, yy, margin=1):
        distance, along = curve.frame(xx, yy)
        road |= distance < np.float32(curve.half_width)
        if curve.half_width > 3.2 * plan.scale and not plan.are_roads_dirt:
            marking |= (distance < np.float32(0.55)) & (np.mod(along, 9) < 5)
    return road, marking


def _passing(curves: tuple[Curve, ...], xx: np.ndarray, yy: np.ndarray, *, margin: float) -> Iterator[Curve]:
    """The curves that may touch the window; a large scene has many, a window meets few."""
    y, x = float(yy[0, 0] + yy[-1, -1]) / 2, float(xx[0, 0] + xx[-1, -1]) / 2
    radius = math.hypot(*xx.shape) / 2 + margin
    return (curve for curve in curves if curve.is_near(y, x, radius))
