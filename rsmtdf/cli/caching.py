"""The sequence behind `rsmtdf plan` and `rsmtdf cache-features`: data, teachers, plan, store, fill, summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rsmtdf.cli.terminal import Bar, choose_device
from rsmtdf.cli.workspace import Source, Workspace, held_out_of, held_out_record, open_workspace
from rsmtdf.config import Experiment, TeacherConfig
from rsmtdf.data.splits import summary as split_summary
from rsmtdf.errors import ConfigError, DatasetError, StoreNotFound
from rsmtdf.objects import StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.specs import STREAMS, Teacher
from rsmtdf.stages import cache as stage
from rsmtdf.stages.plan import Amounts, Plan, make_plan, resolve_amounts
from rsmtdf.store import places
from rsmtdf.store.codecs import bytes_per_view
from rsmtdf.store.remove import reclaim
from rsmtdf.store.siblings import sibling_statistics
from rsmtdf.store.store import SHARD_VIEWS, FeatureStore
from rsmtdf.teachers.registry import build_teacher, describe, resolve_source
from rsmtdf.teachers.source import TeacherSource
from rsmtdf.vit import build_vit, patch_px

log = logging.getLogger(__name__)

SHOWN = 20
"""Unreadable tiles that the summary names."""


@dataclass(frozen=True)
class CacheJob:
    """What `plan_cache` worked out and `run_cache` carries out."""

    workspace: Workspace
    sources: Mapping[str, TeacherSource]
    plan: Plan
    out: StorePath
    store: FeatureStore | None
    """The existing store, if there is one."""

    def text(self) -> str:
        """The splits and the plan, for a terminal."""
        splits = split_summary(self.workspace.splits, self.workspace.experiment.splits)
        return f"splits     {splits}\n{self.plan.text()}"


def select_teachers(experiment: Experiment, names: Sequence[str] | None) -> Experiment:
    """`experiment` with only the teachers named; a name it lacks is taken as a preset."""
    if not names:
        return experiment
    known = {t.name: t for t in experiment.teachers}
    chosen = tuple(known.get(name) or TeacherConfig(name=name) for name in names)
    return experiment.model_copy(update={"teachers": chosen})


def student_grid(experiment: Experiment) -> tuple[int, int]:
    """The student's patch grid for the training crop."""
    config, crop = experiment.student, experiment.views.crop_px
    with torch.device("meta"):
        vit = build_vit(
            config.backbone, img_px=(config.img_px,) * 2, pos_embed=config.pos_embed, overrides=config.overrides
        )
    patch = patch_px(vit)
    if crop % patch:
        raise ConfigError(
            f"views.crop_px {crop} is no multiple of the student's patch of {patch} px; the nearest is "
            f"{max(round(crop / patch), 1) * patch}"
        )
    return crop // patch, crop // patch


def teacher_sources(experiment: Experiment) -> dict[str, TeacherSource]:
    """Teacher name -> what it is made from.

    Raises:
        ConfigError: no such preset, or a field that fits none.
    """
    return {t.name: resolve_source(_entry(t)) for t in experiment.teachers}


def _entry(teacher: TeacherConfig) -> dict[str, Any]:
    entry = {"name": teacher.name, **teacher.changes()}
    if teacher.library is None or teacher.preset is not None:
        entry["preset"] = teacher.preset or teacher.name
    return entry


def plan_cache(source: Source, *, root: Path, out: StorePath, seconds_per_view: float | None = None) -> CacheJob:
    """Scans the data and says what stage 1 would do. Writes nothing.

    Raises:
        StoreMismatch: `out` is a store of another identity.
        ConfigError: it does not fit the disk.
    """
    experiment = source.experiment
    store = _existing(out, experiment)
    held_out = held_out_of(store.experiment, source) if store else None
    with Bar("scanning tiles", unit="tile") as bar:
        workspace = open_workspace(source, root=root, held_out=held_out, progress=bar.update_to)
    sources = teacher_sources(experiment)
    grid = student_grid(experiment)
    facts = {name: describe(s, student_grid=grid) for name, s in sources.items()}
    sizes = {name: bytes_per_view(experiment.cache.codec, f.tokens, f.dim) for name, f in facts.items()}
    free = places.free_bytes(out)
    pool, labelled = workspace.pool, workspace.labelled
    have = stage.covered(store)

    def additions(a: Amounts) -> list[stage.Addition]:
        return stage.plan_growth(
            have, pool=pool, labelled=labelled, strong_seeds=a.strong_seeds, weak_views=a.weak_views, plain=a.plain
        )

    pending = {name: _pending(store, [name]) for name in sources}
    stored = store.n_views if store else 0
    amounts = resolve_amounts(
        cache=experiment.cache,
        train=experiment.train,
        pool=len(pool),
        labelled=len(labelled),
        bytes_per_view=sizes,
        free_bytes=free,
        done_bytes=sum((stored - n) * sizes[name] for name, n in pending.items()),
        missing=lambda a: sum(new.views for new in additions(a)),
    )
    added = additions(amounts)
    growth = sum(new.views for new in added)
    plan = make_plan(
        amounts=amounts,
        pool=len(pool),
        labelled=len(labelled),
        views=_views_by_stream(store, added),
        new_views=_pending(store, list(sources)) + growth,
        new_features={name: n + growth for name, n in pending.items()},
        bytes_per_view=sizes,
        stored_bytes=places.tree_bytes(out) if store else 0,
        shard_views=store.shard_views if store else SHARD_VIEWS,
        free_bytes=free,
        seconds_per_view=seconds_per_view,
    )
    if free is not None and plan.new_bytes > free:
        raise ConfigError(
            f"{out} would need {plan.new_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there; "
            f"use another disk (--out), fewer --seeds or fewer --weak-views"
        )
    return CacheJob(workspace, sources, plan, out, store)


