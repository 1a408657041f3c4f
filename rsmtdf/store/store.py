"""`FeatureStore`: cached teacher features of views, as one folder that any Zarr v3 reader opens.

The whole format is in docs/store-format.md. The key decision: what a reader believes is the manifest (the root's
attributes) and the status words, both checksummed and replaced atomically; everything else is bytes that they vouch
for. The store knows no images, views or models, only specs, rows and arrays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rsmtdf.errors import StoreError, StoreIncomplete, StoreMismatch
from rsmtdf.objects import StorePath, store_path
from rsmtdf.specs import DatasetSpec, FeatureSpec, Stream, ViewRecipe
from rsmtdf.store import commit, report
from rsmtdf.store.arrays import damaged
from rsmtdf.store.commit import Features
from rsmtdf.store.growth import (
    column_array,
    column_sha256,
    grow_store,
    make_store,
    settle,
)
from rsmtdf.store.leases import for_writing, locks_of
from rsmtdf.store.manifest import PIXELS, Manifest, differences, identity_fields, load
from rsmtdf.store.manifest import commit as commit_manifest
from rsmtdf.store.pixel_shards import PixelArrays, commit_pixels, pixel_words, seal_pixels
from rsmtdf.store.pixels import StoredPixels, discard_pixels, strong_shards, write_pixels
from rsmtdf.store.places import explained
from rsmtdf.store.segments import STRUCTURE, NewSegment, Segment, covered_rows
from rsmtdf.store.statistics import Moments
from rsmtdf.store.status import DONE, HOLE, SKIPPED, StatusArray, state_of, word
from rsmtdf.store.stored_teacher import StoredTeacher, discard_teacher, load_teacher, write_teacher
from rsmtdf.store.tiles import TileIds, read_tiles
from rsmtdf.store.twins import keep_twins

SHARD_VIEWS = 64
"""Views per file: 135 MB of fp16 DINOv2-B features, and 16 000 files for 10^6 views."""
LOCK_TIMEOUT_S = 3600.0
"""How long to wait for another process that changes the store: it may be measuring statistics."""


class FeatureStore:
    """An open store. Safe to share between threads; other processes open their own from `path`.

    Rows number views and holes alike, 0..n_rows-1; `rows_of_shard`, `rows` and the segments tell the views.
    """

    def __init__(self, *, path: StorePath, manifest: Manifest, writable: bool) -> None:
        """Use `create` or `open`."""
        self.path = path
        self.writable = writable
        self.claims = locks_of(path)
        self._changing = threading.RLock()
        self._depth = 0
        self._owned: list[int] = []
        self._owned_lock = threading.Lock()
        self._columns: dict[str, np.ndarray] = {}
        self._tile_ids: TileIds | None = None
        self._adopt(manifest)

    @classmethod
    def create(
        cls,
        path: StorePath | str,
        *,
        recipe: ViewRecipe,
        dataset: DatasetSpec,
        data_root: str,
        experiment: Mapping[str, Any],
        shard_views: int = SHARD_VIEWS,
    ) -> FeatureStore:
        """An empty, writable store at `path`, with no views and no teachers.

        Args:
            path: does not exist yet, or is an empty folder; a folder of this machine, or a URL (`s3://bucket/key`).
            recipe: how views are made.
            dataset: as resolved (bands and scaling filled in).
            data_root: where the images are; tile ids are relative to it.
            experiment: JSON data that later stages want to find, kept as it is.
            shard_views: views per file.

        Raises:
            StoreError: something is at `path`, or it cannot be written.
        """
        path = for_writing(store_path(path))
        make_store(
            path,
            recipe=recipe,
            dataset=dataset,
            data_root=data_root,
            experiment=experiment,
            shard_views=shard_views,
        )
        store = cls.open(path, writable=True)
        keep_twins(path, store._manifest)
        return store

    @classmethod
    def open(cls, path: StorePath | str, *, writable: bool = False) -> FeatureStore:
        """The store at `path`. With `writable`, what a change that was cut short left behind is put in order.

        Raises:
            StoreNotFound: there is none.
            StoreCorrupt: its metadata is damaged.
            StoreError: its format is of another version.
        """
        path = store_path(path)
        if writable:
            path = for_writing(path)
        store = cls(path=path, manifest=load(path), writable=writable)
        if writable:
            # Somebody who is changing it right now will leave it in order.
            with contextlib.suppress(StoreError), store.locked(timeout_s=0):
                store.refresh()  # somebody may have changed it between reading and locking
                settle(path, store._manifest, store.teachers, store.pixels)
                keep_twins(path, store._manifest)
        return store

    # What it is

    @property
    def recipe(self) -> ViewRecipe:
        return self._manifest.recipe

    @property
    def dataset(self) -> DatasetSpec:
        return self._manifest.dataset

    @property
    def data_root(self) -> str:
        return self._manifest.data_root

    @property
    def experiment(self) -> Mapping[str, Any]:
        return self._manifest.experiment

    @property
    def versions(self) -> Mapping[str, str]:
        """Library versions at creation."""
        return self._manifest.versions

    @property
    def identity(self) -> str:
        """Digest of the recipe and of the data set's pixel fields."""
        return self._manifest.identity

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self._manifest.segments

    @property
    def n_rows(self) -> int:
        """Rows, holes included: a multiple of `shard_views`."""
        return self._manifest.n_rows

    @property
    def n_views(self) -> int:
        return sum(s.rows for s in self.segments)

    @property
    def shard_views(self) -> int:
        return self._manifest.shard_views

    @property
    def n_shards(self) -> int:
        return self.n_rows // self.shard_views

    @property
    def teachers(self) -> Mapping[str, StoredTeacher]:
        return self._teachers

    @property
    def view_status_array(self) -> StatusArray:
        return StatusArray(path=self.path / "views" / "status", shard_views=self.shard_views)

    def teacher(self, name: str) -> StoredTeacher:
        """The stored teacher of that name.

        Raises:
            StoreIncomplete: there is none.
        """
        if name not in self._teachers:
            have = ", ".join(self._teachers) or "none"
            raise StoreIncomplete(
                f"feature store {self.path} has no teacher {name!r}; it has: {have}. "
                f"Add it with: rsmtdf cache-features --teacher {name} --out {self.path}"
            )
        return self._teachers[name]

    @property
    def pixels(self) -> StoredPixels | None:
        """The stored pixels; None where the store keeps none."""
        return self._pixels() if self._manifest.has_pixels else None

    def pixels_of_shard(self, shard: int) -> StoredPixels:
        """The stored pixels with the arrays that this shard's views have.

        Raises:
            StoreIncomplete: the store keeps none.
        """
        if (pixels := self.pixels) is None:
            raise StoreIncomplete(
                f"feature store {self.path} keeps no pixels; add them with: rsmtdf cache-features --store-pixels "
                f"--out {self.path}"
            )
        return pixels.of_shard(shard, strong_shards(self.segments, self.shard_views))

    def expect(self, *, recipe: ViewRecipe, dataset: DatasetSpec) -> None:
        """Checks that the store's views are those of `recipe` on `dataset`.

        Raises:
            StoreMismatch: naming every field that differs, expected and found.
        """
        lines = differences(identity_fields(recipe, dataset), identity_fields(self.recipe, self.dataset))
        if lines:
            raise StoreMismatch(
                f"feature store {self.path} was made for other views:\n  "
                + "\n  ".join(lines)
                + "\nUse the settings it was made with, or write another store"
            )

    def expect_teacher(self, spec: FeatureSpec, codec: str, *, rule: Mapping[str, Any] | None = None) -> None:
        """Checks that the stored teacher `spec.name` is this one.

        Raises:
            StoreIncomplete: there is none of that name.
            StoreMismatch: naming every field that differs, expected and found.
        """
        if lines := self.teacher(spec.name).expect(spec, codec, rule):
            raise StoreMismatch(
                f"teacher {spec.name!r} in feature store {self.path} is another one:\n  "
                + "\n  ".join(lines)
                + "\nGive yours another name, use the settings of the stored one, or write another store"
            )

    # Rows

    @property
    def tile_ids(self) -> TileIds:
        """Ids by tile index; read when first used.

        Raises:
            StoreCorrupt: they differ from what was committed.
        """
        if self._tile_ids is None:
            self._tile_ids = read_tiles(self.path, self._manifest.tiles)
        return self._tile_ids

    def column(self, name: str) -> np.ndarray:
        """A column, [n_rows], read-only: tile (index), stream (place in `STREAMS`), seed, generation, partner (row),
        or a parameter. Holes have tile and partner -1; parameters that a stream lacks are NaN or 0.

        Raises:
            StoreIncomplete: there is no such column.
            StoreCorrupt: it differs from what was committed.
        """
        if name in self._columns:
            return self._columns[name]
        entry = self._manifest.columns.get(name)
        if entry is None:
            if name in STRUCTURE and not self.n_rows:
                return np.empty(0, STRUCTURE[name])
            have = ", ".join(self._manifest.columns) or "none yet"
            raise StoreIncomplete(f"feature store {self.path} has no column {name!r}; it has: {have}")
        array = column_array(self.path, name, entry)
        values = array.read(self.n_rows)
        if column_sha256(values) != entry.sha256:
            raise damaged(array.path, f"the digest of column {name!r} is not the one in the store's manifest")
        values.flags.writeable = False
        self._columns[name] = values
        return values

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(self._manifest.columns)

    def rows(self, *, stream: Stream, seed: int | None = None, generation: int | None = None) -> np.ndarray:
        """int64 rows of a stream's views (of one seed, of one generation), ascending."""
        parts = [
            np.arange(s.row_start, s.row_stop) if seed is None else np.array(s.seed_rows(seed))
            for s in self.segments
            if s.stream == stream
            and (seed is None or seed in s.all_seeds)
            and (generation is None or s.generation == generation)
        ]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def rows_of_shard(self, shard: int) -> np.ndarray:
        """int64 rows of a shard's views, without holes.

        Raises:
            StoreError: there is no such shard.
        """
        if not 0 <= shard < self.n_shards:
            raise StoreError(f"feature store {self.path} has shards 0..{self.n_shards - 1}, not {shard}")
        first = shard * self.shard_views
        rows = np.arange(first, first + self.shard_views)
        return np.asarray(rows[self._real[first : first + self.shard_views]])

    def removed_rows(self) -> np.ndarray:
        """int64 rows that were views once: no segment covers them, but their columns say what they were."""
        was = self.column("tile") >= 0
        return np.flatnonzero(was & ~self._real).astype(np.int64)

    def describe(self, row: int) -> str:
        """A view in words: row, tile, stream and seed, as far as the columns can be read."""
        for s in self.segments:
            if s.row_start <= row < s.row_stop:
                seed = s.seed_start + (row - s.row_start) // s.tiles
                try:
                    tile = self.tile_ids[int(self.column("tile")[row])]
                except StoreError:
                    tile = "?"
                return f"{row} (tile {tile}, {s.stream}, seed {seed})"
        return f"{row} (no view)"

    # Status

    def view_status(self) -> np.ndarray:
        """uint64 [n_rows] as on disk now: bits 0-31 crc32c of pixels and valid mask, 32-39 the state."""
        return self._with_holes(self.view_status_array.read(self.n_rows))

    def status(self, teacher: str) -> np.ndarray:
        """uint64 [n_rows] as on disk now: bits 0-31 crc32c of the encoded features, 32-39 the state."""
        return self._with_holes(self.teacher(teacher).status.read(self.n_rows))

    def pixel_status(self) -> np.ndarray:
        """uint64 [n_rows] as on disk now: bits 0-31 crc32c of the stored arrays, 32-39 the state; to do where no
        pixels are kept.
        """
        if (pixels := self.pixels) is None:
            return self._with_holes(np.zeros(self.n_rows, np.uint64))
        return pixel_words(self, pixels)

    def pending_pixels(self) -> np.ndarray:
        """int64 rows of views that are cached, but whose pixels are not stored."""
        lacking = (state_of(self.view_status()) == DONE) & (state_of(self.pixel_status()) != DONE)
        return np.flatnonzero(lacking & self._real).astype(np.int64)

    def missing_shards(self, teachers: Sequence[str], *, retry_skipped: bool = False) -> list[int]:
        """Shards with a view that is not done (nor skipped) for one of `teachers`, ascending."""
        todo = self._todo(teachers, retry_skipped=retry_skipped).reshape(-1, self.shard_views)
        return [int(k) for k in np.flatnonzero(todo.any(axis=1))]

    def missing_teachers(self, teachers: Sequence[str]) -> dict[int, list[str]]:
        """Shard -> those of `teachers` that lack one of its views; shards that lack nothing are left out."""
        found: dict[int, list[str]] = {}
        for name in teachers:
            for shard in self.missing_shards([name]):
                found.setdefault(shard, []).append(name)
        return dict(sorted(found.items()))

    def pending_rows(self, teachers: Sequence[str], *, retry_skipped: bool = False) -> np.ndarray:
        """int64 rows of views that are not done (nor skipped) for one of `teachers`."""
        return np.flatnonzero(self._todo(teachers, retry_skipped=retry_skipped)).astype(np.int64)

    def pending_views(self, teachers: Sequence[str]) -> int:
        """How many views are not done (nor skipped) for one of `teachers`."""
        return len(self.pending_rows(teachers))

    def usable(self, teachers: Sequence[str]) -> np.ndarray:
        """bool [n_rows]: views whose pixels and features of all `teachers` are committed."""
        ok: np.ndarray = state_of(self.view_status()) == DONE
        for name in teachers:
            ok &= state_of(self.status(name)) == DONE
        return ok

    def completeness(self) -> dict[str, dict[str, dict[int, report.Progress]]]:
        """Teacher -> stream -> seed -> views done, skipped and in all."""
        return report.completeness(self)

    def info(self) -> dict[str, Any]:
        """Everything `rsmtdf cache info` shows, as JSON-ready data."""
        return report.info(self)

    # Changes

    @contextlib.contextmanager
    def locked(self, *, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
        """The right to change the store's metadata, alone among all processes; may be nested.

        Call `refresh` inside to see what whoever had it before has changed.

        Raises:
            StoreError: another process keeps it for longer than `timeout_s`, or the store is open for reading.
        """
        self._require_writable()
        with self._changing, contextlib.ExitStack() as stack:
            stack.enter_context(explained(self.path))
            if self._depth == 0:
                stack.enter_context(self.claims.mutex(timeout_s=timeout_s))
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def refresh(self) -> None:
        """Reads the committed state again."""
        self._adopt(load(self.path))

    def extend(
        self, new: Sequence[NewSegment], *, on_step: Callable[[str], None] = lambda step: None
    ) -> tuple[Segment, ...]:
        """Appends segments, each at a shard boundary, and returns them. The only place where a store gets longer.

        Args:
            new: in order; tiles the store does not know yet are added to its table.
            on_step: called after each step with its name; if it raises, the change ends there.

        Raises:
            StoreError: writers hold claims, views are already there, or the disk cannot be written. The store is
                then as it was before.
        """
        with self.locked():
            self.refresh()
            if not new:
                return ()
            with self.claims.all_shards(purpose="extend"):
                before = len(self.segments)
                columns = {name: self.column(name) for name in self.column_names}
                grown = grow_store(
                    self.path,
                    self._manifest,
                    new,
                    tile_ids=self.tile_ids,
                    columns=columns,
                    teachers=self.teachers,
                    pixels=self.pixels,
                    on_step=on_step,
                    still_held=self.claims.still_held,
                )
                self._adopt(grown)
            keep_twins(self.path, grown)
        return self.segments[before:]

    def add_teacher(
        self, spec: FeatureSpec, *, codec: str, statistics: Moments, rule: Mapping[str, Any] | None = None
    ) -> None:
        """Adds a teacher whose features come next.

        Args:
            spec: its name becomes the group's.
            codec: a key of `CODECS`.
            statistics: of its channels: `ChannelStatistics` that were measured, or a sibling store's teacher.
            rule: JSON data that says how they were measured; part of the teacher's identity.

        Raises:
            StoreError: there is a teacher of that name, or something does not fit it.
        """
        with self.locked():
            self.refresh()
            if spec.name in self.teachers:
                raise StoreError(f"feature store {self.path} already has a teacher {spec.name!r}")
            discard_teacher(self.path, spec.name)  # a removed one of that name may have left shards behind
            teacher = StoredTeacher(
                path=self.path / "teachers" / spec.name,
                spec=spec,
                codec=codec,
                shard_views=self.shard_views,
                mean=statistics.mean,
                std=statistics.std,
                statistics={"rule": dict(rule or {}), **statistics.summary()},
            )
            digest = write_teacher(teacher, n_rows=self.n_rows)
            self._commit(teachers={**self._manifest.teachers, spec.name: digest})

    def add_pixels(self) -> bool:
        """Makes room for the views' pixels, which come next; False where the store has it already."""
        with self.locked():
            self.refresh()
            if self._manifest.has_pixels:
                return False
            discard_pixels(self.path)  # removed ones may have left shards behind
            write_pixels(self._pixels(), n_rows=self.n_rows)
            self._commit(has_pixels=True)
        return True

    def amend(
        self,
        *,
        dataset: DatasetSpec | None = None,
        data_root: str | None = None,
        experiment: Mapping[str, Any] | None = None,
    ) -> None:
        """Replaces what is in no identity: classes and masks of the data set, its place, the experiment.

        Raises:
            StoreMismatch: `dataset` has other pixels.
        """
        with self.locked():
            self.refresh()
            if dataset is not None:
                self.expect(recipe=self.recipe, dataset=dataset)
            given = {"dataset": dataset, "data_root": data_root, "experiment": experiment}
            self._commit(**{k: v for k, v in given.items() if v is not None})

    def shrink(
        self,
        *,
        segments: Sequence[Segment] | None = None,
        without_teacher: str | None = None,
        without_pixels: bool = False,
        experiment: Mapping[str, Any] | None = None,
    ) -> None:
        """Commits that only `segments` are there, or that a teacher or the stored pixels are not; rows outside
        segments are holes then.

        The caller owns the store and all its shards, and frees the disk afterwards (`rsmtdf.store.remove`).
        """
        changes: dict[str, Any] = {} if experiment is None else {"experiment": experiment}
        if segments is not None:
            changes["segments"] = tuple(segments)
        if without_teacher is not None:
            changes["teachers"] = {n: d for n, d in self._manifest.teachers.items() if n != without_teacher}
        if without_pixels:
            changes["has_pixels"] = False
        with self.locked():
            self._commit(**changes)

    @contextlib.contextmanager
    def claim(self, shards: Sequence[int]) -> Iterator[None]:
        """Owns `shards` alone while inside. A process that dies loses its claims, kill -9 included.

        Raises:
            StoreError: another owner has one of them, in this process or another.
        """
        self._require_writable()
        with explained(self.path), self.claims.claim(shards):
            with self._owned_lock:
                self._owned.extend(shards)
            try:
                yield
            finally:
                with self._owned_lock:
                    for shard in shards:
                        self._owned.remove(shard)

    def write_shard(
        self,
        shard: int,
        *,
        view_crcs: Mapping[int, int],
        skipped: Mapping[int, str],
        features: Mapping[str, Features],
        provenance: Mapping[str, Any],
        left: Collection[int] = (),
    ) -> int:
        """Writes and commits one whole shard for some teachers; bytes of features written.

        Args:
            shard: claimed here for the duration where the caller has not claimed it.
            view_crcs: row -> crc32c of its pixels and valid mask, for every view of the shard not skipped.
            skipped: row -> why, for the views that cannot be made.
            features: teacher -> features [k, tokens, dim] of the k views in `view_crcs`, rows ascending; or what
                `teachers[name].encode` made of them.
            provenance: JSON-ready facts about the computation, kept beside the shard.
            left: rows that stay to be done.

        Raises:
            StoreMismatch: a view has other pixels than when it was first cached.
            StoreError: another owner, rows that do not fit, a value that cannot be stored, or a full disk. The
                shard then stays undone and nothing half-written is left.
        """
        with self._owned_lock:
            owned = shard in self._owned
        with contextlib.nullcontext() if owned else self.claim([shard]):
            return commit.commit_shard(
                self, shard, view_crcs=view_crcs, skipped=skipped, features=features, provenance=provenance, left=left
            )

    def write_pixels(self, shard: int, *, views: Mapping[int, PixelArrays], view_crcs: Mapping[int, int]) -> int:
        """Writes and commits the pixels of one whole shard; bytes written.

        Args:
            shard: claimed here for the duration where the caller has not claimed it.
            views: row -> its arrays, for every view of the shard that can be made; those that are stored already are
                among them.
            view_crcs: row -> crc32c of its finished pixels and valid mask, which must be the recorded one.

        Raises:
            StoreMismatch: a view has other pixels than when it was cached.
            StoreError: as `write_shard`; or a view is not cached.
        """
        with self._owned_lock:
            owned = shard in self._owned
        with contextlib.nullcontext() if owned else self.claim([shard]):
            return commit_pixels(self, shard, views=views, view_crcs=view_crcs)

    def withdraw(self, shard: int, teacher: str) -> None:
        """Marks a teacher's shard as not done, so that it is computed again."""
        with self.claim([shard]):
            commit.withdraw_shard(self, shard, teacher)

    def clean_partials(self) -> int:
        """Removes temporary files of writers that died, but none of those at work; how many."""
        with self.locked():
            return commit.clean_partials(self)

    def seal(self) -> None:
        """Keeps the status words of all finished segments in one file per array too, which opens fast.

        A segment that somebody is writing to is left for another time.
        """
        with self.locked():
            self.refresh()
            commit.seal_finished(self)
            seal_pixels(self)

    # Inside

    def _adopt(self, manifest: Manifest) -> None:
        real = covered_rows(manifest.segments, manifest.n_rows)
        teachers = {
            name: load_teacher(self.path / "teachers" / name, digest=digest, shard_views=manifest.shard_views)
            for name, digest in manifest.teachers.items()
        }
        self._manifest = manifest
        self._real = real
        self._teachers = teachers
        self._columns = {}
        self._tile_ids = None

    def _commit(self, **changes: Any) -> None:
        changed = dataclasses.replace(self._manifest, **changes)
        self.claims.still_held()
        commit_manifest(self.path, changed)
        self._adopt(changed)
        keep_twins(self.path, changed)

    def _pixels(self) -> StoredPixels:
        return StoredPixels(path=self.path / PIXELS, crop_px=self.recipe.crop_px, shard_views=self.shard_views)

    def _todo(self, teachers: Sequence[str], *, retry_skipped: bool) -> np.ndarray:
        """bool [n_rows]: views that are not finished."""
        finished = [DONE] if retry_skipped else [DONE, SKIPPED]
        todo = ~np.isin(state_of(self.view_status()), finished)
        for name in teachers:
            todo |= ~np.isin(state_of(self.status(name)), finished)
        return np.asarray(todo & self._real)

    def _with_holes(self, words: np.ndarray) -> np.ndarray:
        """Marks holes where no shard has been committed yet."""
        words[~self._real] = word(HOLE)
        return words

    def _require_writable(self) -> None:
        if not self.writable:
            raise StoreError(f"feature store {self.path} is open for reading; open it with writable=True to change it")
