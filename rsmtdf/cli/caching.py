"""Carrying out what was planned: teachers, store, views to hold, statistics, and the computing itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rsmtdf.cli.pacing import pace_line
from rsmtdf.cli.planning import CacheJob, student_grid
from rsmtdf.cli.terminal import Bar, choose_device
from rsmtdf.cli.workspace import Workspace, held_out_record
from rsmtdf.signals import StopFlag
from rsmtdf.specs import Teacher
from rsmtdf.stages import cache as stage
from rsmtdf.store.remove import reclaim
from rsmtdf.store.siblings import sibling_statistics
from rsmtdf.store.store import FeatureStore
from rsmtdf.teachers.registry import build_teacher
from rsmtdf.views.maker import ViewMaker

log = logging.getLogger(__name__)


def run_cache(
    job: CacheJob, *, device: str, stop: StopFlag, say: Callable[[str], None], stats_from: Path | None = None
) -> dict[str, Any]:
    """Carries out the plan: creates or opens the store and computes what is missing. Returns the summary.

    Channel statistics of teachers new to the store are measured, or taken from the store `stats_from`.
    """
    teachers = build_teachers(job, device=device, say=say)
    store, maker = prepare_store(job, teachers, stop=stop, stats_from=stats_from)
    cache = job.workspace.experiment.cache
    with Bar("caching views", unit="view", total=store.pending_views(list(teachers))) as bar:
        report = stage.fill_store(
            store,
            teachers=teachers,
            maker=maker,
            batch=cache.batch,
            workers=cache.workers,
            stop=stop,
            progress=bar.advance,
        )
    return result_of(job, report)


def build_teachers(job: CacheJob, *, device: str, say: Callable[[str], None]) -> dict[str, Teacher]:
    """The job's teachers, on `device`. Writes nothing: a missing weights file or a teacher that is another one than
    the store's must not leave a trace.

    Raises:
        TeacherError: weights cannot be had or do not fit.
        StoreMismatch: the store has another teacher of that name.
    """
    experiment = job.workspace.experiment
    torch_device = choose_device(device)
    grid = student_grid(experiment)
    teachers: dict[str, Teacher] = {
        name: build_teacher(s, student_grid=grid, device=torch_device) for name, s in job.sources.items()
    }
    say(f"teachers   {', '.join(teachers)} on {torch_device}, {pace_line(job, teachers)}")
    if job.store is not None:
        for name in sorted(set(teachers) & set(job.store.teachers)):
            job.store.expect_teacher(teachers[name].spec, experiment.cache.codec)
    return teachers


def prepare_store(
    job: CacheJob, teachers: Mapping[str, Teacher], *, stop: StopFlag, stats_from: Path | None = None
) -> tuple[FeatureStore, ViewMaker]:
    """Everything but the features: the store, its views, room for the teachers with their statistics, the record."""
    experiment = job.workspace.experiment
    specs = {name: t.spec for name, t in teachers.items()}
    siblings = {} if stats_from is None else sibling_statistics(stats_from, specs, job.store)
    store = job.store or FeatureStore.create(
        job.out,
        recipe=experiment.views,
        dataset=experiment.dataset,
        data_root=str(job.workspace.dataset.root.resolve()),
        experiment=_record(job),
    )
    if (cleared := reclaim(store, stop=stop)) and cleared.left:
        log.warning("views that were removed still take up disk: %s", "; ".join(cleared.left))
    amounts = job.plan.amounts
    stage.grow_store(
        store,
        pool=job.workspace.pool,
        labelled=job.workspace.labelled,
        strong_seeds=amounts.strong_seeds,
        weak_views=amounts.weak_views,
        plain=amounts.plain,
    )
    maker = stage.view_maker(store, reader=job.workspace.dataset, tiles=_all_tiles(job.workspace))
    stage.add_teachers(
        store,
        teachers=teachers,
        maker=maker,
        codec=experiment.cache.codec,
        batch=experiment.cache.batch,
        stop=stop,
        siblings=siblings,
    )
    _keep_record(store, job)
    return store, maker


def result_of(job: CacheJob, report: stage.CacheReport) -> dict[str, Any]:
    """The summary of a run of stage 1, JSON-ready; `failed` where more tiles are unreadable than allowed."""
    cache = job.workspace.experiment.cache
    unreadable = {**job.workspace.unreadable, **report.unreadable}
    return {
        "store": str(job.out),
        **report.as_dict(),
        "limited_by": report.limited_by(cache.workers) if report.views else None,
        "unreadable_tiles": unreadable,
        "left_out_tiles": len(job.workspace.left_out),
        "failed": len(unreadable) > cache.max_failures,
    }


def _record(job: CacheJob) -> dict[str, Any]:
    """The experiment for the store to keep."""
    workspace = job.workspace
    held_out = held_out_record(workspace)
    return {**workspace.source.as_dict(), "left_out": list(workspace.left_out), "held_out": held_out}


def _keep_record(store: FeatureStore, job: CacheJob) -> None:
    """Writes down what a later `train --cache` starts from: the newest labels, classes, lists and place of the images,
    none of them in the identity, and the teachers that the store has, those cached under other settings too.
    """
    with store.locked():
        store.refresh()  # another process may have added a teacher since
        record = _record(job)
        mine = {t["name"]: t for t in record["config"]["teachers"]}
        before = [t for t in store.experiment["config"]["teachers"] if t["name"] not in mine]
        record["config"]["teachers"] = [t for t in [*before, *mine.values()] if t["name"] in store.teachers]
        store.amend(
            dataset=job.workspace.experiment.dataset,
            data_root=str(job.workspace.dataset.root.resolve()),
            experiment=record,
        )


def _all_tiles(workspace: Workspace) -> dict[str, Any]:
    """Also tiles outside this experiment's lists: a store may hold views of more than one label set."""
    return {t.id: t for t in workspace.dataset.tiles()}
