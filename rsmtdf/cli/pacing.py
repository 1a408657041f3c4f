"""How long stage 1 and training will take, measured on the device itself before anything is paid for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from rsmtdf.cli.planning import CacheJob, student_grid
from rsmtdf.cli.terminal import choose_device
from rsmtdf.cli.training_pace import measure_training
from rsmtdf.objects import ObjectPath
from rsmtdf.specs import Teacher
from rsmtdf.stages.cache import choose_batch
from rsmtdf.stages.cache.add import STATISTICS_VIEWS
from rsmtdf.stages.plan import Clock, Pace, TrainingPace, draw_sample, measure_pace, now, time_text
from rsmtdf.teachers.registry import build_teacher


def calibrated(job: CacheJob, *, device: str, say: Callable[[str], None]) -> CacheJob:
    """`job` with the time of stage 1 and the cost of training in its plan.

    Teachers get random weights, on which throughput does not depend: nothing is downloaded, and no file is read.

    Raises:
        ConfigError: no such device, or a student that cannot be built.
    """
    torch_device = choose_device(device)
    experiment = job.workspace.experiment
    say(f"measuring  a training step, then views and teachers, on {torch_device} (--no-calibrate does without)")
    # First, because on the CPU its memory is the peak of this process so far.
    training = measure_training(experiment, job.specs, device=torch_device)
    begun = time.perf_counter()
    teachers = {
        name: build_teacher(
            replace(source, weights="random"), student_grid=student_grid(experiment), device=torch_device
        )
        for name, source in job.sources.items()
        if job.plan.new_features[name]
    }
    pace = pace_of(job, teachers, build_seconds=time.perf_counter() - begun)
    return priced(job, pace, training=training)


def pace_line(job: CacheJob, teachers: Mapping[str, Teacher]) -> str:
    """What a run that is about to start says of the time it will take, with the teachers that it has built."""
    if not job.plan.new_views:
        return "nothing to compute"
    due = {name: teacher for name, teacher in teachers.items() if job.plan.new_features[name]}
    return f"about {time_text(priced(job, pace_of(job, due)).plan)}"


def pace_of(job: CacheJob, teachers: Mapping[str, Teacher], *, build_seconds: float = 0.0, clock: Clock = now) -> Pace:
    """What each part of stage 1 costs, on tiles of the job's pool, with those `teachers` that have views to see."""
    workspace, plan = job.workspace, job.plan
    cache, views = workspace.experiment.cache, plan.views
    sample = draw_sample(
        reader=workspace.dataset.with_empty_cache(),
        tiles=workspace.tiles,
        pool=workspace.pool,
        labelled=workspace.labelled,
        recipe=workspace.experiment.views,
        tile_px=workspace.dataset.spec.tile_px,
        weak_share=views["weak"] / max(sum(views.values()), 1),
    )
    return measure_pace(
        sample,
        teachers=teachers,
        codec=cache.codec,
        batch=choose_batch(cache.batch, teachers, crop_px=workspace.experiment.views.crop_px),
        workers=cache.workers,
        folder=_nearest_folder(job),
        shard_bytes=plan.shard_views * max(plan.bytes_per_view.values(), default=1),
        build_seconds=build_seconds,
        clock=clock,
    )


def priced(job: CacheJob, pace: Pace, *, training: TrainingPace | None = None) -> CacheJob:
    """`job` with the time that `pace` makes of its plan."""
    plan, workspace = job.plan, job.workspace
    known = job.store.teachers if job.store is not None else ()
    sample = min(STATISTICS_VIEWS, sum(plan.views.values()))
    used = {*workspace.pool, *workspace.labelled}
    decodes = workspace.dataset.expected_decodes([workspace.tiles[t] for t in used], reads=plan.new_views)
    statistics = {name: sample for name, n in plan.new_features.items() if n and name not in known}
    return replace(job, plan=plan.priced(pace, statistics=statistics, decodes=decodes, training=training))


def _nearest_folder(job: CacheJob) -> Path | None:
    """A folder that exists on the disk of the store; None on an object store."""
    if isinstance(job.out, ObjectPath):
        return None
    path = job.out.absolute()
    while not path.is_dir():
        path = path.parent
    return path
