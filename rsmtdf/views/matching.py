"""CutMix partners as a part of the seed: a keyed matching over the pool, and the order that keeps pairs together.

The published code pastes from whatever image shares the batch, so its distillation target cannot be cached. Here a
tile's partner is a function of (pool, stream, seed, generation). A pool is frozen per generation: tiles that come
later form their own generation and are matched among themselves, tiles that fail stay in the matching and only mark
their own and their partner's view, so no other view ever changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from rsmtdf.errors import ConfigError, DatasetError
from rsmtdf.keyed import Draws
from rsmtdf.specs import STREAMS, Stream, ViewRecipe


def match_pool(
    recipe: ViewRecipe, *, tile_ids: Sequence[str], stream: Stream, seed: int, generation: int
) -> tuple[np.ndarray, np.ndarray]:
    """The view order of a segment and each view's partner, from the *set* of ids (their order in the list is free).

    Args:
        recipe: its version enters the key.
        tile_ids: the generation's pool, frozen; unique.
        stream: only strong and strong2 have partners, each its own.
        seed: each seed is matched anew.
        generation: number of the pool.

    Returns:
        order: int64 [n], positions in `tile_ids`. Strong streams: pairs adjacent (rows 2i and 2i+1), the lone tile of
            an odd pool last. Others: sorted by id.
        partner: int64 [n], for row r of `order` the row of its partner; r itself where it has none.

    Raises:
        DatasetError: an id occurs twice.
        ConfigError: no such stream.
    """
    if stream not in STREAMS:
        raise ConfigError(f"no stream {stream!r}; there are {', '.join(STREAMS)}")
    n = len(tile_ids)
    by_id = sorted(range(n), key=tile_ids.__getitem__)
    for a, b in itertools.pairwise(by_id):
        if tile_ids[a] == tile_ids[b]:
            raise DatasetError(f"tile {tile_ids[a]!r} is twice in the pool (positions {a} and {b}); list it once")
    order = np.array(by_id, dtype=np.int64)
    partner = np.arange(n, dtype=np.int64)
    if stream in ("strong", "strong2"):
        order = order[Draws(recipe.version, "pool", f"matching/{stream}", seed, generation).permutation(n)]
        paired = n - n % 2
        partner[:paired] ^= 1
    return order, partner
