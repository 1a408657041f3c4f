"""Views of store rows: the one place where stage 1 and stage 2 turn (row, stored parameters) into pixels."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from rsmtdf.errors import DatasetError
from rsmtdf.specs import Tile, TileReader, ViewRecipe
from rsmtdf.views.view import View, label_of_view, paste, render, render_both, render_label

T = TypeVar("T")


class UnreadableTile(DatasetError):
    """A tile whose pixels cannot be had; `tile` is its id. It may be the CutMix partner of the view asked for."""

    def __init__(self, reason: str, *, tile: str) -> None:
        super().__init__(reason)
        self.tile = tile

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), tile=self.tile), self.args  # or no other process could make it again


class ViewMaker:
    """Makes the views that rows of a store stand for, from the tiles and the *stored* parameters (replay).

    Thread-safe as far as `reader` is: it holds no mutable state of its own.

    Args:
        reader: reads tiles.
        tiles: the tiles, in the order that `tile_index` counts.
        tile_index: int [rows], each row's tile.
        partner: int64 [rows], the row a view's CutMix box comes from; the row itself where there is none.
        params: structured [rows], `PARAM_DTYPE`.
        recipe: the store's.
    """

    def __init__(
        self,
        *,
        reader: TileReader,
        tiles: Sequence[Tile],
        tile_index: np.ndarray,
        partner: np.ndarray,
        params: np.ndarray,
        recipe: ViewRecipe,
    ) -> None:
        self._reader, self._tiles, self._recipe = reader, tiles, recipe
        self._tile_index, self._partner, self._params = tile_index, partner, params

    @property
    def reader(self) -> TileReader:
        return self._reader

    def reading_through(self, reader: TileReader) -> ViewMaker:
        """The same maker with another reader of the same tiles, such as one that takes the time."""
        other = copy.copy(self)
        other._reader = reader
        return other

    def tile(self, row: int) -> Tile:
        return self._tiles[int(self._tile_index[row])]

    def partner(self, row: int) -> int:
        return int(self._partner[row])

    def box(self, row: int) -> tuple[int, int, int, int]:
        """The CutMix box (y, x, h, w) of `row` in pixels; h = 0 where nothing is pasted."""
        p = self._params[row]
        if self.partner(row) == row:
            return 0, 0, 0, 0
        return int(p["cut_y"]), int(p["cut_x"]), int(p["cut_h"]), int(p["cut_w"])

    def sources(self, row: int) -> tuple[Tile, ...]:
        """The tiles that the pixels of `row` come from: its own, and its partner's where something is pasted."""
        return (self.tile(row), self.tile(self.partner(row))) if self.box(row)[2] else (self.tile(row),)

    def unmixed(self, row: int) -> View:
        """The view of `row` before any paste."""
        image, valid = self._reader.read_image(self.tile(row))
        return render(image, valid, self._params[row], recipe=self._recipe)

    def mixed(self, rows: Sequence[int]) -> list[View]:
        """The finished views of `rows`, each tile rendered once where partners are both among them.

        Raises:
            UnreadableTile: of the first view that cannot be made.
        """
        return _all_made(self.attempted(rows))

    def attempted(self, rows: Sequence[int]) -> list[View | UnreadableTile]:
        """As `mixed`, with the error of the tile that stands in the way in place of each view that cannot be made."""
        return [v if isinstance(v, UnreadableTile) else v[-1] for v in self._finished(rows, self._unmixed_or_error)]

    def why_unreadable(self, tile: Tile) -> str | None:
        """Why the pixels of `tile` cannot be had at this moment; None where they can."""
        try:
            self._reader.read_image(tile)
        except DatasetError as error:
            return str(error)
        return None

    def _unmixed_or_error(self, row: int) -> tuple[View, ...] | UnreadableTile:
        try:
            return (self.unmixed(row),)
        except DatasetError as error:
            return UnreadableTile(str(error), tile=self.tile(row).id)

    def weak_and_mixed(self, rows: Sequence[int]) -> list[tuple[View, View]]:
        """(geometry alone, finished view) of each row, each tile rendered once where partners are both among them.

        Raises:
            UnreadableTile: of the first view that cannot be made.
        """
        return _all_made(self.weak_and_attempted(rows))

    def weak_and_attempted(self, rows: Sequence[int]) -> list[tuple[View, View] | UnreadableTile]:
        """As `weak_and_mixed`, with the error of the tile that stands in the way in place of what cannot be made."""
        made = self._finished(rows, self._both_or_error)
        return [v if isinstance(v, UnreadableTile) else (v[0], v[1]) for v in made]

    def _finished(
        self, rows: Sequence[int], make: Callable[[int], tuple[View, ...] | UnreadableTile]
    ) -> list[tuple[View, ...] | UnreadableTile]:
        """What `make` makes of each row, once, with the partner's box pasted into the last of its views."""
        made: dict[int, tuple[View, ...] | UnreadableTile] = {}

        def base(row: int) -> tuple[View, ...] | UnreadableTile:
            if row not in made:
                made[row] = make(row)
            return made[row]

        out: list[tuple[View, ...] | UnreadableTile] = []
        for row in rows:
            views = base(row)
            if not isinstance(views, UnreadableTile) and self.box(row)[2]:
                other = base(self.partner(row))
                if isinstance(other, UnreadableTile):
                    views = other
                else:
                    views = *views[:-1], paste(views[-1], other[-1], self._params[row])
            out.append(views)
        return out

    def _both_or_error(self, row: int) -> tuple[View, ...] | UnreadableTile:
        try:
            image, valid = self._reader.read_image(self.tile(row))
        except DatasetError as error:
            return UnreadableTile(str(error), tile=self.tile(row).id)
        return render_both(image, valid, self._params[row], recipe=self._recipe)

    def label(self, row: int) -> np.ndarray:
        """Class indices uint8 [crop, crop] in the geometry of `row`; 255 where ignored or not valid."""
        tile = self.tile(row)
        _, valid = self._reader.read_image(tile)
        return render_label(self._reader.read_label(tile), valid, self._params[row], recipe=self._recipe)

    def label_in(self, row: int, valid: np.ndarray) -> np.ndarray:
        """As `label`, for a view whose valid mask bool [crop, crop] is known: no image is read."""
        tile = self.tile(row)
        return label_of_view(self._reader.read_label(tile), valid, self._params[row], recipe=self._recipe)


def _all_made(views: Iterable[T | UnreadableTile]) -> list[T]:
    """`views`, or the first error among them raised."""
    out = []
    for view in views:
        if isinstance(view, UnreadableTile):
            raise view
        out.append(view)
    return out
