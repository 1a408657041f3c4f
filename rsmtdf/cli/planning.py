"""The sequence behind `rsmtdf plan`, with which stage 1 begins: data, splits, teachers, and what is to be computed.

Whatever the run itself would refuse, and that can be told without weights, is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rsmtdf.cli.terminal import Bar
from rsmtdf.cli.workspace import Source, Workspace, held_out_of, open_workspace
from rsmtdf.config import Experiment, TeacherConfig
from rsmtdf.data.splits import summary as split_summary
from rsmtdf.errors import ConfigError, DatasetError, StoreNotFound
from rsmtdf.objects import StorePath
from rsmtdf.specs import STREAMS, FeatureSpec
from rsmtdf.stages import cache as stage
from rsmtdf.stages.plan import Amounts, Plan, count_text, make_plan, plan_text, resolve_amounts, size_text
from rsmtdf.store import places
from rsmtdf.store.codecs import CODECS, bytes_per_view, find_codec
from rsmtdf.store.pixels import STRONG
from rsmtdf.store.pixels import bytes_per_view as pixels_per_view
from rsmtdf.store.status import DONE, TODO, state_of
from rsmtdf.store.store import SHARD_VIEWS, FeatureStore
from rsmtdf.teachers.open_clip_teacher import is_tag
from rsmtdf.teachers.registry import describe, fetch, resolve_source
from rsmtdf.teachers.source import TeacherSource
from rsmtdf.vit import build_vit, patch_px


@dataclass(frozen=True)
class CacheJob:
    """What `plan_cache` worked out and `run_cache` carries out."""

    workspace: Workspace
    sources: Mapping[str, TeacherSource]
    specs: Mapping[str, FeatureSpec]
    """Of the teachers, without their weights' digests."""
    plan: Plan
    out: StorePath
    store: FeatureStore | None
    """The existing store, if there is one."""

    def text(self) -> str:
        """The splits and the plan, for a terminal."""
        splits = split_summary(self.workspace.splits, self.workspace.experiment.splits)
        unusable = len(self.workspace.unreadable)
        note = (
            f"\nunreadable {count_text(unusable, 'file')}, left out (rsmtdf data check names them)" if unusable else ""
        )
        return f"splits     {splits}{note}\n{plan_text(self.plan)}"


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


