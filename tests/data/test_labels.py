"""Counting what the labelled tiles show."""

from __future__ import annotations

import numpy as np

from rsmtdf.data.labels import label_counts
from rsmtdf.specs import Tile


class Masks:
    """A reader whose tile "x/0_<n>" is row n of `table`."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    def read_image(self, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("counting labels reads no image")

    def read_label(self, tile: Tile) -> np.ndarray:
        return self.table[int(tile.id.rsplit("_", 1)[1])].reshape(2, 2)


def test_pixels_and_tiles_per_class() -> None:
    table = np.array([[0, 0, 1, 255], [0, 255, 255, 255], [255, 255, 255, 255]], np.uint8)
    tiles = [Tile(f"x/0_{i}", "x.png", "x.png", 0, 0, 2, 2) for i in range(3)]
    counts = label_counts(Masks(table), tiles, classes=3)
    assert counts.pixels.tolist() == [3, 1, 0]
    assert counts.tiles.tolist() == [2, 1, 0]
    assert label_counts(Masks(table), [], classes=3).pixels.tolist() == [0, 0, 0]
