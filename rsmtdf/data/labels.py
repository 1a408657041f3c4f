"""How much of each class the labelled tiles show: counted from their masks before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rsmtdf.specs import Tile, TileReader


@dataclass(frozen=True)
class LabelCounts:
    """Labelled pixels, and tiles that show a class at all, both int64 [classes]."""

    pixels: np.ndarray
    tiles: np.ndarray


def label_counts(reader: TileReader, tiles: Sequence[Tile], *, classes: int, workers: int = 2) -> LabelCounts:
    """What the masks of `tiles` hold.

    Raises:
        DatasetError: a mask cannot be read, or holds a value outside the classes.
    """

    def count(tile: Tile) -> np.ndarray:
        return np.bincount(reader.read_label(tile).ravel(), minlength=256)[:classes]

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        table = np.array(list(pool.map(count, tiles)), dtype=np.int64).reshape(-1, classes)
    return LabelCounts(pixels=table.sum(axis=0), tiles=(table > 0).sum(axis=0))
