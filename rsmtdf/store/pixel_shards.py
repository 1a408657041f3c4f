"""Committing pixels, a whole shard at a time: files first, status words last, as for features.

A view is stored only if the finished pixels are those that `views/status` vouches for: what was cached stays what the
teachers saw. Pixels follow features and never come before them, so a store may gain them at any time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from rsmtdf.errors import StoreError, StoreMismatch
from rsmtdf.store.arrays import read_metadata, same_layout
from rsmtdf.store.checksum import crc32c
from rsmtdf.store.pixels import StoredPixels
from rsmtdf.store.segments import shard_runs
from rsmtdf.store.shards import shard_name, write_shard_file
from rsmtdf.store.status import DONE, HOLE, SKIPPED, TODO, crc_of, state_of, word

if TYPE_CHECKING:
    from rsmtdf.store.store import FeatureStore

PixelArrays = Mapping[str, np.ndarray]
"""`pixels`, `valid` as `pack_valid` made it and, of strong views, `weak`: of one view."""


def pixel_words(store: FeatureStore, pixels: StoredPixels) -> np.ndarray:
    """uint64 [n_rows]: the words of the stored pixels. What `views/status` does not vouch for (any more) is to do."""
    words, views = pixels.status.read(store.n_rows), state_of(store.view_status())
    words[(state_of(words) == DONE) & (views != DONE)] = word(TODO)
    words[views == HOLE] = word(HOLE)
    return words


def commit_pixels(
    store: FeatureStore, shard: int, *, views: Mapping[int, PixelArrays], view_crcs: Mapping[int, int]
) -> int:
    """Writes and commits a shard of pixels that the caller owns; see `FeatureStore.write_pixels`."""
    pixels = store.pixels_of_shard(shard)
    _require_own_layout(store, pixels)
    first = shard * store.shard_views
    rows = store.rows_of_shard(shard).tolist()
    seen, old = store.view_status_array.read_shard(shard), pixels.status.read_shard(shard)
    _check_cover(store, pixels, shard, rows, views, view_crcs, seen, old)
    words = np.full(store.shard_views, word(HOLE), np.uint64)
    for row in rows:
        words[row - first] = word(SKIPPED if state_of(seen)[row - first] == SKIPPED else TODO)
    written = 0
    try:
        sums = dict.fromkeys(views, 0)
        for array in pixels.arrays:
            slots: list[np.ndarray | None] = [None] * store.shard_views
            for row, arrays in views.items():
                slots[row - first] = arrays[array.name]
                sums[row] = crc32c(arrays[array.name], start=sums[row])
            file = pixels.path / array.name / shard_name(shard, 1 + len(array.shape))
            store.claims.still_held()
            written += write_shard_file(file, slots)[0]
        for row, crc in sums.items():
            words[row - first] = word(DONE, crc)
        store.claims.still_held()
        if not np.array_equal(words, old):
            if pixels.status.is_sealed(shard):
                with store.locked():
                    pixels.status.unseal(shard)
            pixels.status.write_shard(shard, words)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"pixels of shard {shard} of feature store {store.path} could not be written: {error.strerror} "
            f"({error.filename or 'temporary file'}); nothing half-written counts, and the features are untouched. "
            "Free space or fix the disk, then run the same command again: it goes on from here"
        ) from error
    return written


def seal_pixels(store: FeatureStore) -> None:
    """Keeps the words of finished segments in one file too; the caller holds the mutex."""
    if (pixels := store.pixels) is None:
        return
    finished = np.isin(state_of(pixel_words(store, pixels)), (DONE, SKIPPED, HOLE))
    per = store.shard_views
    with contextlib.ExitStack() as stack:
        ranges = []
        for start, stop in shard_runs(store.segments, per):
            if finished[start:stop].all():
                with contextlib.suppress(StoreError):  # somebody is writing there
                    stack.enter_context(store.claims.claim(range(start // per, stop // per)))
                    ranges.append((start, stop))
        # Read again now that nobody changes them.
        finished = np.isin(state_of(pixel_words(store, pixels)), (DONE, SKIPPED, HOLE))
        store.claims.still_held()
        pixels.status.seal([r for r in ranges if finished[slice(*r)].all()], store.n_rows)


def _check_cover(
    store: FeatureStore,
    pixels: StoredPixels,
    shard: int,
    rows: list[int],
    views: Mapping[int, PixelArrays],
    view_crcs: Mapping[int, int],
    seen: np.ndarray,
    old: np.ndarray,
) -> None:
    """Every view is one of the shard, has the arrays it should and the pixels it had; none that is there is lost."""
    first = shard * store.shard_views
    if strange := set(views) - set(rows):
        raise StoreError(f"shard {shard} of feature store {store.path} has no view in row {min(strange)}")
    kept = {r for r in rows if state_of(old)[r - first] == DONE and state_of(seen)[r - first] == DONE}
    if lost := kept - set(views):
        raise StoreError(
            f"pixels of shard {shard} of feature store {store.path} would lose view {store.describe(min(lost))}; a "
            "commit must give every view that is stored already"
        )
    for row, arrays in views.items():
        expected, found = int(crc_of(seen)[row - first]), int(view_crcs[row])
        if state_of(seen)[row - first] != DONE:
            raise StoreError(
                f"view {store.describe(row)} of feature store {store.path} is not cached; its features come first"
            )
        if found != expected:
            raise StoreMismatch(
                f"view {store.describe(row)} of feature store {store.path} has other pixels than when it was first "
                f"cached: checksum expected {expected:08x}, found {found:08x}. The image has changed, or another JPEG "
                "decoder or Pillow version reads it differently; use the environment the store was written in "
                "(rsmtdf cache info), or write a new store"
            )
        for array in pixels.arrays:
            given = arrays[array.name]
            if given.shape != array.shape or given.dtype.name != array.dtype:
                raise StoreError(
                    f"array {array.name!r} of stored pixels is {given.dtype} {given.shape}, expected {array.dtype} "
                    f"{array.shape}"
                )


def _require_own_layout(store: FeatureStore, pixels: StoredPixels) -> None:
    for array in pixels.arrays:
        node = pixels.path / array.name
        if not same_layout(read_metadata(node), pixels.array_metadata(array, store.n_rows)):
            raise StoreError(f"{node} is archived: it is not in the layout that rsmtdf writes, so nothing can be added")
