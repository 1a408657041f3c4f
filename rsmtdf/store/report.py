"""What a store tells about itself: progress per teacher, stream and seed, sizes, identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rsmtdf.specs import digest, to_dict
from rsmtdf.store.pixels import bytes_per_view
from rsmtdf.store.places import can_list, sizes, tree_bytes
from rsmtdf.store.segments import padded, shard_runs
from rsmtdf.store.status import DONE, SKIPPED, state_of

if TYPE_CHECKING:
    from rsmtdf.store.store import FeatureStore
    from rsmtdf.store.stored_teacher import StoredTeacher

TYPICAL_ERROR = {"fp16": 0.0002, "int8": 0.0075, "int4": 0.09}
"""Relative error of a codec on features of ViTs, after standardising (reference/store_measurements, section 3)."""


class Progress(NamedTuple):
    """Views of one group."""

    done: int
    skipped: int
    total: int

    @property
    def complete(self) -> bool:
        return self.done + self.skipped == self.total


def completeness(store: FeatureStore) -> dict[str, dict[str, dict[int, Progress]]]:
    """Teacher -> stream -> seed -> progress, over all generations."""
    return {name: _per_seed(store, state_of(store.status(name))) for name in store.teachers}


def info(store: FeatureStore) -> dict[str, Any]:
    """JSON-ready facts about a store."""
    view_states = state_of(store.view_status())
    progress = completeness(store)
    streams = _stream_of_shard(store)
    teachers: dict[str, Any] = {}
    for name, teacher in store.teachers.items():
        state = state_of(store.status(name))
        done, skipped = int((state == DONE).sum()), int((state == SKIPPED).sum())
        rule = teacher.statistics.get("rule")
        teachers[name] = {
            "spec": to_dict(teacher.spec),
            "identity": digest({"feature": teacher.spec.identity(), "codec": teacher.codec, "rule": rule}),
            "codec": teacher.codec,
            "typical_error": _typical_error(teacher),
            "done": done,
            "skipped": skipped,
            "complete": done + skipped == store.n_views,
            "bytes_per_view": teacher.bytes_per_view,
            "bytes": tree_bytes(teacher.path) if can_list(teacher.path) else None,
            "bytes_by_stream": _bytes_by_stream(teacher, streams),
            "statistics": dict(teacher.statistics),
            "streams": {
                stream: {str(seed): p._asdict() for seed, p in seeds.items()}
                for stream, seeds in progress[name].items()
            },
        }
    return {
        "path": str(store.path),
        "identity": store.identity,
        "dataset": store.dataset.name,
        "data_root": store.data_root,
        "versions": dict(store.versions),
        "views": store.n_views,
        "views_made": int((view_states == DONE).sum()),
        "views_skipped": int((view_states == SKIPPED).sum()),
        "views_removed": len(store.removed_rows()),
        "tiles": len(store.tile_ids),
        "shards": store.n_shards,
        "shard_views": store.shard_views,
        # A store without a teacher or without a view has nothing to train from, so it is not complete.
        "complete": bool(teachers) and store.n_views > 0 and all(t["complete"] for t in teachers.values()),
        "sealed": _is_sealed(store),
        "bytes": tree_bytes(store.path) if can_list(store.path) else None,
        "bytes_per_view": {name: t["bytes_per_view"] for name, t in teachers.items()},
        "segments": [to_dict(s) | {"rows": s.rows} for s in store.segments],
        "seeds": [run.as_dict() for run in seed_runs(progress, store)],
        "teachers": teachers,
        "pixels": _pixels(store),
    }


def _pixels(store: FeatureStore) -> dict[str, Any] | None:
    """How far the views' pixels are stored, and what they take; None where the store keeps none."""
    if (pixels := store.pixels) is None:
        return None
    state = state_of(store.pixel_status())
    done, skipped = int((state == DONE).sum()), int((state == SKIPPED).sum())
    return {
        "done": done,
        "skipped": skipped,
        "complete": done + skipped == store.n_views,
        "bytes_per_view": {s: bytes_per_view(pixels.crop_px, s) for s in sorted({s.stream for s in store.segments})},
        "bytes": tree_bytes(pixels.path) if can_list(pixels.path) else None,
    }


