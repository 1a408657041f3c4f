"""Segments: the runs of rows that a store is made of, and the plan by which it grows.

A segment is one stream, one generation, one ordered tile list and a range of seeds, seed-major: row
`row_start + k * tiles + j` is tile j under seed `seed_start + k`. Each begins at a shard boundary; the rows between
its last view and the next boundary are holes. So growing never rewrites a shard, and an epoch reads one range.
A segment that lost a seed goes on as its two ends: these lie where they lay, and may share a shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rsmtdf.errors import StoreError
from rsmtdf.specs import STREAMS, Stream, digest

STRUCTURE: Mapping[str, str] = {
    "tile": "int32",
    "stream": "uint8",
    "seed": "int64",
    "generation": "int32",
    "partner": "int64",
}
"""The columns every store has, and their types; parameter columns come beside them."""

HOLE_FILL: Mapping[str, int] = {"tile": -1, "partner": -1}
"""What these columns hold in hole rows (0 would be a tile, a row)."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One committed segment."""

    stream: Stream
    seed_start: int
    seeds: int
    generation: int
    tiles: int
    """Views per seed."""
    tiles_sha256: str
    """Digest of the ordered tile ids of one seed: part of the segment's identity."""
    row_start: int

    @property
    def rows(self) -> int:
        """Views, holes not counted."""
        return self.seeds * self.tiles

    @property
    def row_stop(self) -> int:
        """One past the last view."""
        return self.row_start + self.rows

    def seed_rows(self, seed: int) -> range:
        """The rows of one of its seeds."""
        start = self.row_start + (seed - self.seed_start) * self.tiles
        return range(start, start + self.tiles)

    @property
    def all_seeds(self) -> range:
        return range(self.seed_start, self.seed_start + self.seeds)

    def without(self, seed: int) -> tuple[Segment, ...]:
        """What is left of it when one of its seeds is gone: none, one or two segments, each row where it was."""
        before, after = seed - self.seed_start, self.seed_start + self.seeds - seed - 1
        left = dataclasses.replace(self, seeds=before)
        right = dataclasses.replace(
            self, seed_start=seed + 1, seeds=after, row_start=self.row_start + (before + 1) * self.tiles
        )
        return tuple(part for part in (left, right) if part.seeds)


@dataclass(frozen=True, kw_only=True)
class NewSegment:
    """What a store is asked to grow by."""

    stream: Stream
    seed_start: int
    seeds: int
    generation: int
    tile_ids: tuple[str, ...]
    """Of one seed's views, or of every row (then the same for each seed); for strong streams in matched order."""
    columns: Mapping[str, np.ndarray]
    """Parameter name -> one number per row, [seeds * tiles], seed-major."""
    partner: np.ndarray
    """int64 [seeds * tiles]: the row within the segment a view exchanges pixels with; its own row if none."""

    @property
    def rows(self) -> int:
        return len(self.partner)

    @property
    def tiles(self) -> tuple[str, ...]:
        """The tile ids of one seed.

        Raises:
            StoreError: the number of ids fits neither one seed nor all of them, or the seeds' lists differ.
        """
        where = f"new segment {self.stream}, seeds {self.seed_start}+{self.seeds}, generation {self.generation}"
        if self.seeds < 1 or self.rows < 1 or self.rows % self.seeds:
            raise StoreError(f"{where}: {self.rows} rows cannot be {self.seeds} equal seeds of at least one view")
        n = self.rows // self.seeds
        block = self.tile_ids[:n]
        if len(block) != n or self.tile_ids not in (block, block * self.seeds):
            raise StoreError(
                f"{where}: {len(self.tile_ids)} tile ids, expected {n} (one seed) or {self.rows} "
                "(every row, the same list for each seed)"
            )
        if len(set(block)) != n:
            raise StoreError(f"{where}: a tile is named twice within one seed")
        return block


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A planned extension: the new segments, and every column's values for the new rows, holes included."""

    segments: tuple[Segment, ...]
    n_rows: int
    """Rows of the store after it."""
    columns: Mapping[str, np.ndarray]
    new_tiles: tuple[str, ...]


