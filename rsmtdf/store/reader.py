"""`FeatureReader`: encoded features of one teacher's views, verified, straight into the caller's memory.

A view on a disk is one `preadv` of payload and checksum; in object storage, the views of one shard are one request. An
array whose layout is not the store's own (a compressed archive) or a platform without `preadv` is read through
zarr-python, under the same checks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self, TypedDict

import numpy as np

from rsmtdf.errors import StoreCorrupt, StoreError, StoreIncomplete
from rsmtdf.store.arrays import METADATA, read_metadata, same_layout
from rsmtdf.store.checksum import Appending, summed
from rsmtdf.store.codecs import EncodedArray
from rsmtdf.store.fallback import WrongArray, ZarrViews
from rsmtdf.store.manifest import load
from rsmtdf.store.range_shards import RangeObject, RangeShards
from rsmtdf.store.segments import Segment
from rsmtdf.store.shards import OpenShards, ShardDamage, ShardReader, Shards, ShardUnreachable
from rsmtdf.store.status import DONE, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.workshare import WorkShare

Piece = Callable[[], None]
_SUMMED_AGAIN = 1 << 14
"""Bytes that are summed a second time sooner than `Appending` finds its tables, which nobody has used for a while."""
_BYTE = np.dtype(np.uint8)


class _Sizes(TypedDict):
    dims: int
    view_bytes: int
    shard_views: int


@dataclass(frozen=True)
class _Trouble:
    """Why views could not be read."""

    row: int
    file: str
    what: str
    cause: ShardDamage | ShardUnreachable | None
    """None: the status word says otherwise."""

    @property
    def may_be_outdated(self) -> bool:
        """Whether it may only be that the shard was replaced since something of it was read."""
        return not isinstance(self.cause, ShardUnreachable) or self.cause.outdated


class FeatureReader:
    """Reads views of one teacher, from any number of threads. Use it as a context manager, or `close` it.

    The status words are read once, here: views committed later are not seen.
    """

    def __init__(
        self,
        store: FeatureStore,
        teacher: str,
        *,
        threads: int = 1,
        verify: bool = True,
        force_zarr: bool = False,
        files: OpenShards | None = None,
        ahead: np.ndarray | None = None,
        words: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        """Opens the features of `teacher`.

        Args:
            store: where they are.
            teacher: its name there.
            threads: pieces of one `get_many` that are read at a time.
            verify: check every byte read against the checksums beside it and in the status.
            force_zarr: read through zarr-python even where the fast path would do.
            files: descriptors to share with other readers; None: its own.
            ahead: bool per shard: those to be read ahead whole when first touched; None: none.
            words: shard -> its status words, where they are read already: of other shards it knows no view then. None:
                it reads those of all.

        Raises:
            StoreIncomplete: the store has no such teacher.
            StoreCorrupt: status words or metadata are damaged.
            StoreError: the features cannot be reached.
        """
        self.teacher = store.teacher(teacher)
        self._store = store
        self._verify = verify
        every = store.status(teacher) if words is None else np.zeros(store.n_rows, np.uint64)
        self._done = state_of(every) == DONE if words is None else np.zeros(store.n_rows, np.bool_)
        for shard, part in (words or {}).items():
            # Of zeros, only the memory that is written to is ever taken.
            rows = slice(shard * store.shard_views, (shard + 1) * store.shard_views)
            every[rows], self._done[rows] = part, state_of(part) == DONE
        # As a view of memory, whose items are ints at once.
        self._words = every.data
        if threads < 1:
            raise ValueError(f"threads is {threads}; expected at least 1")
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="features") if threads > 1 else None
        self._threads = threads
        self._own = files is None
        self._files = OpenShards() if files is None else files
        self._shards = [self._open(array, ahead, force_zarr=force_zarr) for array in self.teacher.arrays]
        self._by_shard = any(s.by_shard for s in self._shards)
        self._appending = [Appending(array.view_bytes) for array in self.teacher.arrays]
        local = [s for s in self._shards if isinstance(s, ShardReader)]
        # Nothing where another way reads one of the arrays.
        self._direct = list(zip(local, self._appending, strict=True)) if len(local) == len(self._shards) else []
        self._rooms = [_Room(array) for array in self.teacher.arrays]

    def is_done(self, rows: np.ndarray) -> np.ndarray:
        """bool, per row: whether its features are committed."""
        return np.asarray(self._done[rows], dtype=bool)

    def removed(self, rows: np.ndarray | Sequence[int]) -> StoreIncomplete | None:
        """The error that says so, if the teacher or one of `rows` was removed since the store was opened."""
        try:
            now = load(self._store.path)
        except StoreError:  # then nobody can tell
            return None
        if self.teacher.name not in now.teachers:
            what = f"teacher {self.teacher.name!r}"
        else:
            asked = np.asarray(rows)
            gone = asked[_covered(asked, self._store.segments) & ~_covered(asked, now.segments)]
            if not len(gone):
                return None
            what = f"view {self._named(int(gone[0]))}"
        return StoreIncomplete(
            f"{what} was removed from feature store {self._store.path} by rsmtdf cache rm; run the same command "
            "again, which goes by what is there now"
        )

    def get_many(
        self, view_ids: np.ndarray | Sequence[int], out: Mapping[str, np.ndarray] | None = None
    ) -> Mapping[str, np.ndarray]:
        """Array name -> values [b, ...] as stored, in the order of `view_ids` (rows of the store).

        Args:
            view_ids: which views; any order, repeats allowed.
            out: arrays to fill, C-contiguous, of the stored dtypes; None: new ones. Nothing writes to them any more
                when this returns or raises.

        Raises:
            ValueError: `view_ids` are no row numbers, or `out` does not fit.
            StoreIncomplete: there is no such row, or its view is not done, or was removed meanwhile.
            StoreCorrupt: a view is damaged or missing; nothing in `out` is to be used.
            StoreError: it cannot be read now; nothing is known to be wrong with it.
        """
        filled = self.empty(len(view_ids)) if out is None else out
        if self._pool is None and not self._by_shard:
            rows, flat = self._asked(view_ids, filled)
            for slot, row in enumerate(rows):
                self._view(row, [f[slot] for f in flat])
            return filled
        pieces = self.pieces(view_ids, filled)
        if self._pool is None:
            for piece in pieces:
                piece()
        else:
            work = WorkShare(pieces, then=lambda: None)
            work.help(self._pool, self._threads - 1)
            work.result()
        return filled

    def empty(self, views: int) -> dict[str, np.ndarray]:
        """Arrays that `get_many` fills."""
        return {a.name: np.empty((views, *a.shape), a.dtype) for a in self.teacher.arrays}

    def pieces(self, view_ids: np.ndarray | Sequence[int], out: Mapping[str, np.ndarray]) -> list[Piece]:
        """`get_many` in pieces that may run at the same time and raise what it raises.

        A piece is the work of one view, or of the views of one shard where that is one request.
        """
        rows, flat = self._asked(view_ids, out)
        if not self._by_shard:
            return [partial(self._view, row, [f[slot] for f in flat]) for slot, row in enumerate(rows)]
        return [
            partial(self._read, [rows[slot] for slot in unit], [[f[slot] for slot in unit] for f in flat])
            for unit in _grouped([row // self._store.shard_views for row in rows])
        ]

    def _asked(
        self, view_ids: np.ndarray | Sequence[int], out: Mapping[str, np.ndarray]
    ) -> tuple[list[int], list[Sequence[np.ndarray]]]:
        """The rows, each one that the store has, and per array and view uint8 [view_bytes] over the memory for it.

        Raises as `get_many`.
        """
        # A list of ints, as one view is asked for, needs no array made of it.
        rows = view_ids if type(view_ids) is list and {*map(type, view_ids)} == {int} else _row_numbers(view_ids)
        n = len(self._words)
        if rows and not (min(rows) >= 0 and max(rows) < n):
            bad = next(row for row in rows if not 0 <= row < n)
            raise StoreIncomplete(f"feature store {self._store.path} has rows 0 to {n - 1}, not {bad}")
        return rows, [room.bytes_of(out[room.name], len(rows)) for room in self._rooms]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        if self._own:
            self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _view(self, row: int, outs: Sequence[np.ndarray]) -> None:
        """`_read` of one view."""
        if not self._direct or self._words[row] >> 32 & 0xFF != DONE:
            self._read([row], [[out] for out in outs])
        elif (found := self._attempt_directly(row, outs)) is not None:
            self._insist(found, [row], [[out] for out in outs])

    def _read(self, rows: Sequence[int], outs: Sequence[Sequence[np.ndarray]]) -> None:
        """Reads these views, all of one shard or a single one, into the bytes `outs` per array and view."""
        for row in rows:
            if not self._done[row]:
                raise self.removed([row]) or StoreIncomplete(
                    f"features for {self.teacher.name!r} in {self._store.path} lack view {self._store.describe(row)}; "
                    "finish them with the rsmtdf cache-features command that the store was made by"
                )
        if (found := self._attempt(rows, outs)) is not None:
            self._insist(found, rows, outs)

    def _insist(self, found: _Trouble, rows: Sequence[int], outs: Sequence[Sequence[np.ndarray]]) -> None:
        """Tries again where that may help, and raises the trouble that is left."""
        left: _Trouble | None = found
        if found.may_be_outdated:
            # Shards are replaced while they are read (a view added, another removed); what is kept of them misleads.
            for shards in self._shards:
                shards.forget(rows[0])
            left = self._attempt(rows, outs)
        if left is not None:
            raise self._error(left) from left.cause

    def _attempt_directly(self, row: int, outs: Sequence[np.ndarray]) -> _Trouble | None:
        """`_attempt` of one view in local files, by the shortest path there is: what an interpreter does besides
        reading and summing takes as long as these once the processor's caches hold other things.
        """
        total = 0
        for (shards, appending), out in zip(self._direct, outs, strict=True):
            try:
                crc = shards.read_into(row, out, verify=self._verify)
            except (ShardDamage, ShardUnreachable) as cause:
                return _Trouble(row, shards.file(row), str(cause), cause)
            if not total:
                total = crc
            else:
                total = summed(total, out) if self._verify and len(out) <= _SUMMED_AGAIN else appending(total, crc)
        return None if total == self._words[row] & 0xFFFFFFFF else self._other_sum(row, total)

    def _attempt(self, rows: Sequence[int], outs: Sequence[Sequence[np.ndarray]]) -> _Trouble | None:
        """Reads and checks; what is wrong, if anything."""
        totals: list[int] | None = None
        for shards, appending, targets in zip(self._shards, self._appending, outs, strict=True):
            try:
                sums = shards.read(rows, targets, verify=self._verify)
            except ShardDamage as damage:
                row = rows[damage.place]
                return _Trouble(row, shards.file(row), str(damage), damage)
            except ShardUnreachable as error:
                return _Trouble(rows[0], shards.file(rows[0]), str(error), error)
            # The status word sums a view's arrays one after another.
            totals = sums if totals is None else [appending(a, b) for a, b in zip(totals, sums, strict=True)]
        for row, total in zip(rows, totals or [], strict=True):
            if total != self._words[row] & 0xFFFFFFFF:
                return self._other_sum(row, total)
        return None

    def _other_sum(self, row: int, total: int) -> _Trouble:
        status = self.teacher.status.chunk_file(row // self._store.shard_views)
        what = f"checksum is {total:08x}, the status word says {self._words[row] & 0xFFFFFFFF:08x} ({status})"
        return _Trouble(row, self._shards[0].file(row), what, None)

    def _open(self, array: EncodedArray, ahead: np.ndarray | None, *, force_zarr: bool) -> Shards:
        """The way to the array's views that suits its place and layout."""
        node: Path | RangeObject = self.teacher.path / array.name
        sizes = _Sizes(dims=1 + len(array.shape), view_bytes=array.view_bytes, shard_views=self._store.shard_views)
        fast: ShardReader | RangeShards
        if isinstance(node, Path):
            can = hasattr(os, "preadv")
            fast = ShardReader(node=node, **sizes, files=self._files, ahead=ahead)
        else:
            can = True
            fast = RangeShards(node=node, **sizes)
        known = same_layout(
            read_metadata(self.teacher.path / array.name), self.teacher.array_metadata(array, self._store.n_rows)
        )
        if known and can and not force_zarr:
            return fast
        try:
            return ZarrViews(node=node, array=array, rows=self._store.n_rows, shard_file=fast.file if known else None)
        except WrongArray as error:
            raise StoreCorrupt(
                f"feature store {self._store.path}, teacher {self.teacher.name!r}, file {node / METADATA}: the "
                f"metadata do not describe its features ({error}). Restore the file from a copy, or write the store "
                "anew with: rsmtdf cache-features"
            ) from error
        except ShardUnreachable as error:
            raise self._unreachable(str(node), f"array {array.name}", str(error)) from error

    def _named(self, row: int) -> str:
        try:
            return self._store.describe(row)
        except OSError:  # the columns may be out of reach too
            return str(row)

    def _error(self, found: _Trouble) -> StoreError:
        view = f"view {self._named(found.row)}"
        if isinstance(found.cause, ShardUnreachable):
            return self._unreachable(found.file, view, found.what)
        return self.removed([found.row]) or StoreCorrupt(
            f"feature store {self._store.path}, teacher {self.teacher.name!r}, {view}, file "
            f"{found.file}: {found.what}. Nothing was trained on it; recompute what is damaged with: "
            f"rsmtdf cache repair {self._store.path}"
        )

    def _unreachable(self, file: str, which: str, what: str) -> StoreError:
        return StoreError(
            f"feature store {self._store.path}, teacher {self.teacher.name!r}, {which}, file {file}: {what}. Nothing "
            "is known to be wrong with what is stored there: when it can be read again, run the same command again"
        )


