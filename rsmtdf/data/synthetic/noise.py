"""Noise of the synthetic world: keyed normal numbers, smooth periodic fields, and hashes of integer cells.

Everything is a function of absolute pixel coordinates, so a scene can be rendered block by block and the blocks fit.
Smooth fields come from one bank of periodic fields per process (smoothing on a torus is a product in Fourier space);
a scene looks at them through its own shift, flips and sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rsmtdf.keyed import Draws

BANK_PX = 512
SIGMAS = (0.0, 0.6, 1.2, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Smoothing in pixels; 0 is white noise."""
FIELDS_PER_SIGMA = 3


def normals(draws: Draws, n: int) -> np.ndarray:
    """n standard normal numbers, float64 (Box-Muller on keyed uniforms)."""
    half = (n + 1) // 2
    radius = np.sqrt(-2.0 * np.log1p(-draws.units(half)))
    angle = 2.0 * np.pi * draws.units(half)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]


@dataclass(frozen=True, slots=True)
class Glimpse:
    """How a scene looks at one field of the bank."""

    field: int
    dy: int
    dx: int
    flip_y: bool
    flip_x: bool
    transpose: bool
    sign: float

    @classmethod
    def draw(cls, draws: Draws) -> Glimpse:
        return cls(
            field=draws.integer(0, FIELDS_PER_SIGMA - 1),
            dy=draws.integer(0, BANK_PX - 1),
            dx=draws.integer(0, BANK_PX - 1),
            flip_y=draws.chance(0.5),
            flip_x=draws.chance(0.5),
            transpose=draws.chance(0.5),
            sign=1.0 if draws.chance(0.5) else -1.0,
        )


class Bank:
    """Periodic fields [BANK_PX, BANK_PX] float32 of zero mean and unit variance, `FIELDS_PER_SIGMA` per sigma."""

    def __init__(self, *, version: int) -> None:
        fy = np.fft.fftfreq(BANK_PX)[:, None]
        fx = np.fft.rfftfreq(BANK_PX)[None, :]
        square = fy * fy + fx * fx
        self._fields: dict[float, np.ndarray] = {}
        for sigma in SIGMAS:
            white = normals(Draws("world-bank", version, str(sigma)), FIELDS_PER_SIGMA * BANK_PX * BANK_PX)
            field = white.reshape(FIELDS_PER_SIGMA, BANK_PX, BANK_PX)
            if sigma > 0:
                smooth = np.exp(-2.0 * (np.pi * sigma) ** 2 * square)
                field = np.fft.irfft2(np.fft.rfft2(field) * smooth, s=(BANK_PX, BANK_PX))
            field = field - field.mean(axis=(1, 2), keepdims=True)
            self._fields[sigma] = (field / field.std(axis=(1, 2), keepdims=True)).astype(np.float32)

    def look(self, sigma: float, glimpse: Glimpse, y0: int, x0: int, height: int, width: int) -> np.ndarray:
        """The field as float32 [height, width] at absolute pixels y0.., x0.. (any integers: it is periodic)."""
        field = self._fields[sigma][glimpse.field]
        if glimpse.transpose:
            field = field.T
        rows = _wrapped(y0, height, glimpse.dy, glimpse.flip_y)
        columns = _wrapped(x0, width, glimpse.dx, glimpse.flip_x)
        seen: np.ndarray = field.take(rows, axis=0).take(columns, axis=1) * np.float32(glimpse.sign)
        return seen


def hash_units(salt: int, channel: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), float32, one per integer cell (i, j): splitmix64's finaliser, twice."""
    word = _mix(i.astype(np.int64).view(np.uint64) + np.uint64((salt + channel * 0x9E3779B97F4A7C15) & _MASK))
    word = _mix(word ^ j.astype(np.int64).view(np.uint64))
    return (word >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


_MASK = 0xFFFFFFFFFFFFFFFF


def _mix(word: np.ndarray) -> np.ndarray:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = word ^ (word >> np.uint64(31))
    return mixed


def _wrapped(start: int, length: int, shift: int, flip: bool) -> np.ndarray:
    index = np.arange(start, start + length)
    return np.mod((-1 - index if flip else index) + shift, BANK_PX)
