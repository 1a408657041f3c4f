"""The views that a calibration makes: real tiles of the pool, drawn by key, in the proportion of the streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rsmtdf.keyed import Draws
from rsmtdf.specs import Tile, TileReader, ViewRecipe
from rsmtdf.views.maker import ViewMaker
from rsmtdf.views.matching import match_pool
from rsmtdf.views.params import draw_table

SAMPLE_VIEWS = 32


@dataclass(frozen=True)
class Sample:
    """Some views, and how to make them."""

    maker: ViewMaker
    units: Sequence[tuple[int, ...]]
    """Rows that are made together: CutMix pairs, and single views."""
    tiles: Sequence[Tile]

    @property
    def views(self) -> int:
        return sum(map(len, self.units))


def draw_sample(
    *,
    reader: TileReader,
    tiles: Mapping[str, Tile],
    pool: Sequence[str],
    labelled: Sequence[str],
    recipe: ViewRecipe,
    tile_px: int,
    weak_share: float,
    views: int = SAMPLE_VIEWS,
) -> Sample:
    """At most `views` views, each of another tile and, where there are enough, of another image.

    Args:
        reader: reads tiles; it should have none of them at hand.
        tiles: by id; those of `pool` and `labelled` at least.
        pool: what strong views are of.
        labelled: what weak views are of.
        recipe: of the views.
        tile_px: of the data set.
        weak_share: of the views, how many are weak ones.
    """
    weak = _spread(labelled, tiles, min(round(views * weak_share), len(labelled)))
    strong = _spread([t for t in pool if t not in set(weak)], tiles, views - len(weak))
    order, partner = match_pool(recipe, tile_ids=strong, stream="strong", seed=0, generation=0)
    ordered = [strong[i] for i in order]
    params = np.concatenate(
        [
            draw_table(recipe, tile_ids=ordered, tile_px=tile_px, stream="strong", seed=0),
            draw_table(recipe, tile_ids=weak, tile_px=tile_px, stream="weak", seed=0),
        ]
    )
    ids = [*ordered, *weak]
    partner = np.concatenate([partner, np.arange(len(ordered), len(ids))]).astype(np.int64)
    maker = ViewMaker(
        reader=reader,
        tiles=[tiles[t] for t in ids],
        tile_index=np.arange(len(ids)),
        partner=partner,
        params=params,
        recipe=recipe,
    )
    units = sorted({tuple(sorted({row, int(partner[row])})) for row in range(len(ids))})
    return Sample(maker, units, [tiles[t] for t in ids])


def _spread(ids: Sequence[str], tiles: Mapping[str, Tile], n: int) -> list[str]:
    """`n` of `ids` by key, those of images not taken yet first."""
    drawn = [ids[i] for i in Draws("calibration", len(ids)).permutation(len(ids))]
    taken: dict[str, int] = {}
    turn = {}
    for tile in drawn:
        turn[tile] = taken[tiles[tile].image] = taken.get(tiles[tile].image, 0) + 1
    return sorted(drawn, key=lambda tile: turn[tile])[:n]
