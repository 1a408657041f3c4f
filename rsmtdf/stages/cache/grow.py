"""Which views a store shall hold: segments for what is missing, and the maker that turns rows into pixels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rsmtdf.errors import DatasetError, StoreMismatch
from rsmtdf.specs import STREAMS, Stream, Tile, TileReader
from rsmtdf.store.queries import coverage, next_generation
from rsmtdf.store.segments import NewSegment
from rsmtdf.store.store import FeatureStore
from rsmtdf.views.maker import ViewMaker
from rsmtdf.views.matching import match_pool
from rsmtdf.views.params import PARAM_DTYPE, RECIPE_VERSION, draw_table

Coverage = Mapping[Stream, Mapping[str, Collection[int]]]
"""Stream -> tile id -> the seeds of its views, computed or not."""


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Views that a store lacks: the same seeds of some tiles."""

    stream: Stream
    seeds: range
    tiles: tuple[str, ...]
    """Sorted by id."""

    @property
    def views(self) -> int:
        return len(self.seeds) * len(self.tiles)


def covered(store: FeatureStore | None) -> Coverage:
    """What `store` holds or shall hold; nothing where there is none yet."""
    return {} if store is None else {stream: coverage(store, stream) for stream in STREAMS}


def plan_growth(
    have: Coverage, *, pool: Sequence[str], labelled: Sequence[str], strong_seeds: int, weak_views: int, plain: bool
) -> list[Addition]:
    """What a store that covers `have` lacks.

    Strong: `strong_seeds` of every tile of the pool. Weak: `weak_views` of every labelled tile. Plain: one view of
    each tile of both.
    """
    new: list[Addition] = []
    strong = have.get("strong", {})
    for seed in range(strong_seeds):
        if missing := sorted(t for t in pool if seed not in strong.get(t, ())):
            new.append(Addition(stream="strong", seeds=range(seed, seed + 1), tiles=tuple(missing)))
    wanted: list[tuple[Stream, Sequence[str], int]] = [("weak", labelled, weak_views)]
    if plain:
        wanted.append(("plain", sorted({*pool, *labelled}), 1))
    for stream, tiles, views in wanted:
        lacking: dict[range, list[str]] = {}
        for tile in sorted(tiles):
            for seeds in _lowest_free(have.get(stream, {}).get(tile, ()), views):
                lacking.setdefault(seeds, []).append(tile)
        for seeds in sorted(lacking, key=lambda r: (r.start, r.stop)):
            new.append(Addition(stream=stream, seeds=seeds, tiles=tuple(lacking[seeds])))
    return new


def grow_store(
    store: FeatureStore,
    *,
    pool: Sequence[str],
    labelled: Sequence[str],
    strong_seeds: int,
    weak_views: int,
    plain: bool,
) -> int:
    """Adds the views that `store` lacks (not their features) and returns how many; see `plan_growth`.

    Tiles of the pool new to a seed form a new generation, matched within itself. Nothing that exists is touched.
    """
    additions = plan_growth(
        covered(store), pool=pool, labelled=labelled, strong_seeds=strong_seeds, weak_views=weak_views, plain=plain
    )
    if additions:
        store.extend([_new_segment(store, a) for a in additions])
    return sum(a.views for a in additions)


def view_maker(store: FeatureStore, *, reader: TileReader, tiles: Mapping[str, Tile]) -> ViewMaker:
    """The maker of `store`'s views; `tiles` holds (at least) every tile of the store by id.

    Raises:
        DatasetError: the store has views of tiles that are not on disk.
        StoreMismatch: its views are of a version of the recipe whose pixels this code does not make.
    """
    if store.recipe.version != RECIPE_VERSION:
        raise StoreMismatch(
            f"the views of feature store {store.path} are of version {store.recipe.version} of the recipe, and this "
            f"rsmtdf makes version {RECIPE_VERSION}; it was written by rsmtdf {store.versions.get('rsmtdf', '?')}: use "
            "that version, or make a new store"
        )
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


def _lowest_free(taken: Collection[int], wanted: int) -> list[range]:
    """Runs of the lowest seeds that make `taken` (which has gaps where seeds were removed) up to `wanted` seeds."""
    runs: list[range] = []
    lack, seed = wanted - len(taken), 0
    while lack > 0:
        if seed not in taken:
            if runs and runs[-1].stop == seed:
                runs[-1] = range(runs[-1].start, seed + 1)
            else:
                runs.append(range(seed, seed + 1))
            lack -= 1
        seed += 1
    return runs


def _new_segment(store: FeatureStore, addition: Addition) -> NewSegment:
    if addition.stream == "strong":
        return _strong_segment(store, addition)
    return _plain_segment(store, addition)


def _strong_segment(store: FeatureStore, addition: Addition) -> NewSegment:
    recipe, (seed,), tiles = store.recipe, addition.seeds, addition.tiles
    generation = next_generation(store, "strong", seed)
    order, partner = match_pool(recipe, tile_ids=tiles, stream="strong", seed=seed, generation=generation)
    ordered = [tiles[i] for i in order]
    table = draw_table(recipe, tile_ids=ordered, tile_px=store.dataset.tile_px, stream="strong", seed=seed)
    return NewSegment(
        stream="strong",
        seed_start=seed,
        seeds=1,
        generation=generation,
        tile_ids=tuple(ordered),
        columns={name: table[name] for name in PARAM_DTYPE.names or ()},
        partner=partner,
    )


def _plain_segment(store: FeatureStore, addition: Addition) -> NewSegment:
    """Views without partners, seed after seed."""
    stream, seeds, tiles, tile_px = addition.stream, addition.seeds, addition.tiles, store.dataset.tile_px
    tables = [draw_table(store.recipe, tile_ids=tiles, tile_px=tile_px, stream=stream, seed=s) for s in seeds]
    table = np.concatenate(tables)
    return NewSegment(
        stream=stream,
        seed_start=seeds.start,
        seeds=len(seeds),
        generation=next_generation(store, stream, seeds.start),
        tile_ids=tiles,
        columns={name: table[name] for name in PARAM_DTYPE.names or ()},
        partner=np.arange(len(table), dtype=np.int64),
    )
