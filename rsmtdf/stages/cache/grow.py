"""Which views a store shall hold: segments for what is missing, and the maker that turns rows into pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rsmtdf.errors import DatasetError
from rsmtdf.specs import Stream, Tile, TileReader, ViewRecipe
from rsmtdf.store.queries import coverage, next_generation
from rsmtdf.store.segments import NewSegment
from rsmtdf.store.store import FeatureStore
from rsmtdf.views.maker import ViewMaker
from rsmtdf.views.matching import match_pool
from rsmtdf.views.params import PARAM_DTYPE, draw_table


def grow_store(
    store: FeatureStore,
    *,
    pool: Sequence[str],
    labelled: Sequence[str],
    strong_seeds: int,
    weak_views: int,
    plain: bool,
) -> int:
    """Adds the views that `store` lacks (not their features) and returns how many.

    Strong: `strong_seeds` of every tile of the pool; tiles new to a seed form a new generation, matched within
    itself. Weak: `weak_views` of every labelled tile. Nothing that exists is touched.
    """
    recipe, tile_px = store.recipe, store.dataset.tile_px
    new: list[NewSegment] = []
    have = coverage(store, "strong")
    for seed in range(strong_seeds):
        if missing := sorted(t for t in pool if seed not in have.get(t, ())):
            new.append(_strong_segment(store, recipe, missing, seed=seed, tile_px=tile_px))
    wanted: list[tuple[Stream, Sequence[str], int]] = [("weak", labelled, weak_views)]
    if plain:
        wanted.append(("plain", sorted({*pool, *labelled}), 1))
    for stream, tiles, views in wanted:
        have = coverage(store, stream)
        counts = {t: len(have.get(t, ())) for t in tiles}
        for have_views in sorted(set(counts.values())):
            if have_views < views:
                group = sorted(t for t in tiles if counts[t] == have_views)
                seeds = range(have_views, views)
                new.append(_plain_segment(store, recipe, group, stream=stream, seeds=seeds, tile_px=tile_px))
    if new:
        store.extend(new)
    return sum(len(segment.partner) for segment in new)


def view_maker(store: FeatureStore, *, reader: TileReader, tiles: Mapping[str, Tile]) -> ViewMaker:
    """The maker of `store`'s views; `tiles` holds (at least) every tile of the store by id.

    Raises:
        DatasetError: the store has views of tiles that are not on disk.
    """
    ids = list(store.tile_ids)
    if gone := [t for t in ids if t not in tiles]:
        raise DatasetError(
            f"{store.path} holds views of {len(gone)} tiles that are not in the data set "
            f"(first: {', '.join(gone[:3])}); give the folder the store was made from with --root"
        )
    return ViewMaker(
        reader=reader,
        tiles=[tiles[t] for t in ids],
        tile_index=store.column("tile"),
        partner=store.column("partner"),
        params=stored_params(store),
        recipe=store.recipe,
    )


def stored_params(store: FeatureStore) -> np.ndarray:
    """The resolved parameters of every row, as one structured array of `PARAM_DTYPE`."""
    params = np.zeros(store.n_rows, dtype=PARAM_DTYPE)
    for name in PARAM_DTYPE.names or ():
        params[name] = store.column(name)
    return params


def _strong_segment(
    store: FeatureStore, recipe: ViewRecipe, tiles: Sequence[str], *, seed: int, tile_px: int
) -> NewSegment:
    generation = next_generation(store, "strong", seed)
    order, partner = match_pool(recipe, tile_ids=tiles, stream="strong", seed=seed, generation=generation)
    ordered = [tiles[i] for i in order]
    table = draw_table(recipe, tile_ids=ordered, tile_px=tile_px, stream="strong", seed=seed)
    return NewSegment(
        stream="strong",
        seed_start=seed,
        seeds=1,
        generation=generation,
        tile_ids=tuple(ordered),
        columns={name: table[name] for name in PARAM_DTYPE.names or ()},
        partner=partner,
    )


def _plain_segment(
    store: FeatureStore, recipe: ViewRecipe, tiles: Sequence[str], *, stream: Stream, seeds: range, tile_px: int
) -> NewSegment:
    """Views without partners, seed after seed."""
    tables = [draw_table(recipe, tile_ids=tiles, tile_px=tile_px, stream=stream, seed=s) for s in seeds]
    table = np.concatenate(tables)
    return NewSegment(
        stream=stream,
        seed_start=seeds.start,
        seeds=len(seeds),
        generation=next_generation(store, stream, seeds.start),
        tile_ids=tuple(tiles),
        columns={name: table[name] for name in PARAM_DTYPE.names or ()},
        partner=np.arange(len(table), dtype=np.int64),
    )