def run_cache(
    job: CacheJob, *, device: str, stop: StopFlag, say: Callable[[str], None], stats_from: Path | None = None
) -> dict[str, Any]:
    """Carries out the plan: creates or opens the store and computes what is missing. Returns the summary.

    Channel statistics of teachers new to the store are measured, or taken from the store `stats_from`.
    """
    experiment = job.workspace.experiment
    torch_device = choose_device(device)
    grid = student_grid(experiment)
    # These first: images that do not open or a missing weights file must not leave an empty store behind.
    _require_one_readable(job.workspace)
    teachers: dict[str, Teacher] = {
        name: build_teacher(s, student_grid=grid, device=torch_device) for name, s in job.sources.items()
    }
    say(f"teachers   {', '.join(teachers)} on {torch_device}, {_pace(teachers, experiment, job.plan.new_features)}")
    if job.store is not None:  # a teacher that is another one must not change the store's record
        for name in sorted(set(teachers) & set(job.store.teachers)):
            job.store.expect_teacher(teachers[name].spec, experiment.cache.codec)
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
    batch, workers = experiment.cache.batch, experiment.cache.workers
    codec = experiment.cache.codec
    stage.add_teachers(store, teachers=teachers, maker=maker, codec=codec, batch=batch, stop=stop, siblings=siblings)
    _keep_record(store, job)
    with Bar("caching views", unit="view", total=store.pending_views(list(teachers))) as bar:
        report = stage.fill_store(
            store, teachers=teachers, maker=maker, batch=batch, workers=workers, stop=stop, progress=bar.advance
        )
    unreadable = {**job.workspace.unreadable, **report.unreadable}
    return {
        "store": str(job.out),
        **report.as_dict(),
        "limited_by": report.limited_by(workers) if report.views else None,
        "unreadable_tiles": unreadable,
        "left_out_tiles": len(job.workspace.left_out),
        "failed": len(unreadable) > experiment.cache.max_failures,
    }


def summary_text(result: Mapping[str, Any]) -> str:
    """The end-of-run summary of stage 1."""
    lines = []
    if result["views"]:
        gb = result["bytes_written"] / 1e9
        lines.append(
            f"cached     {result['views']:,} views in {result['seconds']:.1f} s ({result['views_per_second']:.1f} "
            f"views/s, {gb:.2f} GB); limited by {result['limited_by']}"
        )
    elif result["unreadable_tiles"]:
        lines.append("cached     nothing: every view is there, but those of unreadable tiles")
    else:
        lines.append("cached     nothing to do: every view is there")
    if result["left_out_tiles"]:
        lines.append(f"left out   {result['left_out_tiles']:,} tiles with too few valid pixels")
    unreadable = result["unreadable_tiles"]
    if unreadable:
        tail = f"; {result['partners_lost']:,} views of other tiles lack a partner" if result["partners_lost"] else ""
        lines.append(f"failed     {len(unreadable):,} tiles cannot be read{tail}; once mended, run this again")
    for tile, reason in list(unreadable.items())[:SHOWN]:
        lines.append(f"unreadable {tile}: {reason}")
    if len(unreadable) > SHOWN:
        lines.append(f"unreadable and {len(unreadable) - SHOWN:,} more (--json lists them all)")
    lines.append(f"next       rsmtdf train --cache {result['store']}")
    return "\n".join(lines)


def _require_one_readable(workspace: Workspace) -> None:
    reason = ""
    for tile in workspace.pool:
        try:
            workspace.dataset.read_image(workspace.tiles[tile])
        except DatasetError as error:
            reason = reason or str(error)
        else:
            return
    if reason:
        raise DatasetError(f"none of the {len(workspace.pool)} tiles can be read: {reason}")


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


def _existing(out: StorePath, experiment: Experiment) -> FeatureStore | None:
    try:
        store = FeatureStore.open(out, writable=True)
    except StoreNotFound:
        return None
    store.expect(recipe=experiment.views, dataset=experiment.dataset)
    return store


def _pending(store: FeatureStore | None, teachers: Sequence[str]) -> int:
    """The views of `store` that one of `teachers` lacks."""
    if store is None:
        return 0
    return store.n_views if any(t not in store.teachers for t in teachers) else store.pending_views(teachers)


def _views_by_stream(store: FeatureStore | None, added: Sequence[stage.Addition]) -> dict[str, int]:
    """Stream -> views that the store has once it has grown."""
    views: dict[str, int] = dict.fromkeys(reversed(STREAMS), 0)
    for segment in store.segments if store else ():
        views[segment.stream] += segment.rows
    for new in added:
        views[new.stream] += new.views
    return views


def _pace(teachers: Mapping[str, Teacher], experiment: Experiment, views: Mapping[str, int]) -> str:
    """A first estimate of the time, from one small batch of each teacher that has views to see, after a warm-up."""
    if not any(views.values()):
        return "nothing to compute"
    side = experiment.views.crop_px
    seconds = total = 0.0
    for name, teacher in teachers.items():
        if not views[name]:
            continue
        pixels = torch.zeros(2, side, side, 3, dtype=torch.uint8, device=getattr(teacher, "device", "cpu"))
        teacher(pixels).sum().item()
        begun = time.perf_counter()
        teacher(pixels).sum().item()
        per_view = (time.perf_counter() - begun) / 2
        seconds += per_view
        total += per_view * views[name]
    return f"about {seconds * 1000:.0f} ms a view: {total / 60:.0f} min" if total > 90 else f"about {total:.0f} s"
