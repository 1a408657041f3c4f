"""What workers of `control_plane.py` import: a store whose features are tiny, and a task that fills shards of it.

Pixels are 2 x 2 and features one token of four numbers, so that what is left is what every view costs besides its
pixels and its teachers: tasks, claims, files, checksums, status words.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rsmtdf.signals import StopFlag
from rsmtdf.specs import DatasetSpec, FeatureSpec, Tile, ViewRecipe
from rsmtdf.stages import cache as stage
from rsmtdf.store.statistics import ChannelStatistics
from rsmtdf.store.store import FeatureStore
from rsmtdf.views.maker import ViewMaker
from rsmtdf.views.view import View

SEEDS = 10
SPEC = FeatureSpec(name="fake", library="fake", model="none", weights_sha256="00", input_px=(2, 2), grid=(1, 1), dim=4)
DATASET = DatasetSpec(name="fake", classes=("a", "b"), palette=((0, 0, 0), (255, 255, 255)), tile_px=64)


@dataclass(frozen=True)
class Done:
    worker: int
    seconds: float
    views: int
    refused: str | None = None


class FakeTeacher:
    spec = SPEC

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.reshape(len(pixels), 1, -1)[..., :4].float()


class FakeReader:
    def read_image(self, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    read_label = read_image


class FakeMaker(ViewMaker):
    """Views without images: every row has other pixels."""

    def attempted(self, rows: Sequence[int]) -> list[View]:
        return [self._fake(row) for row in rows]

    @staticmethod
    def _fake(row: int) -> View:
        pixels = np.frombuffer(np.array([row, row, row], "<u4").tobytes(), np.uint8).reshape(2, 2, 3)
        return View(pixels, np.ones((2, 2), bool))


def prepare(path: Path | str, views: int) -> None:
    """A store with `views` views of `views / SEEDS` tiles, and nothing computed."""
    store = FeatureStore.create(path, recipe=ViewRecipe(crop_px=14), dataset=DATASET, data_root="images", experiment={})
    pool = [f"scene{k // 1000:05d}/{k % 1000 // 32}_{k % 32}" for k in range(views // SEEDS)]
    stage.grow_store(store, pool=pool, labelled=(), strong_seeds=SEEDS, weak_views=0, plain=False)
    statistics = ChannelStatistics(SPEC.dim)
    statistics.update(torch.randn(16, 1, SPEC.dim, generator=torch.Generator().manual_seed(0)))
    store.add_teacher(SPEC, codec="fp16", statistics=statistics, rule={"views": 16})


@functools.lru_cache(1)
def opened(path: str) -> tuple[FeatureStore, ViewMaker]:
    store = FeatureStore.open(path, writable=True)
    tiles = {t: Tile(t, "", None, 0, 0, 64, 64) for t in store.tile_ids}
    maker = stage.view_maker(store, reader=FakeReader(), tiles=tiles)
    maker.__class__ = FakeMaker
    return store, maker


LOCK = threading.Lock()


def fill(path: str, shards: tuple[int, ...], device: str, stop: StopFlag) -> Done:
    """The same `fill_shards` as in earnest."""
    del device
    with LOCK:
        store, maker = opened(path)
    report = stage.fill_shards(
        store, teachers={"fake": FakeTeacher()}, maker=maker, batch=64, workers=1, stop=stop, shards=shards
    )
    return Done(os.getpid(), report.seconds, report.views)
