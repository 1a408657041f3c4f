"""Showing views to teachers, in batches that fit into memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from rsmtdf.signals import StopFlag
from rsmtdf.specs import Teacher
from rsmtdf.stages.cache.report import CacheReport
from rsmtdf.views.view import View

log = logging.getLogger(__name__)


def teach(
    views: Sequence[View],
    teachers: Mapping[str, Teacher],
    batch: int,
    report: CacheReport,
    stop: StopFlag,
    *,
    turn: AbstractContextManager[object],
) -> tuple[dict[str, torch.Tensor], int]:
    """Teacher -> tokens float32 [views, tokens, dim] on the CPU; the batch size is halved when memory runs out."""
    begun = time.perf_counter()
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in teachers}
    start = 0
    while start < len(views):
        stop.check("stopped; run the same command again to go on")
        chunk = views[start : start + batch]
        try:
            with turn:
                step = {name: teacher(pixels_of(chunk, device_of(teacher))).cpu() for name, teacher in teachers.items()}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch = max(batch // 2, 1)
            log.warning("out of memory: going on with batches of %d", batch)
            continue
        for name, tokens in step.items():
            parts[name].append(tokens)
        start += len(chunk)
    report.busy["teacher"] += time.perf_counter() - begun
    for name in teachers:
        report.features[name] = report.features.get(name, 0) + len(views)
    # A shard whose tiles are all unreadable has no features, and is committed as skipped all the same.
    empty = {name: torch.empty(0, t.spec.tokens, t.spec.dim) for name, t in teachers.items()}
    return {name: torch.cat(tokens) if tokens else empty[name] for name, tokens in parts.items()}, batch


def pixels_of(views: Sequence[View], device: torch.device) -> torch.Tensor:
    """uint8 [b, c, c, 3] on `device`."""
    return torch.from_numpy(np.stack([v.pixels for v in views])).to(device)


def device_of(teacher: Teacher) -> torch.device:
    """Where a teacher wants its pixels."""
    return getattr(teacher, "device", torch.device("cpu"))
