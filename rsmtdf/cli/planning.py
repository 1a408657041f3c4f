"""The sequence behind `rsmtdf plan`, with which stage 1 begins: data, splits, teachers, and what is to be computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rsmtdf.cli.terminal import Bar
from rsmtdf.cli.workspace import Source, Workspace, held_out_of, open_workspace
from rsmtdf.config import Experiment, TeacherConfig
from rsmtdf.data.splits import summary as split_summary
from rsmtdf.errors import ConfigError, StoreNotFound
from rsmtdf.objects import StorePath
from rsmtdf.specs import STREAMS
from rsmtdf.stages import cache as stage
from rsmtdf.stages.plan import Amounts, Plan, make_plan, resolve_amounts
from rsmtdf.store import places
from rsmtdf.store.codecs import bytes_per_view
from rsmtdf.store.store import SHARD_VIEWS, FeatureStore
from rsmtdf.teachers.registry import describe, resolve_source
from rsmtdf.teachers.source import TeacherSource
from rsmtdf.vit import build_vit, patch_px


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
    return {t.name: resolve_source({**_entry(t), "compile": experiment.cache.compile}) for t in experiment.teachers}


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
