"""The views that every format holds, and an empty store for them: the paper's sizes, surrogate values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rsmtdf.specs import DatasetSpec, FeatureSpec, ViewRecipe
from rsmtdf.store.codecs import CODECS, EncodedArray
from rsmtdf.store.segments import NewSegment
from rsmtdf.store.statistics import ChannelStatistics
from rsmtdf.store.store import FeatureStore

Arrays = dict[str, np.ndarray]
"""Array name -> values [views, ...], as a codec stores them."""

DATASET = DatasetSpec(name="benchmark", classes=("a", "b"), palette=((0, 0, 0), (255, 255, 255)))


def teacher_spec(*, grid: tuple[int, int] = (37, 37), dim: int = 768, name: str = "dinov2_vitb14") -> FeatureSpec:
    """DINOv2-B/14 at 518 px unless told otherwise; CLIP-L/14 at 224 px has a grid of 16 x 16 and 1024 channels."""
    return FeatureSpec(
        name=name, library="surrogate", model=name, weights_sha256="00", input_px=(518, 518), grid=grid, dim=dim
    )


@dataclass(frozen=True, kw_only=True)
class Views:
    """N views of one teacher under one codec, in memory."""

    spec: FeatureSpec
    codec: str
    statistics: ChannelStatistics
    arrays: Arrays

    n: int
    """How many."""

    def __len__(self) -> int:
        return self.n

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.layout)

    def without_values(self) -> Views:
        """The same views as another process may be told of them."""
        return dataclasses.replace(self, arrays={})

    @property
    def layout(self) -> tuple[EncodedArray, ...]:
        return CODECS[self.codec].arrays(self.spec.tokens, self.spec.dim)

    @property
    def view_bytes(self) -> int:
        return sum(a.view_bytes for a in self.layout)

    def buffers(self, n: int) -> Arrays:
        """Memory for `n` views, every page touched."""
        return {a.name: np.ones((n, *a.shape), a.dtype) for a in self.layout}

    def view(self, row: int) -> Arrays:
        return {name: values[row] for name, values in self.arrays.items()}


def make_views(n: int, *, codec: str, spec: FeatureSpec) -> Views:
    """Values with the spread of channels that teachers have; how fast they are read does not depend on them."""
    torch.manual_seed(0)
    spread = torch.linspace(1.0, 0.02, spec.dim)
    statistics = ChannelStatistics(spec.dim)
    parts: dict[str, list[np.ndarray]] = {}
    for k in range(n):
        features = (torch.randn(1, spec.tokens, spec.dim) * spread).to(torch.float16).to(torch.float32)
        if k == 0:
            statistics.update(features)
        encoded = CODECS[codec].encode(features, mean=statistics.mean, std=statistics.std, rows=[k])
        for name, values in encoded.items():
            parts.setdefault(name, []).append(values.numpy())
    return Views(
        n=n,
        spec=spec,
        codec=codec,
        statistics=statistics,
        arrays={name: np.concatenate(values) for name, values in parts.items()},
    )


def make_store(path: Path, views: Views, *, shard_views: int = 64) -> FeatureStore:
    """A store that has rows for `views` and their teacher, and no features yet."""
    store = FeatureStore.create(
        path, recipe=ViewRecipe(), dataset=DATASET, data_root="images", experiment={}, shard_views=shard_views
    )
    n = len(views)
    tiles = NewSegment(
        stream="weak",
        seed_start=0,
        seeds=1,
        generation=0,
        tile_ids=tuple(f"scene/{k}_0" for k in range(n)),
        columns={},
        partner=np.arange(n),
    )
    store.extend([tiles])
    store.add_teacher(views.spec, codec=views.codec, statistics=views.statistics, rule={"views": 1})
    return store


def fill_store(store: FeatureStore, views: Views) -> None:
    """Writes every shard, encoded already, as stage 1 does once the device has encoded."""
    for shard in range(store.n_shards):
        rows = store.rows_of_shard(shard)
        store.write_shard(
            shard,
            view_crcs=dict.fromkeys(rows.tolist(), 0),
            skipped={},
            features={views.spec.name: _slice(views.arrays, rows)},
            provenance={},
        )


def same(found: Mapping[str, object], expected: Arrays) -> bool:
    """Whether two views, or batches of them, are the same bytes."""
    return all(np.asarray(found[name]).tobytes() == values.tobytes() for name, values in expected.items())


def _slice(arrays: Arrays, rows: Sequence[int] | np.ndarray) -> Mapping[str, np.ndarray]:
    return {name: values[rows[0] : rows[-1] + 1] for name, values in arrays.items()}
