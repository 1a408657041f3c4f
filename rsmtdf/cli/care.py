"""Behind `rsmtdf cache verify` and `rsmtdf cache repair`: check, withdraw, and compute again, as data and as text."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rsmtdf.cli.caching import student_grid, teacher_sources
from rsmtdf.cli.terminal import Bar, choose_device
from rsmtdf.cli.workspace import Source, data_root, source_from_record
from rsmtdf.config import Experiment, load_experiment
from rsmtdf.data.dataset import Dataset
from rsmtdf.errors import ConfigError, DatasetError
from rsmtdf.objects import StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.specs import Teacher, Tile
from rsmtdf.stages import cache as cache_stage
from rsmtdf.stages.cache import CacheReport
from rsmtdf.stages.care import LiveCheck, live_check
from rsmtdf.store.repair import RepairReport, repair
from rsmtdf.store.status import SKIPPED, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.verify import VerifyReport, verify
from rsmtdf.teachers.registry import build_teacher
from rsmtdf.views.maker import ViewMaker

log = logging.getLogger(__name__)

SHOWN = 20
"""Findings of one kind that are printed."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """What the command line says of images and teachers; the store's own record says the rest."""

    root: Path | None = None
    config: Path | None = None
    device: str = "auto"
    workers: int | None = None


def verify_store(path: StorePath, *, live: int, means: Means, stop: StopFlag) -> tuple[dict[str, Any], str]:
    """Checks a store without changing it, and with `live` that many views of each teacher against the teacher."""
    with Bar("checking", unit="B") as bar:
        report = verify(path, stop=stop, progress=bar.update_to)
    lines = _found_text(report)
    result = report.as_dict()
    if live and report.is_sound:
        checks = _live(FeatureStore.open(path), live, means, stop)
        result["live"] = {name: check.as_dict() for name, check in checks.items()}
        result["sound"] = all(check.is_sound for check in checks.values())
        lines += [line for name, check in checks.items() for line in _live_text(name, check)]
    elif live:
        lines.append("live       not done: the store is damaged, repair it first")
    if not report.is_sound:
        lines.append(f"next       rsmtdf cache repair {path}")
    return result, "\n".join(lines)


def repair_store(
    path: StorePath, *, means: Means, stop: StopFlag, dry_run: bool = False, withdraw_only: bool = False
) -> tuple[dict[str, Any], str]:
    """Puts a store in order and computes what it lacks; `result["failed"]` says whether something is left to do."""
    with Bar("checking", unit="B") as bar:
        if dry_run:
            report = RepairReport(found=verify(path, stop=stop, progress=bar.update_to))
        else:
            report = repair(path, stop=stop, progress=bar.update_to)
    found = report.found
    result: dict[str, Any] = {"store": str(path), **report.as_dict(), "computed": {}, "missing": {}}
    lines = _found_text(found)
    lines += _several("repaired", report.repaired)
    lines += [f"withdrawn  teacher {name}: {len(rows):,} views" for name, rows in report.withdrawn.items()]
    lines += _several("NOT REPAIRED", [d.text() for d in report.not_repaired])
    if report.not_repaired:
        lines.append(
            "next       restore these files from a copy of the store, then repair it again; nothing was computed"
        )
        result["failed"] = True
    elif dry_run or withdraw_only:
        result["failed"] = not found.is_sound
        if dry_run:
            lines += _plan_text(found)
        elif report.withdrawn:
            lines.append(f"next       rsmtdf cache repair {path}, which computes what was withdrawn")
    else:
        store = FeatureStore.open(path, writable=True)
        computed, missing = _compute(store, means, stop)
        result |= {"computed": dict(computed.features), "missing": missing, "failed": bool(missing)}
        lines += [f"computed   teacher {name}: {n:,} views" for name, n in computed.features.items()]
        lines += _several("missing", [f"view {view}: {why}" for view, why in missing.items()])
        lines.append(
            f"{len(missing):,} views stay missing; once their images are as they were, repair the store again"
            if missing
            else "the store is sound and complete"
        )
    return result, "\n".join(lines)