class _Room:
    """What memory for the views of one array must be."""

    def __init__(self, array: EncodedArray) -> None:
        self.name, self._shape, self._view_bytes = array.name, array.shape, array.view_bytes
        self._dtype = np.dtype(array.dtype)

    def bytes_of(self, values: np.ndarray, views: int) -> Sequence[np.ndarray]:
        """Per view uint8 [view_bytes] over the same memory.

        Raises:
            ValueError: the values are of another shape or dtype, or not contiguous.
        """
        flags = values.flags
        if (
            values.shape != (views, *self._shape)
            or values.dtype != self._dtype
            or not (flags.c_contiguous and flags.writeable)
        ):
            raise ValueError(
                f"out[{self.name!r}] is {values.dtype} {values.shape}; expected {self._dtype} "
                f"{(views, *self._shape)}, C-contiguous and writeable"
            )
        if views == 1:
            return [np.frombuffer(values, _BYTE)]
        return list(values.view(_BYTE).reshape(views, self._view_bytes)) if views else []


def _row_numbers(view_ids: np.ndarray | Sequence[int]) -> list[int]:
    """As ints.

    Raises:
        ValueError: they are none.
    """
    rows = np.asarray(view_ids)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise ValueError(f"view_ids are {rows.dtype} {rows.shape}; expected a 1-D sequence of row numbers (integers)")
    found: list[int] = rows.tolist()
    return found


def _covered(rows: np.ndarray, segments: Sequence[Segment]) -> np.ndarray:
    """bool, per row: whether it is a view of one of `segments`."""
    found = np.zeros(len(rows), bool)
    for s in segments:
        found |= (s.row_start <= rows) & (rows < s.row_stop)
    return found


def _grouped(keys: Sequence[int]) -> list[list[int]]:
    """The places of equal keys, groups and places in the order of their coming."""
    groups: dict[int, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())
