"""How many views a teacher is shown at a time, where that is left open."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import Literal

import numpy as np
import torch

from rsmtdf.memory import is_out_of_memory
from rsmtdf.specs import Teacher
from rsmtdf.stages.cache.supply import AHEAD
from rsmtdf.stages.cache.transfer import device_of
from rsmtdf.store.codecs import find_codec

log = logging.getLogger(__name__)

FIXED_BATCH = 8
"""Where it is not measured, on the CPU above all: there it may change a feature's last bits, so that a store which goes
on tomorrow must use it again."""
LARGEST_BATCH = 512
GAIN = 1.05
"""What doubling the batch must be worth."""
TRIAL_CODEC = "int8"
"""That a trial encodes with: of what a codec takes on the device, most is the same for all."""


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
    return grown_batch(lambda b: views_per_second(b, teachers, crop_px))


def grown_batch(rate: Callable[[int], float]) -> int:
    """The smallest batch whose double is hardly faster or does not fit into memory.

    Args:
        rate: views per second with batches of that size; raises what PyTorch does when memory runs out.
    """
    best, fastest, ran_out = 1, 0.0, False
    size = FIXED_BATCH // 2
    while size <= LARGEST_BATCH:
        try:
            now = rate(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True
            break
        if now < GAIN * fastest:
            break
        best, fastest = size, now
        size *= 2
    if ran_out:
        _give_back()  # or what is cached stays cut into pieces of a size that nobody asks for again
    log.info("batches of %d views are best here (%.1f views/s)", best, fastest)
    return best


def views_per_second(batch: int, teachers: Mapping[str, Teacher], crop_px: int) -> float:
    """Of all teachers together, encoding included, after a warm-up; with as much on the device as in a run.

    Raises:
        RuntimeError: it does not fit, among others.
    """
    devices = {device_of(teacher) for teacher in teachers.values()}
    # The batch in hand, and those that are sent ahead of it: in a run each holds memory of its own.
    shown = {d: [_blank(batch, crop_px, d) for _ in range(AHEAD + 1)] for d in devices}
    seconds, answers = 0.0, list[Mapping[str, torch.Tensor]]()
    for warm in (False, True, True):
        # While a batch is computed, what came of the one before is on its way to the host.
        before, answers = answers, []
        _wait_for(devices)
        begun = time.perf_counter()
        for teacher in teachers.values():
            dim = teacher.spec.dim
            tokens = teacher(shown[device_of(teacher)][0])
            mean, std = np.zeros(dim, np.float32), np.ones(dim, np.float32)
            answers.append(find_codec(TRIAL_CODEC).encode(tokens, mean=mean, std=std))
        _wait_for(devices)
        seconds += (time.perf_counter() - begun) / 2 if warm else 0.0
        del before
    return batch / seconds


def _blank(batch: int, crop_px: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(batch, crop_px, crop_px, 3, dtype=torch.uint8, device=device)


def _wait_for(devices: Collection[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _give_back() -> None:
    """Memory that PyTorch holds, and nobody uses, to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
