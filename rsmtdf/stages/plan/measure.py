"""A short calibration: every part of stage 1 is timed on real tiles, a few seconds in all, and nothing is left behind.

The parts are timed one after the other, so each has the machine to itself; what happens when they share it is
`Pace.estimate`'s to say.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from rsmtdf.errors import DatasetError, TeacherError
from rsmtdf.memory import is_out_of_memory
from rsmtdf.specs import Teacher
from rsmtdf.stages.plan.pace import Cost, Pace
from rsmtdf.stages.plan.sample import Sample
from rsmtdf.store.codecs import find_codec
from rsmtdf.views.view import View

Clock = Callable[[], tuple[float, float]]
"""(elapsed seconds, CPU seconds of this process), each from any origin."""

TEACHER_SECONDS = 3.0
"""Spent on each teacher, after its warm-up."""
MAX_BATCHES = 8
TRIAL_BYTES = 32 * 10**6
"""Of the file that is written, at most: a shard of the paper's teachers is 85 MB in int8."""


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def measure_pace(
    sample: Sample,
    *,
    teachers: Mapping[str, Teacher],
    codec: str,
    batch: int,
    workers: int,
    folder: Path | None,
    shard_bytes: int,
    build_seconds: float = 0.0,
    clock: Clock = now,
) -> Pace:
    """What each part costs here and now.

    Args:
        sample: the views to make; its reader has decoded none of their images yet.
        teachers: on the device they will run on; with any weights.
        codec: of the features.
        batch: views shown to a teacher at a time.
        workers: threads that make views.
        folder: on the disk that the store will be on; None: writing is not timed.
        shard_bytes: of a typical file.
        build_seconds: that building the teachers took.
        clock: tells the time.

    Raises:
        DatasetError: not one view of the sample can be made.
        TeacherError: not one view at a time fits into memory.
    """
    decode, view, views = _time_views(sample, workers=workers, clock=clock)
    shown, costs, encode = batch, {}, {}
    for name, teacher in teachers.items():
        try:
            costs[name], encode[name], size = _time_teacher(teacher, views, codec=codec, batch=batch, clock=clock)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TeacherError(
                f"not even one view at a time fits into the memory of {_device(teacher)} with {name}: {error}. "
                "Free memory that other programs hold, compute in --precision bfloat16, or take another --device"
            ) from error
        shown = min(shown, size)
    write, read = (None, None) if folder is None else _time_disk(folder, min(shard_bytes, TRIAL_BYTES), clock)
    return Pace(
        device=", ".join(sorted({str(_device(t)) for t in teachers.values()})),
        cores=usable_cores(),
        workers=workers,
        batch=shown,
        view=view,
        decode=decode,
        teachers=costs,
        encode=encode,
        write=write,
        read_bytes_per_second=read,
        build_seconds=build_seconds,
    )


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(len(os.sched_getaffinity(0)), 1)
    return os.cpu_count() or 1


def _time_views(sample: Sample, *, workers: int, clock: Clock) -> tuple[Cost, Cost, list[View]]:
    """What decoding a scene adds, what a view costs, and the views."""
    maker = sample.maker
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="calibration") as pool:
        cold = _timed(lambda: list(pool.map(maker.why_unreadable, sample.tiles)), clock)
        warm = _timed(lambda: list(pool.map(maker.why_unreadable, sample.tiles)), clock)
        # The first views would also pay for what libraries set up when they are first called.
        list(pool.map(maker.attempted, sample.units[:2]))
        made: list[View] = []

        def make() -> None:
            for outcome in pool.map(maker.attempted, sample.units):
                made.extend(view for view in outcome if isinstance(view, View))

        spent = _timed(make, clock)
    if not made:
        reason = next(filter(None, map(maker.why_unreadable, sample.tiles)), "")
        raise DatasetError(f"none of {len(sample.tiles)} tiles, drawn for a calibration, can be read: {reason}")
    n = len(sample.tiles)
    decode = Cost(wall=max(cold.wall - warm.wall, 0.0) / n, cpu=max(cold.cpu - warm.cpu, 0.0) / n)
    return decode, _per(spent, len(made)), made


def _time_teacher(
    teacher: Teacher, views: Sequence[View], *, codec: str, batch: int, clock: Clock
) -> tuple[Cost, Cost, int]:
    """What a forward pass and what encoding cost per view, and the batch they were timed with."""
    device = _device(teacher)
    pixels = np.stack([view.pixels for view in views])

    def show(n: int) -> torch.Tensor:
        chosen = torch.from_numpy(pixels[np.arange(n) % len(pixels)])
        tokens = teacher(chosen.to(device))
        tokens[-1, -1, -1].item()  # waits for the device
        return tokens

    arrays = find_codec(codec)
    mean, std = np.zeros(teacher.spec.dim, np.float32), np.ones(teacher.spec.dim, np.float32)

    def encode(tokens: torch.Tensor) -> None:
        for array in arrays.encode(tokens, mean=mean, std=std).values():
            array.cpu()

    size = batch
    if device.type == "cpu":
        # A batch of 8 can take 10 s there, and a view costs about the same in smaller ones.
        one = _timed(lambda: show(1), clock)
        size = max(min(batch, int(TEACHER_SECONDS / max(one.wall, 1e-9))), 1)
    else:
        size = _fitting(lambda n: encode(show(n)), batch)
    passes: list[Cost] = []
    encodings: list[Cost] = []
    begun = clock()[0]
    while len(passes) < 2 or (len(passes) < MAX_BATCHES and clock()[0] - begun < TEACHER_SECONDS):
        held: list[torch.Tensor] = []
        passes.append(_timed(lambda held=held: held.append(show(size)), clock))  # type: ignore[misc]
        (tokens,) = held
        encodings.append(_timed(lambda tokens=tokens: encode(tokens), clock))  # type: ignore[misc]
    return _median(passes, size), _median(encodings[1:], size), size


def _fitting(trial: Callable[[int], object], batch: int) -> int:
    """The largest of `batch`, its half, its quarter, ... that memory allows; as stage 1 finds it. Warms up."""
    while True:
        try:
            trial(batch)
        except RuntimeError as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
            batch = max(batch // 2, 1)
        else:
            return batch


def _time_disk(folder: Path, size: int, clock: Clock) -> tuple[Cost | None, float | None]:
    """What a byte costs to write and sync, and bytes read per second, in a file without a name that vanishes."""
    data = np.random.Philox(key=0).random_raw(max(size // 8, 1)).tobytes()  # nothing that a disk could compress
    try:
        with tempfile.TemporaryFile(dir=folder) as file:

            def write() -> None:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

            written = _timed(write, clock)
            with contextlib.suppress(OSError, AttributeError):  # not on macOS
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.seek(0)
                read = _timed(file.read, clock)
                return _per(written, len(data)), len(data) / max(read.wall, 1e-9)
            return _per(written, len(data)), None
    except OSError:
        return None, None  # whether the store can be written there is for stage 1 to find out, and to say


def _timed(work: Callable[[], object], clock: Clock) -> Cost:
    begun = clock()
    work()
    ended = clock()
    return Cost(wall=ended[0] - begun[0], cpu=ended[1] - begun[1])


def _per(spent: Cost, n: int) -> Cost:
    return Cost(wall=spent.wall / n, cpu=spent.cpu / n)


def _median(spent: Sequence[Cost], n: int) -> Cost:
    return Cost(
        wall=statistics.median(c.wall for c in spent) / n,
        cpu=statistics.median(c.cpu for c in spent) / n,
    )


def _device(teacher: Teacher) -> torch.device:
    return getattr(teacher, "device", torch.device("cpu"))
