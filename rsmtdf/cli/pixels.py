"""Stored pixels on the command line: stage 1 adds them, stage 2 says whether it reads them, repair makes them again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from rsmtdf.cli.amounts import count_text, size_text, time_text
from rsmtdf.cli.terminal import Bar
from rsmtdf.config import Experiment
from rsmtdf.signals import StopFlag
from rsmtdf.stages import cache as cache_stage
from rsmtdf.store.pixel_reader import PixelReader
from rsmtdf.store.status import DONE, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.views.maker import ViewMaker


def fill_pixels(
    store: FeatureStore,
    maker: ViewMaker,
    *,
    workers: int,
    stop: StopFlag,
    shards: Collection[int] | None = None,
    keep_going: bool = False,
) -> cache_stage.PixelReport:
    """Stores the pixels that are missing, of all views of `shards` (None: of the store) that are cached, and settles
    the store, which keeps pixels.
    """
    if not (pending := _pending(store, shards)):
        return cache_stage.PixelReport()
    with Bar("storing pixels", unit="view", total=pending) as bar:
        report = cache_stage.store_pixels(
            store,
            maker=maker,
            workers=workers,
            stop=stop,
            shards=shards,
            progress=bar.advance,
            keep_going=keep_going,
        )
    # Of several pieces, the one that comes last seals.
    if shards is None or not _pending(store, None):
        store.seal()
    return report


def add_pixels_to(
    result: dict[str, Any],
    store: FeatureStore,
    maker: ViewMaker,
    *,
    workers: int,
    stop: StopFlag,
    shards: Collection[int] | None = None,
) -> None:
    """Stores the pixels that stage 1 has not stored along with features, everywhere or in a piece of the store, and
    notes in its summary how that went.
    """
    report = fill_pixels(store, maker, workers=workers, stop=stop, shards=shards)
    result["pixels"] = report.as_dict() | {"stored": _stored(store, shards), "missing": _pending(store, shards)}
    result["failed"] = result["failed"] or any(t not in result["unreadable_tiles"] for t in report.unreadable)


def _pending(store: FeatureStore, shards: Collection[int] | None) -> int:
    """How many views are cached and lack their pixels."""
    if shards is None:
        return len(store.pending_pixels())
    return sum(map(len, cache_stage.without_pixels(store, shards, cached_only=True).values()))


def _stored(store: FeatureStore, shards: Collection[int] | None) -> int:
    """How many views have their pixels."""
    if shards is None:
        return int((state_of(store.pixel_status()) == DONE).sum())
    lacking = cache_stage.without_pixels(store, shards)
    return sum(len(store.rows_of_shard(shard)) - len(lacking.get(shard, ())) for shard in shards)


def pixels_text(pixels: Mapping[str, Any]) -> str:
    """The line of stage 1's summary."""
    line = f"pixels     {count_text(pixels['stored'], 'view')} stored"
    if pixels["views"]:
        line += (
            f", {pixels['views']:,} of them made for it in {time_text(pixels['seconds'])}, "
            f"{size_text(pixels['bytes_written'])} written"
        )
    return line + (f"; {count_text(pixels['missing'], 'view')} missing" if pixels["missing"] else "")


def reads_pixels(experiment: Experiment, store: FeatureStore) -> bool:
    """Whether training reads what pixels the store keeps."""
    return experiment.train.stored_pixels == "auto" and store.pixels is not None


def pixels_line(kept: PixelReader, store: FeatureStore) -> str:
    """What training's first screen says of them."""
    rows = np.concatenate([store.rows(stream="strong"), store.rows(stream="weak")])
    share = kept.share(rows)
    if share == 1:
        return "pixels     views are read from the store: no image is decoded for training"
    return (
        f"pixels     {share:.1%} of the views are read from the store, the others made from the images; "
        f"rsmtdf cache-features --store-pixels stores the rest"
    )
