"""Small stores with known contents: what a row holds is a function of the row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rsmtdf.specs import DatasetSpec, FeatureSpec, ViewRecipe
from rsmtdf.store.segments import NewSegment
from rsmtdf.store.statistics import ChannelStatistics
from rsmtdf.store.store import FeatureStore

PER = 4


class Kit:
    """Makes stores, segments and features for tests."""

    per = PER
    recipe = ViewRecipe()
    dataset = DatasetSpec(name="toy", classes=("a", "b"), palette=((0, 0, 0), (255, 255, 255)))

    def spec(self, name: str = "t", **changes) -> FeatureSpec:
        fields = {
            "library": "fake",
            "model": "random",
            "weights_sha256": "00",
            "input_px": (28, 42),
            "grid": (2, 3),
            "dim": 8,
        }
        return FeatureSpec(name=name, **(fields | changes))

    def create(self, path: Path, **changes) -> FeatureStore:
        fields = {"recipe": self.recipe, "dataset": self.dataset, "data_root": "images", "experiment": {"n": 1}}
        return FeatureStore.create(path, shard_views=PER, **(fields | changes))

    def weak(self, tiles: int = 5, *, seeds: int = 2, start: int = 0, first_tile: int = 0, generation: int = 0):
        n = tiles * seeds
        return NewSegment(
            stream="weak",
            seed_start=start,
            seeds=seeds,
            generation=generation,
            tile_ids=tuple(f"scène/{k}_0" for k in range(first_tile, first_tile + tiles)),
            columns={"scale": np.linspace(0.5, 2, n), "flip": np.arange(n) % 2 == 0},
            partner=np.arange(n),
        )

    def strong(self, tiles: int = 5, *, seed: int = 0, generation: int = 0, first_tile: int = 0):
        partner = np.arange(tiles) ^ 1
        partner[partner >= tiles] = tiles - 1
        return NewSegment(
            stream="strong",
            seed_start=seed,
            seeds=1,
            generation=generation,
            tile_ids=tuple(f"scène/{k}_0" for k in reversed(range(first_tile, first_tile + tiles))),
            columns={"scale": np.ones(tiles), "blur": np.full(tiles, 0.25, np.float32)},
            partner=partner,
        )

    def statistics(self, dim: int = 8) -> ChannelStatistics:
        found = ChannelStatistics(dim)
        found.update(torch.stack([self.feature("stats", row, (6, dim)) for row in range(4)]))
        return found

    def add_teacher(self, store: FeatureStore, name: str = "t", *, codec: str = "fp16", **changes) -> None:
        spec = self.spec(name, **changes)
        store.add_teacher(spec, codec=codec, statistics=self.statistics(spec.dim), rule={"views": 4})

    def feature(self, teacher: str, row: int, shape: tuple[int, int] = (6, 8)) -> torch.Tensor:
        """float32, exactly representable in half precision."""
        seed = row * 1000 + sum(teacher.encode())
        x = np.random.default_rng(seed).standard_normal(shape)
        return torch.from_numpy(x.astype(np.float16).astype(np.float32))

    def crc(self, row: int) -> int:
        return (row * 2654435761) & 0xFFFFFFFF

    def write(self, store: FeatureStore, shard: int, teachers=("t",), *, skipped=(), **changes) -> int:
        rows = [r for r in store.rows_of_shard(shard).tolist() if r not in skipped]
        features = {}
        for name in teachers:
            spec = store.teacher(name).spec
            parts = [self.feature(name, r, (spec.tokens, spec.dim)) for r in rows]
            features[name] = torch.stack(parts) if parts else torch.empty(0, spec.tokens, spec.dim)
        fields = {
            "view_crcs": {r: self.crc(r) for r in rows},
            "skipped": dict.fromkeys(skipped, "truncated file"),
            "features": features,
            "provenance": {"device": "cpu"},
        }
        return store.write_shard(shard, **(fields | changes))

    def fill(self, store: FeatureStore, teachers=("t",)) -> list[int]:
        """Writes what is missing; the shards written."""
        shards = store.missing_shards(teachers)
        for shard in shards:
            self.write(store, shard, teachers)
        return shards

    def full(self, path: Path, *, codec: str = "fp16") -> FeatureStore:
        """18 views in 6 shards: weak, 5 tiles x 2 seeds; strong, 5 tiles; strong, 3 more: all done."""
        store = self.create(path)
        store.extend([self.weak(), self.strong(), self.strong(3, generation=1, first_tile=5)])
        self.add_teacher(store, codec=codec)
        self.fill(store)
        return store

    def rows(self, store: FeatureStore) -> np.ndarray:
        return np.concatenate([np.arange(s.row_start, s.row_stop) for s in store.segments])


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "feats.zarr"
