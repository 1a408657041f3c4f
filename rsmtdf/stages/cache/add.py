"""Making room for teachers in a store: what their codecs need is measured once, before the first shard."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import numpy as np

from rsmtdf.errors import DatasetError
from rsmtdf.keyed import Draws
from rsmtdf.signals import StopFlag
from rsmtdf.specs import Teacher
from rsmtdf.stages.cache.size import FIXED_BATCH
from rsmtdf.stages.cache.transfer import device_of, pixels_of
from rsmtdf.store.statistics import ChannelStatistics
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import StoredTeacher
from rsmtdf.views.maker import ViewMaker
from rsmtdf.views.view import View

log = logging.getLogger(__name__)

STATISTICS_VIEWS = 256
STATISTICS_RULE = {
    "kind": "welford",
    "views": STATISTICS_VIEWS,
    "sample": "keyed by the store's identity",
    "version": 1,
}
"""Part of a stored teacher's identity (design, section 4)."""


def add_teachers(
    store: FeatureStore,
    *,
    teachers: Mapping[str, Teacher],
    maker: ViewMaker,
    codec: str,
    batch: Literal["auto"] | int,
    stop: StopFlag,
    siblings: Mapping[str, StoredTeacher] | None = None,
) -> None:
    """Makes room for each teacher, with channel statistics over a keyed sample of at most 256 views.

    One process measures while others wait; a teacher that the store has already must have the same identity. Of
    `siblings`, another store's teachers, statistics and their rule are taken over instead.

    Raises:
        StoreMismatch: the store's teacher of that name differs (each field, expected and found).
        DatasetError: not one tile of the sample can be read.
    """
    # Sums over other batches have other last bits: so where it is open, it is the same for every store.
    size = FIXED_BATCH if batch == "auto" else batch
    with store.locked():
        store.refresh()
        for name, teacher in teachers.items():
            sibling = (siblings or {}).get(name)
            rule = STATISTICS_RULE if sibling is None else sibling.statistics.get("rule", {})
            if name in store.teachers:
                store.expect_teacher(teacher.spec, codec, rule=rule)
                continue
            statistics = sibling or _measure(store, name, teacher, maker=maker, batch=size, stop=stop)
            store.add_teacher(teacher.spec, codec=codec, statistics=statistics, rule=rule)


def _measure(
    store: FeatureStore, name: str, teacher: Teacher, *, maker: ViewMaker, batch: int, stop: StopFlag
) -> ChannelStatistics:
    sample = _statistics_rows(store)
    log.info("%s: channel statistics over %d views", name, len(sample))
    statistics = ChannelStatistics(teacher.spec.dim)
    for start in range(0, len(sample), batch):
        stop.check(f"stopped; nothing of {name} is stored yet, run the same command again")
        views = [v for row in sample[start : start + batch] for v in _if_readable(maker, int(row))]
        if views:
            statistics.update(teacher(pixels_of(views, device_of(teacher))))
    if not statistics.views:
        raise DatasetError(f"none of {len(sample)} sampled tiles of {store.data_root} can be read")
    return statistics


def _statistics_rows(store: FeatureStore) -> np.ndarray:
    """A keyed sample of the rows, ascending."""
    rows = np.concatenate([np.arange(s.row_start, s.row_stop) for s in store.segments])
    return np.sort(rows[Draws("statistics", store.identity).permutation(len(rows))[:STATISTICS_VIEWS]])


def _if_readable(maker: ViewMaker, row: int) -> list[View]:
    """The view of `row`, or nothing: a tile that does not open is reported when its shard is made."""
    try:
        return maker.mixed([row])
    except DatasetError:
        return []
