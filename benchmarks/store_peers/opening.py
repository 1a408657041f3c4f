"""Opening a store of 10^6 views, and one epoch's index: seconds, and memory over the bare interpreter with imports.

The store has every row, column and status word that a real one has, and no features: opening reads none.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from rsmtdf.learning.sampler import Schedule
from rsmtdf.specs import ViewRecipe
from rsmtdf.store.arrays import encode_chunk
from rsmtdf.store.queries import strong_pairs, weak_rows
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.segments import NewSegment
from rsmtdf.store.statistics import ChannelStatistics
from rsmtdf.store.status import DONE, word
from rsmtdf.store.store import FeatureStore
from rsmtdf.views.matching import match_pool
from rsmtdf.views.params import PARAM_DTYPE, draw_table
from store_peers.views import DATASET, teacher_spec

TEACHERS = {"dinov2_vitb14": ((37, 37), 768), "clip_vitl14": ((16, 16), 1024)}
WEAK_VIEWS = 100


def make_large_store(path: Path, *, tiles: int, seeds: int, labelled: int) -> FeatureStore:
    """`seeds` strong views of every tile and 100 weak ones of each labelled tile, all of them done, none sealed."""
    recipe = ViewRecipe()
    store = FeatureStore.create(path, recipe=recipe, dataset=DATASET, data_root="images", experiment={})
    ids = [f"scene_{k // 100:04d}/{k % 100 // 10}_{k % 10}" for k in range(tiles)]
    # One seed's parameters serve all: drawing 10^6 takes minutes and changes nothing here.
    table = draw_table(recipe, tile_ids=ids, tile_px=512, stream="strong", seed=0)
    columns = {name: table[name] for name in PARAM_DTYPE.names or ()}
    new: list[NewSegment] = []
    for seed in range(seeds):
        order, partner = match_pool(recipe, tile_ids=ids, stream="strong", seed=seed, generation=0)
        new.append(
            NewSegment(
                stream="strong",
                seed_start=seed,
                seeds=1,
                generation=0,
                tile_ids=tuple(ids[k] for k in order),
                columns=columns,
                partner=partner,
            )
        )
    weak = labelled * WEAK_VIEWS
    new.append(
        NewSegment(
            stream="weak",
            seed_start=0,
            seeds=WEAK_VIEWS,
            generation=0,
            tile_ids=tuple(ids[:labelled]),
            columns={name: np.resize(values, weak) for name, values in columns.items()},
            partner=np.arange(weak),
        )
    )
    store.extend(new)
    for name, (grid, dim) in TEACHERS.items():
        statistics = ChannelStatistics(dim)
        store.add_teacher(teacher_spec(grid=grid, dim=dim, name=name), codec="int8", statistics=statistics)
    for array in (store.view_status_array, *(t.status for t in store.teachers.values())):
        words = np.full(store.n_rows, word(DONE, 12345), np.uint64)
        words[~_real(store)] = store.view_status()[~_real(store)]
        for shard, part in enumerate(words.reshape(-1, store.shard_views)):
            # As `write_shard` does, but for the fsync: 47 000 of them measure the disk.
            array.chunk_file(shard).write_bytes(encode_chunk(part))
    return store


def measure_opening(path: Path) -> dict[str, Any]:
    """What `open_and_index` says of itself in an interpreter of its own, which has imported no peers."""
    command = [sys.executable, "-m", "store_peers.opening", str(path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def open_and_index(path: Path) -> dict[str, Any]:
    """Opens the store and both teachers' readers, then makes the index of an epoch; seconds and MB of each."""
    _reset_peak()
    base = _memory_mb("VmRSS")
    begun = time.perf_counter()
    store = FeatureStore.open(path)
    readers = [FeatureReader(store, name) for name in store.teachers]
    opened, opened_mb = time.perf_counter(), _memory_mb("VmHWM")
    usable = store.usable(list(store.teachers))
    pool = list(store.tile_ids)
    labelled = [pool[k] for k in np.unique(store.column("tile")[store.rows(stream="weak")]).tolist()]
    pairs, weak = strong_pairs(store, pool, usable), weak_rows(store, labelled, usable)
    schedule = Schedule(pairs=pairs, weak=weak, batch=32, seed=0)
    schedule.rows(0)
    indexed, indexed_mb = time.perf_counter(), _memory_mb("VmHWM")
    for reader in readers:
        reader.close()
    return {
        "views": store.n_views,
        "open_s": opened - begun,
        "index_s": indexed - opened,
        "interpreter_mb": base,
        "open_peak_mb": opened_mb,
        "peak_mb": indexed_mb,
    }


def _real(store: FeatureStore) -> np.ndarray:
    real = np.zeros(store.n_rows, bool)
    for s in store.segments:
        real[s.row_start : s.row_stop] = True
    return real


def _reset_peak() -> None:
    """Makes VmHWM count from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _memory_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    print(json.dumps(open_and_index(Path(sys.argv[1]))))
