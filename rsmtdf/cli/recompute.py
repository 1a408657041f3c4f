"""Asking the teachers again: what `cache repair` computes, and `cache verify --live` compares.

Apart from care.py, because loading the teachers' libraries takes seconds that a plain check need not wait for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from rsmtdf.cli.care import Means
from rsmtdf.cli.pixels import fill_pixels
from rsmtdf.cli.planning import student_grid, teacher_sources
from rsmtdf.cli.terminal import Bar, choose_device
from rsmtdf.cli.workspace import Source, data_root, source_from_record
from rsmtdf.config import Experiment, load_experiment
from rsmtdf.data.dataset import Dataset
from rsmtdf.errors import ConfigError, DatasetError
from rsmtdf.signals import StopFlag
from rsmtdf.specs import Teacher, Tile
from rsmtdf.stages import cache as cache_stage
from rsmtdf.stages.cache import CacheReport
from rsmtdf.stages.care import LiveCheck, live_check
from rsmtdf.store.status import SKIPPED, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.teachers.registry import build_teacher
from rsmtdf.teachers.source import TeacherSource
from rsmtdf.views.maker import ViewMaker


def require_images(store: FeatureStore, means: Means) -> None:
    """Checks that the images and a way to make the teachers are there, before anything in the store is changed.

    Raises:
        ConfigError, DatasetError, StoreMismatch: they are not.
    """
    experiment, dataset = images_of(store, means)
    try:
        tiles_of(store, dataset)
    except DatasetError as error:
        hint = "" if "--root" in str(error) else ". If the images have moved, give their folder with --root DIR"
        raise DatasetError(f"{error}{hint}; nothing was changed") from error
    _known(store, experiment, list(store.teachers))


def compute(store: FeatureStore, means: Means, stop: StopFlag) -> tuple[CacheReport, dict[str, str]]:
    """Computes what the store lacks; what was done, and the views that stay missing with the reason."""
    lacking = _lacking(store)
    if not lacking:
        return CacheReport(), {}
    experiment, dataset = images_of(store, means)
    maker = cache_stage.view_maker(store, reader=dataset, tiles=tiles_of(store, dataset))
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


def make_pixels(store: FeatureStore, means: Means, stop: StopFlag) -> tuple[int, dict[str, str]]:
    """Stores the pixels that a store which keeps them lacks; how many views, and those that stay missing and why."""
    if store.pixels is None or not len(store.pending_pixels()):
        return 0, {}
    experiment, dataset = images_of(store, means)
    maker = cache_stage.view_maker(store, reader=dataset, tiles=tiles_of(store, dataset))
    workers = means.workers or experiment.cache.workers
    report = fill_pixels(store, maker, workers=workers, stop=stop, keep_going=True)
    found = CacheReport(unreadable=report.unreadable, changed=report.changed)
    return report.views, _missing(store, maker, {"": store.pending_pixels()}, found)


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


def compare(store: FeatureStore, views: int, means: Means, stop: StopFlag) -> dict[str, LiveCheck]:
    experiment, dataset = images_of(store, means)
    maker = cache_stage.view_maker(store, reader=dataset, tiles=tiles_of(store, dataset))
    teachers = _teachers(store, experiment, list(store.teachers), means)
    with Bar("comparing", unit="view") as bar:
        return live_check(
            store,
            teachers=teachers,
            maker=maker,
            views=views,
            batch=cache_stage.choose_batch(experiment.cache.batch, teachers, crop_px=experiment.views.crop_px),
            stop=stop,
            progress=bar.update_to,
        )


def images_of(store: FeatureStore, means: Means) -> tuple[Experiment, Dataset]:
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


def tiles_of(store: FeatureStore, dataset: Dataset) -> dict[str, Tile]:
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
    sources = _known(store, experiment, names)
    grid, device = student_grid(experiment), choose_device(means.device)
    teachers: dict[str, Teacher] = {n: build_teacher(sources[n], student_grid=grid, device=device) for n in names}
    for name, teacher in teachers.items():
        store.expect_teacher(teacher.spec, store.teacher(name).codec)
    return teachers


def _known(store: FeatureStore, experiment: Experiment, names: Collection[str]) -> Mapping[str, TeacherSource]:
    sources = teacher_sources(experiment)
    if unknown := [name for name in names if name not in sources]:
        raise ConfigError(
            f"nothing says how teacher(s) {', '.join(unknown)} of {store.path} are made (known: "
            f"{', '.join(sources) or 'none'}); give a configuration that has them with --config FILE"
        )
    return sources