def _compute(store: FeatureStore, means: Means, stop: StopFlag) -> tuple[CacheReport, dict[str, str]]:
    """Computes what the store lacks; what was done, and the views that stay missing with the reason."""
    lacking = _lacking(store)
    if not lacking:
        return CacheReport(), {}
    experiment, dataset = _data(store, means)
    maker = cache_stage.view_maker(store, reader=dataset, tiles=_tiles(store, dataset))
    # Where not one of the views can be made, no teacher need be loaded.
    rows = np.unique(np.concatenate(list(lacking.values())))
    waiting = any(store.pending_views([name]) for name in lacking)
    if not waiting and not any(all(maker.why_unreadable(t) is None for t in maker.sources(r)) for r in rows.tolist()):
        return CacheReport(), _missing(store, maker, lacking, CacheReport())
    teachers = _teachers(store, experiment, list(lacking), means)
    with Bar("computing", unit="view", total=len(rows)) as bar:
        report = cache_stage.fill_store(
            store,
            teachers=teachers,
            maker=maker,
            batch=experiment.cache.batch,
            workers=means.workers or experiment.cache.workers,
            stop=stop,
            progress=bar.advance,
            keep_going=True,
        )
    return report, _missing(store, maker, _lacking(store), report)


def _lacking(store: FeatureStore) -> dict[str, np.ndarray]:
    """Teacher -> rows that are to do or were skipped, of the teachers that have any."""
    found = {}
    for name in store.teachers:
        skipped = np.flatnonzero(state_of(store.status(name)) == SKIPPED)
        if len(rows := np.union1d(store.pending_rows([name]), skipped)):
            found[name] = rows
    return found


def _missing(
    store: FeatureStore, maker: ViewMaker, lacking: Mapping[str, np.ndarray], report: CacheReport
) -> dict[str, str]:
    """View in words -> why it cannot be made."""
    reasons = {}
    for row in np.unique(np.concatenate([np.empty(0, np.int64), *lacking.values()])).tolist():
        why = [report.unreadable.get(t.id) or maker.why_unreadable(t) for t in maker.sources(row)]
        told = report.changed.get(row) or next((w for w in why if w), "it was withdrawn meanwhile")
        reasons[store.describe(row)] = told
    return reasons


def _live(store: FeatureStore, views: int, means: Means, stop: StopFlag) -> dict[str, LiveCheck]:
    experiment, dataset = _data(store, means)
    maker = cache_stage.view_maker(store, reader=dataset, tiles=_tiles(store, dataset))
    teachers = _teachers(store, experiment, list(store.teachers), means)
    with Bar("comparing", unit="view") as bar:
        return live_check(
            store,
            teachers=teachers,
            maker=maker,
            views=views,
            batch=experiment.cache.batch,
            stop=stop,
            progress=bar.update_to,
        )


def _data(store: FeatureStore, means: Means) -> tuple[Experiment, Dataset]:
    """The experiment that the store was made by, and its images, which may have moved.

    Raises:
        ConfigError: the store records no experiment, and none is given.
        StoreMismatch: the given one makes other views.
        DatasetError: the images are not there.
    """
    if means.config is not None:
        source = Source(load_experiment(means.config), means.config.parent)
        store.expect(recipe=source.experiment.views, dataset=source.experiment.dataset)
    elif "config" in store.experiment:
        source = source_from_record(store.experiment, overrides=(), where=str(store.path))
    else:
        raise ConfigError(
            f"{store.path} does not record what it was made by; give the configuration with --config FILE"
        )
    given = means.config is not None and source.experiment.root is not None
    root = data_root(source, root=means.root, recorded=None if given else store.data_root)
    return source.experiment, Dataset(source.experiment.dataset, root)


