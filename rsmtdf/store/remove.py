"""Giving disk back: a teacher or a seed leaves a store, and no row number changes.

The manifest goes first: once it is committed, the rows are holes, or the teacher is unknown, to every reader, and what
is left on disk is litter that any later change (or stage 1) clears away. Then the status words of the rows, then
their bytes. The views that share a shard with removed ones keep their words throughout: their bytes are copied as
they are and the file is replaced whole, so there is no moment at which one of them cannot be read.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rsmtdf.errors import StoreCorrupt, StoreError, StoreIncomplete
from rsmtdf.objects import StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.specs import STREAMS, Stream
from rsmtdf.store.arrays import METADATA, read_metadata, same_layout
from rsmtdf.store.pixels import Payload, bytes_per_view, discard_pixels, has_litter
from rsmtdf.store.places import names, tree_bytes
from rsmtdf.store.places import remove as remove_file
from rsmtdf.store.places import size as file_bytes
from rsmtdf.store.segments import Segment
from rsmtdf.store.shards import ShardDamage, drop_views, shard_name
from rsmtdf.store.status import DONE, HOLE, StatusArray, state_of, word
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import discard_teacher

SHOWN = 20
"""Seeds that an error names."""
Step = Callable[[str], None]
"""Called after each step with its name; if it raises, the removal ends there."""


@dataclass(kw_only=True)
class RemovalReport:
    """What leaves a store, or would."""

    store: StorePath
    what: str
    views: int
    """Rows that become holes; for a teacher, its finished views."""
    bytes: int
    """On disk: about that many before it is done, those given back afterwards."""
    remaining: str
    """What the store has left of the kind."""
    shards_deleted: int = 0
    shards_rewritten: int = 0
    left: list[str] = field(default_factory=list)
    """Files that could not be freed, and why."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "store": str(self.store)}


def plan_removal(
    store: FeatureStore,
    *,
    teacher: str | None = None,
    pixels: bool = False,
    seed: int | None = None,
    stream: Stream = "strong",
    generation: int | None = None,
) -> RemovalReport:
    """What `remove` would do; one of a teacher, the stored pixels and a seed is given.

    Raises:
        StoreIncomplete: there is no such teacher, no view of that seed, or no pixels are stored.
        StoreError: none of them or several are given, or no such stream.
    """
    if (teacher is not None) + (seed is not None) + pixels != 1:
        raise StoreError("give either a teacher or a seed to remove, or the stored pixels")
    if pixels:
        if (stored_pixels := store.pixels) is None:
            raise StoreIncomplete(f"feature store {store.path} keeps no pixels")
        return RemovalReport(
            store=store.path,
            what="the stored pixels",
            views=int(np.count_nonzero(state_of(store.pixel_status()) == DONE)),
            bytes=tree_bytes(stored_pixels.path),
            remaining="features stay; training makes the views from the images again",
        )
    if teacher is not None:
        if teacher not in store.teachers:
            raise StoreIncomplete(f"feature store {store.path} has no teacher {teacher!r}; {_nearest(store, teacher)}")
        stored = store.teacher(teacher)
        others = [name for name in store.teachers if name != teacher]
        done = int(np.count_nonzero(store.usable([teacher])))
        return RemovalReport(
            store=store.path,
            what=f"teacher {teacher}",
            views=done,
            bytes=tree_bytes(stored.path),
            remaining=f"teachers left: {', '.join(others) or 'none; there is nothing to train from'}",
        )
    assert seed is not None
    gone, kept = _cut(store, stream, seed, generation)
    rows = np.concatenate([np.array(s.seed_rows(seed)) for s in gone])
    seeds = {k for s in kept if s.stream == stream for k in s.all_seeds}
    which = "" if generation is None else f" of generation {generation}"
    return RemovalReport(
        store=store.path,
        what=f"{stream} seed {seed}{which}",
        views=len(rows),
        bytes=sum(int(store.usable([t.name])[rows].sum()) * t.bytes_per_view for t in store.teachers.values())
        + int((state_of(store.pixel_status())[rows] == DONE).sum()) * bytes_per_view(store.recipe.crop_px, stream),
        remaining=f"{stream} seeds left: {len(seeds) or 'none'}",
    )


def has_remains(
    store: FeatureStore,
    *,
    teacher: str | None = None,
    pixels: bool = False,
    seed: int | None = None,
    stream: Stream = "strong",
    generation: int | None = None,
) -> bool:
    """Whether a removal of just this, which was cut short, may have left something on disk."""
    if pixels:
        return store.pixels is None and has_litter(store.path)
    if teacher is not None:
        return teacher not in store.teachers and teacher in _teacher_remains(store)
    return seed is not None and len(_seed_remains(store, stream, seed, generation)) > 0