def padded(rows: int, shard_views: int) -> int:
    """`rows` rounded up to a shard boundary."""
    return -(-rows // shard_views) * shard_views


def shard_runs(segments: Iterable[Segment], shard_views: int) -> list[tuple[int, int]]:
    """(first row, end row) of the whole shards that each segment lies in; segments that share a shard are one run."""
    runs: list[tuple[int, int]] = []
    for s in sorted(segments, key=lambda s: s.row_start):
        start, stop = s.row_start // shard_views * shard_views, padded(s.row_stop, shard_views)
        if runs and start < runs[-1][1]:
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((start, stop))
    return runs


def plan_growth(
    new: Sequence[NewSegment],
    *,
    n_rows: int,
    shard_views: int,
    tile_index: Mapping[str, int],
    column_types: Mapping[str, str],
    taken: Mapping[Stream, np.ndarray],
) -> Growth:
    """Where the new segments go and what their rows hold.

    Args:
        new: the segments to add, in order.
        n_rows: rows of the store now (a shard boundary).
        shard_views: views per shard.
        tile_index: index of each tile id the store knows.
        column_types: name -> dtype of the parameter columns the store has.
        taken: stream -> sorted int64 `view_keys` of the views it has.

    Raises:
        StoreError: a segment contradicts itself, repeats views the store has, or has a column of another type.
    """
    index = dict(tile_index)
    types = _column_types(new, column_types)
    segments: list[Segment] = []
    parts: list[dict[str, np.ndarray]] = []
    seen = {stream: [keys] for stream, keys in taken.items()}
    start = n_rows
    for s in new:
        _check(s)
        ids = [index.setdefault(t, len(index)) for t in s.tiles]
        tile = np.tile(np.array(ids, np.int32), s.seeds)
        seed = np.repeat(np.arange(s.seed_start, s.seed_start + s.seeds, dtype=np.int64), len(ids))
        keys = view_keys(tile, seed)
        for have in seen.setdefault(s.stream, []):
            if (again := np.isin(keys, have)).any():
                row = int(np.flatnonzero(again)[0])
                raise StoreError(
                    f"the store already has the {s.stream} view of tile {s.tiles[row % len(ids)]!r} under seed "
                    f"{seed[row]} ({int(again.sum())} such views in the new segment); add only views it lacks"
                )
        seen[s.stream].append(np.sort(keys))
        values = {name: np.asarray(s.columns[name]) for name in types if name in s.columns}
        values |= {
            "tile": tile,
            "stream": np.full(s.rows, STREAMS.index(s.stream), np.uint8),
            "seed": seed,
            "generation": np.full(s.rows, s.generation, np.int32),
            "partner": start + s.partner.astype(np.int64),
        }
        size = padded(s.rows, shard_views)
        parts.append({name: _fit(values.get(name), name, dtype, size) for name, dtype in types.items()})
        segments.append(
            Segment(
                stream=s.stream,
                seed_start=s.seed_start,
                seeds=s.seeds,
                generation=s.generation,
                tiles=len(ids),
                tiles_sha256=digest(list(s.tiles)),
                row_start=start,
            )
        )
        start += size
    return Growth(
        segments=tuple(segments),
        n_rows=start,
        columns={name: np.concatenate([p[name] for p in parts]) for name in types} if parts else {},
        new_tiles=tuple(index)[len(tile_index) :],
    )


def covered_rows(segments: Iterable[Segment], n_rows: int) -> np.ndarray:
    """bool [n_rows]: rows that are views, which is what segments cover; the others are holes."""
    real = np.zeros(n_rows, bool)
    for s in segments:
        real[s.row_start : s.row_stop] = True
    return real


def view_keys(tile: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """int64 keys that are equal for equal (tile, seed)."""
    return (tile.astype(np.int64) << 32) | seed.astype(np.int64)


def _check(s: NewSegment) -> None:
    where = f"new segment {s.stream}, seeds {s.seed_start}+{s.seeds}, generation {s.generation}"
    if s.stream not in STREAMS:
        raise StoreError(f"{where}: no such stream; there are {', '.join(STREAMS)}")
    if s.seed_start < 0 or s.seed_start + s.seeds > 2**31 or s.generation < 0:
        raise StoreError(f"{where}: seeds must lie in 0..2**31, generations must not be negative")
    partner = np.asarray(s.partner)
    rows = np.arange(s.rows)
    fits = partner.dtype.kind in "iu" and partner.ndim == 1 and bool(((partner >= 0) & (partner < s.rows)).all())
    if not fits or not np.array_equal(partner[partner], rows):
        raise StoreError(f"{where}: a partner must be a row of the segment whose own partner is the first row")
    for name, values in s.columns.items():
        if np.shape(values) != (s.rows,):
            raise StoreError(f"{where}: column {name!r} has shape {np.shape(values)}, expected ({s.rows},)")


def _column_types(new: Sequence[NewSegment], known: Mapping[str, str]) -> dict[str, str]:
    """Every column's dtype; parameter columns may come with any segment, but keep their type for ever."""
    types = dict(known)
    for s in new:
        for name, values in s.columns.items():
            dtype = np.asarray(values).dtype
            if not name.isidentifier() or name in STRUCTURE or name == "status":
                raise StoreError(f"{name!r} cannot be a parameter column: it must be an identifier not in use")
            if dtype.kind not in "biuf" or dtype.itemsize > 8:
                raise StoreError(f"column {name!r} has type {dtype}; columns are numbers or bool")
            if types.setdefault(name, dtype.name) != dtype.name:
                raise StoreError(f"column {name!r} is {types[name]} in the store, but {dtype.name} in a new segment")
    return dict(STRUCTURE) | types


def _fit(values: np.ndarray | None, name: str, dtype: str, size: int) -> np.ndarray:
    """`values` (None: a parameter this stream has not) as a column block of `size` rows, the rest filled."""
    out = np.full(size, np.nan if np.dtype(dtype).kind == "f" else HOLE_FILL.get(name, 0), dtype=dtype)
    if values is not None:
        out[: len(values)] = values
    return out
