"""What is decided once per scene: its kind, geometry, waters, roads, light and camera. All keyed, none of it pixels.

The split is part of the key, so scenes of different splits (and of teacher corpora) never share a draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np

from rsmtdf.data.synthetic.materials import ALBEDO, DRIES, INDEX, ROOFS
from rsmtdf.data.synthetic.noise import SIGMAS, Glimpse, normals
from rsmtdf.errors import DatasetError
from rsmtdf.keyed import Draws

WORLD_VERSION = 1
"""Changes whenever the same arguments would give another world."""

Split = Literal["train", "val", "test", "predict", "teacher"]
Domain = Literal["Urban", "Rural"]

_UNIT_PX = 128
"""The ground length that counts of roads and rivers refer to."""

# Chances of a parcel's land use, per kind of scene.
LAND_USES = ("meadow", "settlement", "barren", "forest", "fields", "pond", "paved")
_LAND_USE = {
    "farmland": (0.12, 0.10, 0.12, 0.18, 0.42, 0.05, 0.01),
    "town": (0.13, 0.57, 0.11, 0.08, 0.04, 0.01, 0.06),
    "wild": (0.18, 0.06, 0.25, 0.37, 0.12, 0.02, 0.00),
}
_WATER_TINTS = ((0.17, 0.28, 0.36), (0.25, 0.35, 0.27), (0.42, 0.40, 0.32))


@dataclass(frozen=True, slots=True)
class Curve:
    """A nearly straight band through the scene: at `offset` px from the origin along its normal, gently bent."""

    angle: float
    offset: float
    half_width: float
    bend_px: float
    bend_rate: float
    phase: float

    def frame(self, xx: np.ndarray, yy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(distance from the centre line, position along it), both in pixels, float32."""
        c, s = np.float32(math.cos(self.angle)), np.float32(math.sin(self.angle))
        across, along = c * xx + s * yy, c * yy - s * xx
        bend = np.float32(self.bend_px) * np.sin(along * np.float32(self.bend_rate) + np.float32(self.phase))
        return np.abs(across - np.float32(self.offset) - bend), along

    def is_near(self, y: float, x: float, radius: float) -> bool:
        """Whether it may come within `radius` px of the point (y, x)."""
        across = math.cos(self.angle) * x + math.sin(self.angle) * y - self.offset
        return abs(across) <= radius + self.half_width + abs(self.bend_px)


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """Light and camera of one acquisition."""

    hue: float
    saturation: float
    gain: tuple[float, float, float]
    gamma: float
    haze: float
    vignette: float
    blur_px: float
    noise: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenePlan:
    """One scene before any pixel: lengths in pixels, angles in radians."""

    domain: Domain
    side_px: int
    salt: int
    scale: float
    angle: float
    parcel_px: float
    land_use: tuple[float, ...]
    street_px: float
    street_period: int
    built_share: float
    roofs: tuple[float, ...]
    """Cumulative shares of the roof materials."""
    houses: np.ndarray
    """Uniform float32 [5, 512]: a house looks its numbers up by hash."""
    rivers: tuple[Curve, ...]
    lake_level: float
    """Height of the smooth field above which there is a lake; inf for none."""
    roads: tuple[Curve, ...]
    are_roads_dirt: bool
    albedo: np.ndarray
    """float32 [materials, 3] of this season and water."""
    tree_level: float
    sun: float
    shadow_px: float
    style: Style
    glimpses: dict[str, Glimpse]


def plan_scene(*, split: Split, seed: int, index: int, side_px: int) -> ScenePlan:
    """The plan of scene `index` of a split. Every third scene is a town (LoveDA's Urban), the others are Rural.

    Raises:
        DatasetError: an unknown split, a negative number, or a scene under 16 px.
    """
    if split not in get_args(Split):
        raise DatasetError(f"the synthetic world has no split {split!r}; it has {', '.join(get_args(Split))}")
    if index < 0 or side_px < 16:
        raise DatasetError(f"scene {index} of {side_px} px cannot be made: index >= 0 and side >= 16 px are needed")
    draws = Draws("world", WORLD_VERSION, split, seed, index)
    domain: Domain = "Urban" if index % 3 == 1 else "Rural"
    kind = "town" if domain == "Urban" else ("farmland" if draws.chance(0.66) else "wild")
    scale = draws.uniform(1.05, 1.5)
    angle = draws.uniform(0, math.pi)
    units = max(1, round(side_px / _UNIT_PX))
    rivers = tuple(_river(draws, side_px, scale) for _ in range(units) if draws.chance(0.26))
    # A lake covers the less of a scene the larger the scene, and is the more likely: the mean share stays.
    share = max(0.04, draws.uniform(0.12, 0.35) * min(1.0, _UNIT_PX / side_px))
    has_lake = draws.chance(min(1.0, 0.2 * units)) and not rivers
    roads = tuple(
        _road(draws, side_px, scale, angle) for _ in range(units) for _ in range(_pick(draws, (0.2, 0.45, 0.25, 0.1)))
    )
    return ScenePlan(
        domain=domain,
        side_px=side_px,
        salt=draws.word(),
        scale=scale,
        angle=angle,
        parcel_px=draws.uniform(32.0, 46.0) * scale**0.5,
        land_use=_LAND_USE[kind],
        street_px=draws.uniform(3.5, 5.5) * scale,
        street_period=draws.integer(2, 3),
        built_share=draws.uniform(0.65, 0.95),
        roofs=_roof_mix(draws),
        houses=draws.units(5 * 512).astype(np.float32).reshape(5, 512),
        rivers=rivers,
        lake_level=NormalDist().inv_cdf(1 - share) if has_lake else math.inf,
        roads=roads,
        are_roads_dirt=draws.chance(0.35),
        albedo=_albedo(draws),
        tree_level=draws.uniform(1.6, 2.4),
        sun=draws.uniform(0, 2 * math.pi),
        shadow_px=draws.uniform(4, 10) * scale,
        style=_style(draws),
        glimpses={name: Glimpse.draw(draws) for name in _GLIMPSES},
    )


