"""What the synthetic world is made of: surface materials, finer than the seven classes a student must tell apart.

Classes, their order and their colours are LoveDA's. That several materials share a class (a pond and a river, a
meadow and a paved yard) and that materials of different classes look alike (bare field and barren soil, paved yard
and road) is what makes the task non-trivial.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CLASSES = ("background", "building", "road", "water", "barren", "forest", "agriculture")
PALETTE = (
    (255, 255, 255),
    (255, 0, 0),
    (255, 255, 0),
    (0, 0, 255),
    (159, 129, 183),
    (0, 255, 0),
    (255, 195, 128),
)


class Material(NamedTuple):
    """One surface: class index, mean albedo (RGB, 0..1), how strongly a dry season yellows it, height (0..1)."""

    label: int
    rgb: tuple[float, float, float]
    dries: float = 0.0
    height: float = 0.0


MATERIALS: dict[str, Material] = {
    "meadow": Material(0, (0.42, 0.50, 0.27), dries=1.0),
    "lawn": Material(0, (0.38, 0.47, 0.27), dries=0.6),
    "paved": Material(0, (0.55, 0.54, 0.52)),
    "roof_red": Material(1, (0.62, 0.30, 0.24)),
    "roof_grey": Material(1, (0.50, 0.50, 0.51)),
    "roof_white": Material(1, (0.80, 0.79, 0.77)),
    "roof_blue": Material(1, (0.32, 0.45, 0.65)),
    "roof_brown": Material(1, (0.46, 0.37, 0.30)),
    "asphalt": Material(2, (0.46, 0.46, 0.47)),
    "dirt": Material(2, (0.60, 0.52, 0.40)),
    "water": Material(3, (0.20, 0.30, 0.34)),
    "pond": Material(3, (0.27, 0.36, 0.35)),
    "soil": Material(4, (0.56, 0.45, 0.33)),
    "sand": Material(4, (0.66, 0.58, 0.44)),
    "deciduous": Material(5, (0.24, 0.36, 0.18), dries=0.8, height=0.45),
    "conifer": Material(5, (0.16, 0.28, 0.18), dries=0.15, height=0.5),
    "crop_green": Material(6, (0.40, 0.52, 0.25)),
    "crop_yellow": Material(6, (0.64, 0.58, 0.30)),
    "crop_soil": Material(6, (0.54, 0.44, 0.33)),
    "crop_dark": Material(6, (0.27, 0.38, 0.20), dries=0.6),
}
INDEX: dict[str, int] = {name: i for i, name in enumerate(MATERIALS)}
ROOFS = tuple(i for name, i in INDEX.items() if name.startswith("roof_"))

LABELS = np.array([m.label for m in MATERIALS.values()], np.uint8)
ALBEDO = np.array([m.rgb for m in MATERIALS.values()], np.float32)
DRIES = np.array([m.dries for m in MATERIALS.values()], np.float32)
HEIGHTS = np.array([m.height for m in MATERIALS.values()], np.float32)


def is_any(material: np.ndarray, *names: str) -> np.ndarray:
    """Where (bool, the shape of `material`) the surface is one of the named materials."""
    table = np.zeros(len(MATERIALS), bool)
    table[[INDEX[name] for name in names]] = True
    where: np.ndarray = table[material]
    return where
