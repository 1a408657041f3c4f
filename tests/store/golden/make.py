"""Made the store beside it, once. It stands for every store out there: later code must read it, so it never changes.

    python tests/store/golden/make.py NEW_FOLDER

A new format gets a new golden store of its own; print the constants of its test with this script too.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from rsmtdf.specs import DatasetSpec, FeatureSpec, ViewRecipe
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.segments import NewSegment
from rsmtdf.store.statistics import ChannelStatistics
from rsmtdf.store.store import FeatureStore

TEACHERS = {"half": "fp16", "byte": "int8"}
TILES = ("river/0_0", "river/0_1", "Zürich/3_10")


def main(path: Path) -> None:
    store = FeatureStore.create(
        path,
        recipe=ViewRecipe(),
        dataset=DatasetSpec(name="golden", classes=("land", "water"), palette=((0, 90, 0), (0, 0, 90))),
        data_root="images",
        experiment={"made by": "tests/store/golden/make.py"},
        shard_views=4,
    )
    store.extend([_weak(), _strong()])
    for name, codec in TEACHERS.items():
        statistics = ChannelStatistics(8)
        statistics.update(torch.stack([feature(row) for row in range(4)]))
        spec = FeatureSpec(
            name=name, library="none", model=name, weights_sha256="0" * 64, input_px=(28, 42), grid=(2, 3), dim=8
        )
        store.add_teacher(spec, codec=codec, statistics=statistics, rule={"views": 4})
    for shard in range(store.n_shards):
        rows = [r for r in store.rows_of_shard(shard).tolist() if r != 5]
        store.write_shard(
            shard,
            view_crcs={r: 1000 + r for r in rows},
            skipped={5: "truncated file"} if shard == 1 else {},
            features={name: torch.stack([feature(r) for r in rows]) for name in TEACHERS},
            provenance={"device": "cpu"},
        )
    store.seal()
    print(json.dumps(frozen(FeatureStore.open(path)), indent=1))


def feature(row: int) -> torch.Tensor:
    """float32 [6, 8], by integer arithmetic: no generator of another version changes it."""
    k = np.arange(48, dtype=np.int64) + 48 * row
    return torch.from_numpy((((k * 7919 + 17) % 1021).astype(np.float32) - 510) / 128).reshape(6, 8)


def frozen(store: FeatureStore) -> dict[str, object]:
    """What the test holds the store to."""
    found: dict[str, object] = {"identity": store.identity}
    rows = np.flatnonzero(store.usable(list(TEACHERS)))
    for name in TEACHERS:
        with FeatureReader(store, name) as reader:
            arrays = dict(reader.get_many(rows))
            decoded = reader.teacher.decode(
                {k: torch.from_numpy(v) for k, v in arrays.items()}, device=torch.device("cpu")
            ).numpy()
        found[name] = {
            "encoded": hashlib.sha256(b"".join(v.tobytes() for v in arrays.values())).hexdigest(),
            "decoded": hashlib.sha256(decoded.astype("<f4").tobytes()).hexdigest(),
            "first": decoded[0, 0, :3].tolist(),
        }
    return found


def _weak() -> NewSegment:
    n = 2 * len(TILES)
    return NewSegment(
        stream="weak",
        seed_start=0,
        seeds=2,
        generation=0,
        tile_ids=TILES,
        columns={"crop_y": np.arange(n, dtype=np.uint16), "blur_radius": np.linspace(0.1, 2.0, n)},
        partner=np.arange(n),
    )


def _strong() -> NewSegment:
    return NewSegment(
        stream="strong",
        seed_start=0,
        seeds=1,
        generation=0,
        tile_ids=TILES[::-1],
        columns={"crop_y": np.full(3, 9, np.uint16), "cut_w": np.array([0, 3, 3], np.uint16)},
        partner=np.array([0, 2, 1]),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