def remove(
    path: StorePath,
    *,
    teacher: str | None = None,
    pixels: bool = False,
    seed: int | None = None,
    stream: Stream = "strong",
    generation: int | None = None,
    experiment: Mapping[str, Any] | None = None,
    stop: StopFlag,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_step: Step = lambda step: None,
) -> RemovalReport:
    """Takes a teacher, one seed's views, or the stored pixels out of the store at `path` and gives their disk back.

    Args:
        path: the store; nobody may be writing to it meanwhile.
        teacher: the one to remove.
        pixels: remove the stored pixels.
        seed: the one to remove, of `stream`.
        stream: of the seed.
        generation: only the views of this one.
        experiment: the record that the store keeps from now on; None: as it is.
        stop: ends the clearing between shards; what is left is cleared by `reclaim`.
        progress: told shards cleared, and shards to clear.
        on_step: for tests that end it half-way.

    Raises:
        StoreIncomplete: there is no such teacher, or no view of that seed, nor anything on disk that an earlier
            removal left there.
        StoreError: somebody is writing to it, or it cannot be written.
        Interrupted: a signal came; the removal itself stands.
    """
    store = FeatureStore.open(path, writable=True)
    is_done = False
    try:
        with store.locked(), store.claims.all_shards(purpose="remove from"):
            store.refresh()
            for status in _statuses(store):
                status.sealed_ranges()  # what is damaged shall stop this before the first change, not after it
            try:
                report = plan_removal(
                    store, teacher=teacher, pixels=pixels, seed=seed, stream=stream, generation=generation
                )
            except StoreIncomplete:
                # Perhaps it was removed by a call that was cut short; then just what that call has left is cleared.
                report = _nothing_more(store)
                teachers = _teacher_remains(store) & {teacher}
                rows = np.empty(0, np.int64) if seed is None else _seed_remains(store, stream, seed, generation)
                _clear(store, report, teachers, rows, stop, progress, on_step)
                if not (report.bytes or report.left):
                    raise
                return report
            if pixels:
                store.shrink(without_pixels=True, experiment=experiment)
            elif seed is None:
                store.shrink(without_teacher=teacher, experiment=experiment)
            else:
                store.shrink(segments=_cut(store, stream, seed, generation)[1], experiment=experiment)
            is_done = True
            on_step("manifest")
            report.bytes = 0
            _clear(store, report, _teacher_remains(store), store.removed_rows(), stop, progress, on_step)
        _seal(store, report)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        state = "what was asked for is removed, but its disk is not all free" if is_done else "nothing was removed"
        raise StoreError(
            f"feature store {path} cannot be changed: {error.strerror} ({error.filename}); {state}. "
            "Fix the disk or its permissions, then run the same command again"
        ) from error
    return report


def reclaim(
    store: FeatureStore, *, stop: StopFlag, progress: Callable[[int, int], None] = lambda done, total: None
) -> RemovalReport | None:
    """Clears what a removal that was cut short has left on disk; None while somebody writes to the store."""
    with store.locked(), contextlib.ExitStack() as stack:
        store.refresh()
        try:
            stack.enter_context(store.claims.all_shards(purpose="clear"))
        except StoreError:
            return None
        report = _nothing_more(store)
        _clear(store, report, _teacher_remains(store), store.removed_rows(), stop, progress, lambda step: None)
    return report


def _nothing_more(store: FeatureStore) -> RemovalReport:
    """The report of clearing alone."""
    return RemovalReport(store=store.path, what="what an earlier removal left", views=0, bytes=0, remaining="cleared")


def _seal(store: FeatureStore, report: RemovalReport) -> None:
    try:
        store.seal()
    except StoreCorrupt as error:  # in shards that have nothing to do with it
        report.left.append(f"the store could not be sealed again: {error}")


def _cut(store: FeatureStore, stream: Stream, seed: int, generation: int | None) -> tuple[list[Segment], list[Segment]]:
    """The segments that hold the seed, and all that the store has without it."""
    if stream not in STREAMS:
        raise StoreError(f"no stream {stream!r}; there are {', '.join(STREAMS)}")
    of_stream = [s for s in store.segments if s.stream == stream]
    found = [s for s in of_stream if seed in s.all_seeds and generation in (None, s.generation)]
    if not found:
        have = sorted({(k, s.generation) for s in of_stream for k in s.all_seeds})
        seeds = ", ".join(f"{k} (generation {g})" if g else str(k) for k, g in have[:SHOWN]) or "none"
        asked = f"seed {seed}" + ("" if generation is None else f", generation {generation}")
        raise StoreIncomplete(
            f"feature store {store.path} has no {stream} views of {asked}; it has seeds: {seeds}"
            + (f" and {len(have) - SHOWN} more" if len(have) > SHOWN else "")
        )
    return found, [part for s in store.segments for part in (s.without(seed) if s in found else (s,))]


def _statuses(store: FeatureStore) -> list[StatusArray]:
    return [store.view_status_array, *(payload.status for payload in _payloads(store))]


