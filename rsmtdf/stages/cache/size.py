"""How many views a teacher is shown at a time, where that is left open."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Literal

import torch

from rsmtdf.specs import Teacher
from rsmtdf.stages.cache.teach import is_out_of_memory
from rsmtdf.stages.cache.transfer import device_of

log = logging.getLogger(__name__)

FIXED_BATCH = 8
"""Where it is not measured, on the CPU above all: there it may change a feature's last bits, so that a store which goes
on tomorrow must use it again; and more is no faster (benchmarks/stage1.py --batch)."""
LARGEST_BATCH = 512
GAIN = 1.05
"""What doubling the batch must be worth: memory is also for pixels and features on their way."""


def choose_batch(batch: Literal["auto"] | int, teachers: Mapping[str, Teacher], *, crop_px: int) -> int:
    """`batch`, or if it is `auto`, what the teachers' device does best with.

    On a GPU, batches are tried there, each twice as large, until one is hardly faster than the one before or does not
    fit. Elsewhere it is always `FIXED_BATCH`. Choose once for a device: it takes seconds.

    Args:
        batch: what was asked for.
        teachers: name -> teacher, all of whom see each batch.
        crop_px: side of the views.
    """
    if batch != "auto":
        return batch
    devices = {device_of(teacher) for teacher in teachers.values()}
    if not devices or any(device.type != "cuda" for device in devices):
        return FIXED_BATCH
    return grown_batch(lambda b: _views_per_second(b, teachers, crop_px))


def grown_batch(rate: Callable[[int], float]) -> int:
    """The smallest batch whose double is hardly faster or does not fit into memory.

    Args:
        rate: views per second with batches of that size; raises what PyTorch does when memory runs out.
    """
    best, fastest = 1, 0.0
    size = FIXED_BATCH // 2
    while size <= LARGEST_BATCH:
        try:
            now = rate(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        if now < GAIN * fastest:
            break
        best, fastest = size, now
        size *= 2
    log.info("batches of %d views are best here (%.1f views/s)", best, fastest)
    return best


def _views_per_second(batch: int, teachers: Mapping[str, Teacher], crop_px: int) -> float:
    """Of all teachers together, after a warm-up."""
    seconds = 0.0
    for teacher in teachers.values():
        device = device_of(teacher)
        pixels = torch.zeros(batch, crop_px, crop_px, 3, dtype=torch.uint8, device=device)
        for warm in (False, True, True):
            torch.cuda.synchronize(device)
            begun = time.perf_counter()
            teacher(pixels)
            torch.cuda.synchronize(device)
            seconds += (time.perf_counter() - begun) / 2 if warm else 0.0
    return batch / seconds