@dataclass
class SeedRun:
    """Seeds of a stream, one after another, that are as far as each other for every teacher."""

    stream: str
    first: int
    last: int
    views: int
    """Of all these seeds together."""
    teachers: dict[str, Progress]
    """Of all these seeds together."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "teachers": {name: p._asdict() for name, p in self.teachers.items()}}

    def adopt(self, other: SeedRun) -> bool:
        """Takes the next seed in, if it is as far as these."""
        same = self.stream == other.stream and other.first == self.last + 1
        same &= all(_stage(p) == _stage(other.teachers[name]) != "begun" for name, p in self.teachers.items())
        if same:
            self.last, self.views = other.last, self.views + other.views
            pairs = ((name, p, other.teachers[name]) for name, p in self.teachers.items())
            self.teachers = {n: Progress(*(x + y for x, y in zip(p, q, strict=True))) for n, p, q in pairs}
        return same


def seed_runs(progress: Mapping[str, Mapping[str, Mapping[int, Progress]]], store: FeatureStore) -> list[SeedRun]:
    """Completeness in as few lines as it takes: seeds that are begun and not finished stand alone."""
    totals: dict[tuple[str, int], int] = {}
    for s in store.segments:
        for seed in s.all_seeds:
            totals[s.stream, seed] = totals.get((s.stream, seed), 0) + s.tiles
    runs: list[SeedRun] = []
    for (stream, seed), views in sorted(totals.items()):
        of_seed = {name: streams[stream][seed] for name, streams in progress.items()}
        run = SeedRun(stream, seed, seed, views, of_seed)
        if not (runs and runs[-1].adopt(run)):
            runs.append(run)
    return runs


def _stage(progress: Progress) -> str:
    if progress.complete:
        return "complete"
    return "begun" if progress.done or progress.skipped else "missing"


def _is_sealed(store: FeatureStore) -> bool:
    """Whether the status words of all segments are in the sealed files too, so that the store opens fast."""
    runs = shard_runs(store.segments, store.shard_views)
    statuses = (store.view_status_array, *(t.status for t in store.teachers.values()))
    return bool(runs) and all(set(runs) <= set(status.sealed_ranges()) for status in statuses)


def _stream_of_shard(store: FeatureStore) -> dict[int, str]:
    """Shard -> the stream of its views; segments of different streams share none."""
    per = store.shard_views
    return {
        shard: s.stream for s in store.segments for shard in range(s.row_start // per, padded(s.row_stop, per) // per)
    }


def _bytes_by_stream(teacher: StoredTeacher, streams: Mapping[int, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    if not can_list(teacher.path):
        return found
    for array in teacher.arrays:
        for name, size in sizes(teacher.path / array.name):
            parts = name.split(".")
            if parts[0] == "c" and parts[1].isdigit() and int(parts[1]) in streams:
                stream = streams[int(parts[1])]
                found[stream] = found.get(stream, 0) + size
    return found


def _per_seed(store: FeatureStore, state: np.ndarray) -> dict[str, dict[int, Progress]]:
    found: dict[str, dict[int, Progress]] = {}
    for s in store.segments:
        part = state[s.row_start : s.row_stop].reshape(s.seeds, s.tiles)
        done, skipped = (part == DONE).sum(axis=1).tolist(), (part == SKIPPED).sum(axis=1).tolist()
        seeds = found.setdefault(s.stream, {})
        for k, seed in enumerate(s.all_seeds):
            before = seeds.get(seed, Progress(0, 0, 0))
            seeds[seed] = Progress(before.done + done[k], before.skipped + skipped[k], before.total + s.tiles)
    return found


def _typical_error(teacher: StoredTeacher) -> float | None:
    """Of the coarsest codec that the values went through; None where one is not known."""
    chain = [*teacher.statistics.get("recoded_from", []), teacher.codec]
    known = [TYPICAL_ERROR[codec] for codec in chain if codec in TYPICAL_ERROR]
    return max(known) if len(known) == len(chain) else None
