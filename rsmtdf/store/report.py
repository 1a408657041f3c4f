"""What a store tells about itself: progress per teacher, stream and seed, sizes, identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rsmtdf.objects import StorePath
from rsmtdf.specs import to_dict
from rsmtdf.store.places import sizes
from rsmtdf.store.status import DONE, SKIPPED, state_of

if TYPE_CHECKING:
    from rsmtdf.store.store import FeatureStore


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
    teachers: dict[str, Any] = {}
    for name, teacher in store.teachers.items():
        state = state_of(store.status(name))
        done, skipped = int((state == DONE).sum()), int((state == SKIPPED).sum())
        teachers[name] = {
            "spec": to_dict(teacher.spec),
            "codec": teacher.codec,
            "done": done,
            "skipped": skipped,
            "complete": done + skipped == store.n_views,
            "bytes_per_view": teacher.bytes_per_view,
            "bytes": _bytes(teacher.path),
            "statistics": dict(teacher.statistics),
            "streams": {
                stream: {str(seed): p._asdict() for seed, p in seeds.items()}
                for stream, seeds in _per_seed(store, state).items()
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
        "tiles": len(store.tile_ids),
        "shards": store.n_shards,
        "shard_views": store.shard_views,
        # A store without a teacher or without a view has nothing to train from, so it is not complete.
        "complete": bool(teachers) and store.n_views > 0 and all(t["complete"] for t in teachers.values()),
        "bytes": _bytes(store.path),
        "bytes_per_view": {name: t["bytes_per_view"] for name, t in teachers.items()},
        "segments": [to_dict(s) | {"rows": s.rows} for s in store.segments],
        "teachers": teachers,
    }


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


def _bytes(folder: StorePath) -> int:
    """Bytes of all files below `folder`; files that vanish meanwhile (temporary ones) do not count."""
    return sum(sizes(folder))
