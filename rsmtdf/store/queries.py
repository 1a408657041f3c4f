"""Questions that the two stages ask of a store: which views exist for a tile, and which rows training may use."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import numpy as np

from rsmtdf.errors import StoreIncomplete
from rsmtdf.specs import Stream
from rsmtdf.store.status import SKIPPED, state_of
from rsmtdf.store.store import FeatureStore

log = logging.getLogger(__name__)


def coverage(store: FeatureStore, stream: Stream) -> dict[str, set[int]]:
    """Tile id -> the seeds of its views in `stream` (computed or not)."""
    found: dict[str, set[int]] = {}
    ids = store.tile_ids
    for segment in store.segments:
        if segment.stream == stream:
            for index in store.column("tile")[segment.row_start : segment.row_start + segment.tiles].tolist():
                found.setdefault(ids[index], set()).update(segment.all_seeds)
    return found


def next_generation(store: FeatureStore, stream: Stream, seed: int) -> int:
    """The first generation that `stream` does not have under `seed`."""
    taken = [s.generation for s in store.segments if s.stream == stream and seed in s.all_seeds]
    return max(taken, default=-1) + 1


def weak_rows(store: FeatureStore, tiles: Sequence[str], usable: np.ndarray) -> np.ndarray:
    """int64 [tiles, most views]: the usable rows of each tile's weak views, by seed; -1 fills up.

    Tiles that stage 1 could not read (all their views are skipped) are left out, with a warning.

    Args:
        usable: bool [n_rows].

    Raises:
        StoreIncomplete: a tile has none.
    """
    indices = store.tile_ids.indices
    rows = store.rows(stream="weak")
    skipped = state_of(store.view_status())[rows] == SKIPPED
    unreadable = set(store.column("tile")[rows[skipped]].tolist()) - set(store.column("tile")[rows[~skipped]].tolist())
    if gone := [t for t in tiles if indices.get(t) in unreadable]:
        log.warning("%d labelled tile(s) left out: stage 1 could not read them (%s)", len(gone), ", ".join(gone[:3]))
        tiles = [t for t in tiles if indices.get(t) not in unreadable]
    rows = rows[usable[rows]]
    rows = rows[np.lexsort((store.column("seed")[rows], store.column("tile")[rows]))]
    owner = store.column("tile")[rows]
    # All tiles at once, in the column's dtype: other keys would have the whole column converted.
    wanted = np.array([indices.get(t, -1) for t in tiles], owner.dtype)
    starts = np.searchsorted(owner, wanted, side="left")
    counts = np.searchsorted(owner, wanted, side="right") - starts
    if lacking := [t for t, n in zip(tiles, counts, strict=True) if not n]:
        raise StoreIncomplete(
            f"{store.path} has no finished weak views of {len(lacking)} of {len(tiles)} labelled tiles (first: "
            f"{', '.join(lacking[:3])}); add them with the command the store was made by and these --labels"
        )
    places = np.arange(counts.max(initial=0))
    table = np.full((len(tiles), len(places)), -1, np.int64)
    there = places < counts[:, None]
    table[there] = rows[(starts[:, None] + places)[there]]
    return table


def strong_pairs(
    store: FeatureStore, pool: Collection[str], usable: np.ndarray, *, stream: Stream = "strong"
) -> dict[int, np.ndarray]:
    """Seed -> int64 [pairs, 2]: rows of CutMix partners that are both usable and of `pool`, over all generations."""
    indices = store.tile_ids.indices
    wanted = np.array(sorted(indices[t] for t in pool if t in indices), np.int64)
    tile, partner = store.column("tile"), store.column("partner")
    found: dict[int, list[np.ndarray]] = {}
    for segment in store.segments:
        if segment.stream != stream:
            continue
        for seed in segment.all_seeds:
            rows = np.array(segment.seed_rows(seed))
            first = rows[partner[rows] > rows]
            pairs = np.stack([first, partner[first]], axis=1).astype(np.int64)
            good = usable[pairs].all(axis=1) & np.isin(tile[pairs], wanted).all(axis=1)
            found.setdefault(seed, []).append(pairs[good])
    return {seed: np.concatenate(parts) for seed, parts in sorted(found.items())}
