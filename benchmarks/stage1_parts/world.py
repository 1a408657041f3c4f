"""What stage 1 is measured on: PNG tiles of 512 px, a store of their strong views, teachers with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rsmtdf.data.dataset import Dataset
from rsmtdf.signals import StopFlag
from rsmtdf.specs import DatasetSpec, Teacher, ViewRecipe
from rsmtdf.stages import cache
from rsmtdf.store.store import FeatureStore
from rsmtdf.teachers.registry import build_teacher, resolve_source
from rsmtdf.testing.scenes import write_folder

TILE_PX = 512
SCENE_PX = 1024
"""Four tiles an image: as in the data sets, an image is decoded once for several tiles."""
PAPER: Mapping[str, Mapping[str, Any]] = {
    "dinov2_vitb14": {"preset": "dinov2_vitb14"},
    "clip_vitl14": {"preset": "clip_vitl14"},
}
"""The teachers of the paper: DINOv2-B at 518 px, CLIP-L at 224 px."""
SMALL: Mapping[str, Mapping[str, Any]] = {
    "dinov2_vits14": {"library": "timm", "model": "vit_small_patch14_dinov2", "pos_embed": "official"}
}
TINY: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "library": "timm",
        "model": "vit_tiny_patch16_224",
        "overrides": {"patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2},
    }
}


def build_teachers(
    described: Mapping[str, Mapping[str, Any]], *, dtype: str, device: torch.device, crop_px: int
) -> dict[str, Teacher]:
    """Teachers with random weights: how fast they are does not depend on them."""
    grid = (crop_px // 14, crop_px // 14)
    return {
        name: build_teacher(
            resolve_source({"name": name, **fields, "weights": "random", "compute_dtype": dtype}),
            student_grid=grid,
            device=device,
        )
        for name, fields in described.items()
    }


class World:
    """Images, and stores of their views."""

    def __init__(self, folder: Path, *, tiles: int) -> None:
        self.folder = folder
        scenes = max(tiles * TILE_PX**2 // SCENE_PX**2, 1)
        spec: DatasetSpec = write_folder(folder / "data", scenes=scenes, size=(SCENE_PX, SCENE_PX), tile_px=TILE_PX)
        self.dataset = Dataset(spec, folder / "data")
        self.tiles = {tile.id: tile for tile in self.dataset.tiles()}

    def store(
        self, name: str, teachers: Mapping[str, Teacher], *, codec: str, seeds: int, shard_views: int, batch: int
    ) -> tuple[FeatureStore, Any]:
        """A store of `seeds` strong views of every tile, with room for the teachers; and the maker of its views."""
        some = next(iter(teachers.values()))
        store = FeatureStore.create(
            self.folder / name,
            recipe=ViewRecipe(crop_px=some.spec.grid[0] * some.spec.patch_px),
            dataset=self.dataset.spec,
            data_root=str(self.folder / "data"),
            experiment={},
            shard_views=shard_views,
        )
        cache.grow_store(store, pool=sorted(self.tiles), labelled=[], strong_seeds=seeds, weak_views=0, plain=False)
        maker = cache.view_maker(store, reader=self.dataset, tiles=self.tiles)
        for teacher in teachers.values():
            # Measuring statistics is no part of what is timed here.
            store.add_teacher(teacher.spec, codec=codec, statistics=Plain(teacher.spec.dim), rule={})
        return store, maker


class Plain:
    """Statistics of channels that need no scaling."""

    def __init__(self, dim: int) -> None:
        self.mean, self.std = np.zeros(dim, np.float32), np.ones(dim, np.float32)

    def summary(self) -> Mapping[str, Any]:
        return {}


def fill(store: FeatureStore, teachers: Mapping[str, Teacher], maker: Any, **given: Any) -> cache.CacheReport:
    return cache.fill_shards(store, teachers=teachers, maker=maker, stop=StopFlag(), **given)
