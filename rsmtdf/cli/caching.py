"""Carrying out what was planned: teachers, store, views to hold, statistics, and the computing itself."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rsmtdf.cli.pacing import pace_line
from rsmtdf.cli.pixels import add_pixels_to
from rsmtdf.cli.planning import CacheJob, student_grid
from rsmtdf.cli.spreading import Scale, fill_over
from rsmtdf.cli.terminal import Bar, choose_device
from rsmtdf.cli.workspace import Source, Workspace, held_out_record
from rsmtdf.config import Experiment
from rsmtdf.data.dataset import Dataset
from rsmtdf.errors import StoreError, StoreNotFound
from rsmtdf.objects import StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.specs import Teacher
from rsmtdf.stages import cache as stage
from rsmtdf.stages.scaleout import piece
from rsmtdf.store.remove import reclaim
from rsmtdf.store.siblings import sibling_statistics
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import StoredTeacher
from rsmtdf.teachers.registry import build_teacher
from rsmtdf.views.maker import ViewMaker

log = logging.getLogger(__name__)


def run_cache(
    job: CacheJob,
    *,
    device: str,
    stop: StopFlag,
    say: Callable[[str], None],
    stats_from: Path | None = None,
    scale: Scale | None = None,
) -> dict[str, Any]:
    """Carries out the plan: creates or opens the store and computes what is missing. Returns the summary.

    Channel statistics of teachers new to the store are measured, or taken from the store `stats_from`. With `scale`,
    the computing is spread over other processes, or is a piece of the whole, or is left to others.
    """
    if scale is not None:
        store, maker = _prepared_for_others(
            job, device=device, stop=stop, say=say, stats_from=stats_from, as_it_is=scale.shard_range is not None
        )
        if scale.init:
            return preparation(store, job)
        experiment, root = job.workspace.experiment, job.workspace.dataset.root
        filled = fill_over(store, experiment, data_root=root, device=device, scale=scale, stop=stop, say=say)
        result = {**result_of(job, filled.report), **filled.facts}
        if store.pixels is not None:
            workers = experiment.cache.workers
            add_pixels_to(result, store, maker, workers=workers, stop=stop, shards=_piece_of(store, scale))
        return result
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
    result = result_of(job, report)
    if store.pixels is not None:
        add_pixels_to(result, store, maker, workers=cache.workers, stop=stop)
    return result


def fill_piece(
    store: FeatureStore,
    source: Source,
    *,
    root: Path,
    device: str,
    stop: StopFlag,
    say: Callable[[str], None],
    scale: Scale,
) -> dict[str, Any]:
    """Fills a piece of a store that is prepared, as it was prepared: nothing is planned or drawn again.

    Where the experiment stores pixels, the store gets room for them, and the piece those of its views that are cached
    already, too.
    """
    experiment = source.experiment
    if experiment.cache.store_pixels:
        store.add_pixels()
    filled = fill_over(store, experiment, data_root=root, device=device, scale=scale, stop=stop, say=say)
    result = {**_summary(store.path, experiment, filled.report, unreadable={}, left_out=0), **filled.facts}
    if store.pixels is not None:
        dataset = Dataset(experiment.dataset, root)
        maker = stage.view_maker(store, reader=dataset, tiles={t.id: t for t in dataset.tiles()})
        workers = experiment.cache.workers
        add_pixels_to(result, store, maker, workers=workers, stop=stop, shards=_piece_of(store, scale))
    return result


def _piece_of(store: FeatureStore, scale: Scale) -> Sequence[int] | None:
    """The shards that are this run's to fill; None: all."""
    if scale.shard_range is None:
        return None
    index, pieces = scale.shard_range
    return piece(store.n_shards, index=index, pieces=pieces)


def is_prepared(store: FeatureStore, experiment: Experiment) -> bool:
    """Whether `store` has views, and room for every teacher of `experiment`."""
    return bool(store.segments) and all(t.name in store.teachers for t in experiment.teachers)