_GLIMPSES = (
    *(f"texture{sigma}" for sigma in SIGMAS),
    *("warp_x", "warp_y", "shore", "lake", "vignette", "red", "green", "blue"),
)


def _pick(draws: Draws, chances: tuple[float, ...]) -> int:
    """An index drawn with these chances (they add up to 1)."""
    return min(int(np.searchsorted(np.cumsum(chances), draws.unit(), side="right")), len(chances) - 1)


def _normal(draws: Draws, sd: float) -> float:
    return sd * float(normals(draws, 1)[0])


def _offset(draws: Draws, angle: float, side_px: int) -> float:
    """A line of this angle through the middle part of the scene."""
    middle = (math.cos(angle) + math.sin(angle)) * side_px / 2
    return middle + draws.uniform(-0.45, 0.45) * side_px


def _river(draws: Draws, side_px: int, scale: float) -> Curve:
    angle = draws.uniform(0, math.pi)
    return Curve(
        angle=angle,
        offset=_offset(draws, angle, side_px),
        half_width=draws.uniform(5, 15) * scale,
        bend_px=draws.uniform(3, 14),
        bend_rate=draws.uniform(0.02, 0.06),
        phase=draws.uniform(0, 6),
    )


def _road(draws: Draws, side_px: int, scale: float, world_angle: float) -> Curve:
    """A road along or across the parcels' main direction."""
    angle = world_angle + (math.pi / 2 if draws.chance(0.5) else 0.0) + _normal(draws, 0.15)
    return Curve(
        angle=angle,
        offset=_offset(draws, angle, side_px),
        half_width=draws.uniform(2.2, 4.6) * scale,
        bend_px=draws.uniform(0, 9),
        bend_rate=draws.uniform(0.015, 0.04),
        phase=draws.uniform(0, 6),
    )


def _roof_mix(draws: Draws) -> tuple[float, ...]:
    """Cumulative shares of the roofs: normalised exponentials, so one colour often rules a town."""
    shares = -np.log1p(-draws.units(len(ROOFS)))
    return tuple(float(v) for v in np.cumsum(shares / shares.sum()))


def _albedo(draws: Draws) -> np.ndarray:
    """The materials' colours of this scene: a little off, dried by the season, water of one of three tints."""
    rgb: np.ndarray = ALBEDO + 0.018 * normals(draws, ALBEDO.size).reshape(ALBEDO.shape)
    season = draws.unit() ** 1.5
    rgb = rgb + season * DRIES[:, None] * np.array([0.17, -0.02, 0.01])
    tint = np.array(_WATER_TINTS[draws.integer(0, len(_WATER_TINTS) - 1)])
    rgb[INDEX["water"]] = tint
    rgb[INDEX["pond"]] = 0.8 * tint + 0.3 * ALBEDO[INDEX["pond"]]
    albedo: np.ndarray = rgb.astype(np.float32)
    return albedo


def _style(draws: Draws) -> Style:
    exposure = draws.uniform(0.85, 1.15)
    return Style(
        hue=_normal(draws, 0.14),
        saturation=draws.uniform(0.65, 1.2),
        gain=(
            exposure * draws.uniform(0.91, 1.09),
            exposure * draws.uniform(0.91, 1.09),
            exposure * draws.uniform(0.91, 1.09),
        ),
        gamma=draws.uniform(0.87, 1.15),
        haze=draws.uniform(0, 0.18) * draws.unit(),
        vignette=0.05 * draws.unit(),
        blur_px=draws.uniform(0.2, 0.7),
        noise=draws.uniform(0.004, 0.018),
    )