def _tiles(store: FeatureStore, dataset: Dataset) -> dict[str, Tile]:
    """The store's tiles by id. Those that are gone stand there without an image, so that only their views fail.

    Raises:
        DatasetError: not one of them is on disk.
    """
    tiles = {tile.id: tile for tile in dataset.tiles()}
    gone = [t for t in store.tile_ids if t not in tiles]
    if gone and len(gone) == len(store.tile_ids):
        raise DatasetError(
            f"none of the {len(gone)} tiles of {store.path} is below {dataset.root} (first: {gone[0]}); give the "
            "folder the store was made from with --root"
        )
    px = dataset.spec.tile_px
    for t in gone:
        tiles[t] = Tile(id=t, image=t.rpartition("/")[0], mask=None, x0=0, y0=0, width=px, height=px)
    return tiles


def _teachers(store: FeatureStore, experiment: Experiment, names: Collection[str], means: Means) -> dict[str, Teacher]:
    """The teachers of these names, each the one that the store has.

    Raises:
        ConfigError: the experiment does not say how to make one.
        StoreMismatch: one is another teacher (each field, expected and found).
    """
    sources = teacher_sources(experiment)
    if unknown := [name for name in names if name not in sources]:
        raise ConfigError(
            f"nothing says how teacher(s) {', '.join(unknown)} of {store.path} are made (known: "
            f"{', '.join(sources) or 'none'}); give a configuration that has them with --config FILE"
        )
    grid, device = student_grid(experiment), choose_device(means.device)
    teachers: dict[str, Teacher] = {n: build_teacher(sources[n], student_grid=grid, device=device) for n in names}
    for name, teacher in teachers.items():
        store.expect_teacher(teacher.spec, store.teacher(name).codec)
    return teachers


def _found_text(report: VerifyReport) -> list[str]:
    state = "sound" if report.is_sound else f"DAMAGED: {len(report.damage):,} findings"
    whole = "complete" if report.is_complete else "incomplete"
    size, rate = report.bytes_read / 1e9, report.bytes_read / max(report.seconds, 1e-9) / 1e9
    lines = [
        f"store      {report.store}: {state}, {whole}",
        f"read       {size:.2f} GB of features in {report.seconds:.1f} s ({rate:.2f} GB/s, {report.threads} threads)",
    ]
    for name, t in report.teachers.items():
        missing = t.total - t.done - t.skipped
        lines.append(
            f"teacher    {name}: {t.checked:,} views checked, {t.done:,} of {t.total:,} done"
            + (f", {t.skipped:,} skipped" if t.skipped else "")
            + (f", {missing:,} to do" if missing else "")
        )
    lines += _several("damaged", [f"store {report.store}, {d.text()}" for d in report.damage])
    return lines + _several("remark", report.remarks)


def _plan_text(found: VerifyReport) -> list[str]:
    lines = []
    for name, t in found.teachers.items():
        damaged = sum(d.kind == "features" and d.teacher == name for d in found.damage)
        if n := damaged + t.total - t.done:
            lines.append(f"would do   teacher {name}: compute {n:,} views")
    return lines or ["would do   compute nothing"]


def _live_text(name: str, check: LiveCheck) -> list[str]:
    line = f"live       {name}: {check.compared} views made again"
    if check.cosine:
        line += (
            f": cosine mean {np.mean(check.cosine):.6f}, min {min(check.cosine):.6f}; max abs difference "
            f"{check.max_abs_difference:.3g}; relative L2 error {np.mean(check.relative_error):.2%}"
        )
    lines = [line]
    if not check.is_same_teacher:
        lines.append(
            f"NOT THIS TEACHER'S  {name}: a cosine is below {check.min_cosine:g}; weights, library or device have "
            "changed, or the store was made otherwise than it says"
        )
    lines += _several("OTHER PIXELS", check.other_pixels)
    lines += _several("unreadable", [f"view {view}: {why}" for view, why in check.unreadable.items()])
    draws = [f"view {view}: {', '.join(fields)}" for view, fields in check.other_draws.items()]
    return lines + _several("warning", [f"stored parameters are not today's draw: {line}" for line in draws])


def _several(label: str, found: Sequence[str]) -> list[str]:
    lines = [f"{label:<10} {line}" for line in found[:SHOWN]]
    if (more := len(found) - SHOWN) > 0:
        lines.append(f"{label:<10} and {more:,} more (--json lists all)")
    return lines