def preparation(store: FeatureStore, job: CacheJob) -> dict[str, Any]:
    """What `--init` made, JSON-ready."""
    return {
        "store": str(store.path),
        "prepared": True,
        "views": store.n_views,
        "shards": store.n_shards,
        "pending_views": store.pending_views(list(job.sources)),
        "teachers": sorted(job.sources),
    }


def _prepared_for_others(
    job: CacheJob,
    *,
    device: str,
    stop: StopFlag,
    say: Callable[[str], None],
    stats_from: Path | None,
    as_it_is: bool,
) -> tuple[FeatureStore, ViewMaker]:
    """The store of `job`, with all its views and teachers, and the maker of its views. No teacher is loaded where the
    store has all of them already.
    """
    have = () if job.store is None else job.store.teachers
    teachers: Mapping[str, Teacher] = {}
    if any(name not in have for name in job.sources):
        teachers = build_teachers(job, device=device, say=say)
    store, maker = prepare_store(job, teachers, stop=stop, stats_from=stats_from, as_it_is=as_it_is)
    del teachers
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the workers are to have the device
    return store, maker


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
    job: CacheJob,
    teachers: Mapping[str, Teacher],
    *,
    stop: StopFlag,
    stats_from: Path | None = None,
    as_it_is: bool = False,
) -> tuple[FeatureStore, ViewMaker]:
    """Everything but the features: the store, its views, room for the teachers with their statistics, the record.

    With `as_it_is`, a store that another process has prepared meanwhile stays as it is.
    """
    specs = {name: t.spec for name, t in teachers.items()}
    siblings = {} if stats_from is None else sibling_statistics(stats_from, specs, job.store)
    store = job.store or _created(job)
    with store.locked():
        store.refresh()  # of several processes that start together, the first prepares and the others find it done
        if as_it_is and is_prepared(store, job.workspace.experiment):
            if job.workspace.experiment.cache.store_pixels:
                store.add_pixels()
            return store, stage.view_maker(store, reader=job.workspace.dataset, tiles=_all_tiles(job.workspace))
        return store, _prepare(store, job, teachers, siblings, stop=stop)


def _created(job: CacheJob) -> FeatureStore:
    experiment = job.workspace.experiment
    try:
        return FeatureStore.create(
            job.out,
            recipe=experiment.views,
            dataset=experiment.dataset,
            data_root=str(job.workspace.dataset.root.resolve()),
            experiment=_record(job),
        )
    except StoreError:
        # Another process may have made it since this one looked.
        with contextlib.suppress(StoreNotFound):
            store = FeatureStore.open(job.out, writable=True)
            store.expect(recipe=experiment.views, dataset=experiment.dataset)
            return store
        raise


def _prepare(
    store: FeatureStore,
    job: CacheJob,
    teachers: Mapping[str, Teacher],
    siblings: Mapping[str, StoredTeacher],
    *,
    stop: StopFlag,
) -> ViewMaker:
    experiment = job.workspace.experiment
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
    if experiment.cache.store_pixels:
        store.add_pixels()
    _keep_record(store, job)
    return maker


def result_of(job: CacheJob, report: stage.CacheReport) -> dict[str, Any]:
    """The summary of a run of stage 1, JSON-ready; `failed` where more tiles are unreadable than allowed."""
    workspace = job.workspace
    return _summary(
        job.out,
        workspace.experiment,
        report,
        unreadable=workspace.unreadable,
        left_out=len(workspace.left_out),
    )


def _summary(
    out: StorePath,
    experiment: Experiment,
    report: stage.CacheReport,
    *,
    unreadable: Mapping[str, str],
    left_out: int,
) -> dict[str, Any]:
    cache, unreadable = experiment.cache, {**unreadable, **report.unreadable}
    return {
        "store": str(out),
        **report.as_dict(),
        "limited_by": report.limited_by if report.views else None,
        "unreadable_tiles": unreadable,
        "left_out_tiles": left_out,
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