def _payloads(store: FeatureStore) -> list[Payload]:
    """The teachers, and the stored pixels if there are any."""
    return [*store.teachers.values(), *([store.pixels] if store.pixels is not None else [])]


def _nearest(store: FeatureStore, name: str) -> str:
    """The teachers that a name which is none of them may have meant."""
    near = difflib.get_close_matches(name, store.teachers, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"it has: {', '.join(store.teachers) or 'none'}"


def _teacher_remains(store: FeatureStore) -> set[str]:
    """Folders of teachers that the manifest does not name."""
    return {*names(store.path / "teachers")} - {METADATA, *store.teachers}


def _seed_remains(store: FeatureStore, stream: Stream, seed: int, generation: int | None) -> np.ndarray:
    """int64 rows that were views of the seed, and are none."""
    rows = store.removed_rows()
    was = (store.column("stream")[rows] == STREAMS.index(stream)) & (store.column("seed")[rows] == seed)
    if generation is not None:
        was &= store.column("generation")[rows] == generation
    return np.asarray(rows[was])


def _clear(
    store: FeatureStore,
    report: RemovalReport,
    teachers: Collection[str],
    rows: np.ndarray,
    stop: StopFlag,
    progress: Callable[[int, int], None],
    on_step: Step,
) -> None:
    """Frees the disk of `rows` and `teachers`, which the manifest no longer has. The caller owns everything."""
    for name in sorted(teachers):
        report.bytes += discard_teacher(store.path, name)
        on_step(f"teacher {name}")
    if store.pixels is None and has_litter(store.path):
        report.bytes += discard_pixels(store.path)
        on_step("pixels")
    slots: dict[int, list[int]] = {}
    for row in rows.tolist():
        slots.setdefault(row // store.shard_views, []).append(row % store.shard_views)
    for status in _statuses(store):
        for shard in _mark_holes(store, status, slots, report, on_step):
            slots.pop(shard)
    for n, shard in enumerate(slots):
        stop.check(
            "stopped: what was removed is gone; its disk is freed by the same command or the next cache-features"
        )
        try:
            _free_shard(store, shard, slots[shard], report, on_step)
        except ShardDamage as damage:
            report.left.append(f"shard {shard}: {damage}")
        progress(n + 1, len(slots))


def _mark_holes(
    store: FeatureStore, status: StatusArray, slots: Mapping[int, list[int]], report: RemovalReport, on_step: Step
) -> list[int]:
    """Takes the removed rows' words away; the shards whose words are damaged, which stay as they are."""
    dirty: dict[int, np.ndarray] = {}
    damaged: list[int] = []
    for shard, gone in slots.items():
        try:
            words = status.read_shard(shard).copy()
        except StoreCorrupt as error:
            report.left.append(f"shard {shard}: {error}")
            damaged.append(shard)
            continue
        if status.chunk_file(shard).exists() and not (words[gone] == word(HOLE)).all():
            words[gone] = word(HOLE)
            dirty[shard] = words
    store.claims.still_held()
    status.unseal(*dirty)
    on_step("unseal")
    for shard, words in dirty.items():
        store.claims.still_held()
        if len(store.rows_of_shard(shard)):
            status.write_shard(shard, words)
        else:
            remove_file(status.chunk_file(shard))
        on_step(f"status {shard}")
    return damaged


def _free_shard(store: FeatureStore, shard: int, slots: list[int], report: RemovalReport, on_step: Step) -> None:
    store.claims.still_held()
    is_whole = not len(store.rows_of_shard(shard))
    freed = 0
    for teacher in _payloads(store):
        if is_whole and teacher.name in store.teachers:
            remove_file(store.path / "provenance" / teacher.name / f"{shard}.json")
        for array in teacher.arrays:
            file = teacher.path / array.name / shard_name(shard, 1 + len(array.shape))
            if (size := file_bytes(file)) is None:
                continue
            if is_whole:
                freed += size
                remove_file(file)
            else:
                freed += _drop(store, teacher, array.name, file, slots)
            on_step(f"data {shard}")
    report.bytes += freed
    report.shards_deleted += bool(freed) and is_whole
    report.shards_rewritten += bool(freed) and not is_whole


def _drop(store: FeatureStore, teacher: Payload, name: str, file: StorePath, slots: list[int]) -> int:
    node = teacher.path / name
    (array,) = (a for a in teacher.arrays if a.name == name)
    if not same_layout(read_metadata(node), teacher.array_metadata(array, store.n_rows)):
        raise ShardDamage(f"{node} is in another layout than the store's own, so that {file.name} cannot be cut down")
    try:
        return drop_views(file, slots, shard_views=store.shard_views)
    except ShardDamage as damage:
        raise ShardDamage(f"{file}: {damage}; mend it with rsmtdf cache repair, then clear up again") from damage
