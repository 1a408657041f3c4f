"""Views and what is stored of them: the arrays that stage 1 keeps, and the views that stage 2 makes of these again.

Kept are the finished pixels, the geometry alone, and the valid mask before any paste. That of the finished view is
pasted here as it was when the view was made; the recorded crc32c of pixels and mask says whether it came out the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from rsmtdf.views.maker import ViewMaker
from rsmtdf.views.view import View

Arrays = Mapping[str, np.ndarray]


class KeptViews(Protocol):
    """Where stored views are read from, by any number of threads."""

    def has(self, rows: Sequence[int]) -> bool:
        """Whether all of these are there."""
        ...

    def read(self, rows: Sequence[int]) -> Sequence[Arrays]:
        """Of each `pixels` uint8 [c, c, 3], `valid` bool [c, c] before any paste, and of a strong one `weak`."""
        ...


def kept_of(weak: View, finished: View) -> dict[str, np.ndarray]:
    """What is stored of a view: `pixels`, `weak` uint8 [c, c, 3], and `valid` with one bit per pixel."""
    return {"pixels": finished.pixels, "weak": weak.pixels, "valid": np.packbits(weak.valid, axis=1)}


def views_of(rows: Sequence[int], kept: Sequence[Arrays], maker: ViewMaker) -> list[tuple[View, View]]:
    """(geometry alone, finished view) of each row; CutMix partners are all among `rows`."""
    by_row = dict(zip(rows, kept, strict=True))
    out = []
    for row, arrays in by_row.items():
        valid = arrays["valid"]
        y, x, h, w = maker.box(row)
        mixed = valid.copy()
        if h:
            box = slice(y, y + h), slice(x, x + w)
            mixed[box] = by_row[maker.partner(row)]["valid"][box]
        out.append((View(arrays.get("weak", arrays["pixels"]), valid), View(arrays["pixels"], mixed)))
    return out