def plan_cache(source: Source, *, root: Path, out: StorePath) -> CacheJob:
    """Scans the data and says what stage 1 would do. Writes nothing.

    Raises:
        StoreMismatch: `out` is a store of another identity, or has another teacher of one of the names.
        DatasetError: there are no tiles, or not one of the pool can be read.
        TeacherError: a weights file that is not there.
        ConfigError: it does not fit the disk.
    """
    experiment = source.experiment
    store = _existing(out, experiment)
    sources, grid = teacher_sources(experiment), student_grid(experiment)
    specs = {name: describe(s, student_grid=grid) for name, s in sources.items()}
    for teacher in sources.values():
        _require_weights_file(teacher)
    _expect_teachers(store, specs, codec=experiment.cache.codec)
    held_out = held_out_of(store.experiment, source) if store else None
    with Bar("scanning tiles", unit="tile") as bar:
        workspace = open_workspace(source, root=root, held_out=held_out, progress=bar.update_to)
    sizes = {c: {n: bytes_per_view(c, f.tokens, f.dim) for n, f in specs.items()} for c in CODECS}
    pending = {name: _pending(store, [name]) for name in sources}
    keeps_pixels = experiment.cache.store_pixels or (store is not None and store.pixels is not None)
    pixel_bytes: dict[str, int] = {stream: pixels_per_view(experiment.views.crop_px, stream) for stream in STREAMS}
    chosen = sizes[experiment.cache.codec]
    # Most views of a store are strong ones, and the others take less: what is fitted to the disk fits in any case.
    extra = pixel_bytes["strong"] if keeps_pixels else 0
    amounts, added = _growth(workspace, store, out, pending, chosen, extra)
    growth, free = sum(new.views for new in added), places.free_bytes(out)
    shard_views = store.shard_views if store else SHARD_VIEWS
    # Each addition begins a segment, and each segment a shard.
    grown = sum(-(-new.views // shard_views) for new in added)
    views = _views_by_stream(store, added)
    asked = {**{name: [name] for name in sources}, "views": list(sources)}
    plan = make_plan(
        amounts=amounts,
        train=experiment.train,
        pool=len(workspace.pool),
        labelled=len(workspace.labelled),
        views=views,
        new_views=_pending(store, list(sources)) + growth,
        new_features={name: n + growth for name, n in pending.items()},
        codec=experiment.cache.codec,
        codec_sizes=sizes,
        new_shards={key: _missing_shards(store, names) + grown for key, names in asked.items()},
        # Of each teacher: the codec's arrays, the status words, and where the shard comes from.
        files_per_shard=len(find_codec(experiment.cache.codec).arrays(1, 1)) + 2,
        stored_bytes=places.tree_bytes(out) if store else 0,
        shard_views=shard_views,
        free_bytes=free,
        new_pixels=_pixels_to_store(store, views) if keeps_pixels else None,
        pixel_bytes=pixel_bytes,
        pixel_files=_pixel_files(store, added, shard_views) if keeps_pixels else 0,
    )
    if free is not None and plan.new_bytes > free:
        raise ConfigError(
            f"{out} would need {size_text(plan.new_bytes)}, but only {size_text(free)} are free there; "
            f"use another disk (--out), fewer --seeds or fewer --weak-views"
        )
    if (most := experiment.cache.max_gb) is not None and plan.new_views and plan.store_bytes > most * 1e9:
        raise ConfigError(
            f"{out} would be {size_text(plan.store_bytes)} large, more than --max-gb {most:g} allows; allow more, or "
            "take fewer --seeds (auto fits them), fewer --weak-views, a smaller --codec or fewer tiles (--pool)"
        )
    require_one_readable(workspace)
    return CacheJob(workspace, sources, specs, plan, out, store)


def require_runnable(job: CacheJob) -> None:
    """For plans that no run follows at once: refuses what the run would refuse when it opens the store's views.

    Raises:
        DatasetError: the store has views of tiles that are not on disk.
        StoreMismatch: its views are of a version of the recipe that this code does not make.
    """
    if job.store is not None and job.store.n_rows:
        dataset = job.workspace.dataset
        stage.view_maker(job.store, reader=dataset, tiles={t.id: t for t in dataset.tiles()})


def require_one_readable(workspace: Workspace) -> None:
    """Stops where nothing could be computed.

    Raises:
        DatasetError: not one tile of the pool can be read.
    """
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


def _growth(
    workspace: Workspace,
    store: FeatureStore | None,
    out: StorePath,
    pending: Mapping[str, int],
    bytes_per_view: Mapping[str, int],
    pixels_per_view: int,
) -> tuple[Amounts, list[stage.Addition]]:
    """How many views the store shall hold, and those that it has to grow by."""
    experiment, pool, labelled = workspace.experiment, workspace.pool, workspace.labelled
    have, stored = stage.covered(store), store.n_views if store else 0

    def additions(a: Amounts) -> list[stage.Addition]:
        return stage.plan_growth(
            have, pool=pool, labelled=labelled, strong_seeds=a.strong_seeds, weak_views=a.weak_views, plain=a.plain
        )

    amounts = resolve_amounts(
        cache=experiment.cache,
        train=experiment.train,
        pool=len(pool),
        labelled=len(labelled),
        bytes_per_view={**bytes_per_view, "stored pixels": pixels_per_view},
        free_bytes=places.free_bytes(out),
        done_bytes=sum((stored - n) * bytes_per_view[name] for name, n in pending.items()),
        missing=lambda a: sum(new.views for new in additions(a)),
    )
    return amounts, additions(amounts)


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


def _missing_shards(store: FeatureStore | None, teachers: Sequence[str]) -> int:
    """The shards of `store` that one of `teachers` has not, or not all of."""
    if store is None:
        return 0
    if any(t not in store.teachers for t in teachers):
        return store.n_shards
    return len(store.missing_shards(list(teachers)))


def _views_by_stream(store: FeatureStore | None, added: Sequence[stage.Addition]) -> dict[str, int]:
    """Stream -> views that the store has once it has grown."""
    views: dict[str, int] = dict.fromkeys(reversed(STREAMS), 0)
    for segment in store.segments if store else ():
        views[segment.stream] += segment.rows
    for new in added:
        views[new.stream] += new.views
    return views


def _pixels_to_store(store: FeatureStore | None, views: Mapping[str, int]) -> dict[str, int]:
    """Stream -> views of the finished store whose pixels are not stored yet; streams without views are left out."""
    lacking = {stream: n for stream, n in views.items() if n}
    if store is not None and store.pixels is not None:
        stored = state_of(store.pixel_status()) == DONE
        for segment in store.segments:
            lacking[segment.stream] -= int(stored[segment.row_start : segment.row_stop].sum())
    return lacking


def _pixel_files(store: FeatureStore | None, added: Sequence[stage.Addition], shard_views: int) -> int:
    """Files that storing the missing pixels takes: of each shard its arrays and its status words."""
    shards = [(new.stream, -(-new.views // shard_views)) for new in added]
    if store is not None:
        lacking = (state_of(store.pixel_status()) == TODO).reshape(-1, shard_views).any(axis=1)
        for s in store.segments:
            shards.append((s.stream, int(lacking[s.row_start // shard_views : -(-s.row_stop // shard_views)].sum())))
    return sum(n * (4 if stream in STRONG else 3) for stream, n in shards)


def _expect_teachers(store: FeatureStore | None, specs: Mapping[str, FeatureSpec], *, codec: str) -> None:
    """Checks the store's teachers of the same names, but for their weights, which are not loaded here.

    Raises:
        StoreMismatch: naming every field that differs, expected and found.
    """
    for name in sorted(specs) if store else ():
        if store is not None and name in store.teachers:
            weights = store.teachers[name].spec.weights_sha256
            store.expect_teacher(replace(specs[name], weights_sha256=weights), codec)


def _require_weights_file(source: TeacherSource) -> None:
    """Stops where `weights` is a path at which there is nothing; what can be downloaded is not looked for.

    Raises:
        TeacherError: it is not there.
    """
    remote = source.weights in {"hub", "random"} or source.weights.startswith("hf:")
    if not remote and not (source.library == "open_clip" and is_tag(source)):
        fetch(source)
