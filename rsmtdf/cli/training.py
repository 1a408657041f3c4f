"""The sequence behind `rsmtdf train`: store, data, feature source, student, run folder, loop, summary."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import rsmtdf
from rsmtdf.cli.pixels import pixels_line, reads_pixels
from rsmtdf.cli.planning import student_grid, teacher_sources
from rsmtdf.cli.runs import Mode, resumable, run_record, run_stem
from rsmtdf.cli.students import backbone_weights, student_spec
from rsmtdf.cli.terminal import Bar, choose_device
from rsmtdf.cli.workspace import (
    Source,
    Workspace,
    data_root,
    held_out_of,
    open_workspace,
    source_from_record,
    with_labels,
)
from rsmtdf.config import Experiment, load_experiment
from rsmtdf.data.labels import LabelCounts, label_counts
from rsmtdf.errors import ConfigError, StoreIncomplete, TrainingError
from rsmtdf.learning.budget import parse_budget
from rsmtdf.learning.methods import METHODS
from rsmtdf.learning.run import RunFolder, next_run_path, point_latest
from rsmtdf.learning.sampler import Schedule
from rsmtdf.objects import StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.specs import FeatureSource, to_dict
from rsmtdf.stages import cache as cache_stage
from rsmtdf.stages import train as stage
from rsmtdf.stages.evaluate import evaluate
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.pixel_reader import PixelReader
from rsmtdf.store.store import FeatureStore
from rsmtdf.student.model import Student, build_student
from rsmtdf.student.spec import StudentSpec
from rsmtdf.teachers.online import OnlineFeatures
from rsmtdf.teachers.registry import build_teacher, describe

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What the command line says, besides the store's own experiment."""

    cache: StorePath
    config: Path | None = None
    root: Path | None = None
    labels: str | None = None
    out: Path | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `train` given as options: method, recipe, budget, batch, seed."""
    overrides: Sequence[str] = ()
    teachers: str = "cached"
    """cached or online."""
    through_codec: bool = False
    device: str = "auto"
    resume: bool = False


def train_run(options: TrainOptions, *, stop: StopFlag, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains a student from a store and returns the summary."""
    done = _finished(options.out) if options.resume and options.out is not None else None
    if done is not None and not _is_explicit(options):
        say(f"{options.out} is finished already: nothing to go on with")
        return done
    try:
        with contextlib.ExitStack() as opened:
            job = open_job(options, say=say, opened=opened)
            bar = opened.enter_context(Bar("training", unit="step"))

            def progress(done: int, total: int, note: str) -> None:
                bar.update_to(done, total)
                if note:
                    bar.step(done, note)

            return stage.train(job, resume=options.resume, stop=stop, progress=progress)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _finished(path: Path) -> dict[str, Any] | None:
    """The summary of the run at `path` if it has ended."""
    state = RunFolder.open(path).state()
    return state.get("summary") if state.get("state") == "finished" else None


def open_job(options: TrainOptions, *, say: Callable[[str], None], opened: contextlib.ExitStack) -> stage.TrainJob:
    """Everything that a run works with; the run's folder is made last, when all else is open and fits.

    What needs closing goes to `opened`, for the caller to close when the run has ended.
    """
    if options.teachers not in {"cached", "online"}:
        raise ConfigError(f"--teachers {options.teachers}: it is cached or online")
    store = FeatureStore.open(options.cache)
    source, mode = _asked(options, store), Mode(options.teachers, options.through_codec)
    before = None
    if options.resume:
        asked = source if _is_explicit(options) else None
        before = resumable(options.out, asked=asked, mode=mode if mode != Mode() else None, store=store)
        source, mode = before.source, before.mode
    experiment = source.experiment
    if experiment.train.method not in METHODS:
        raise ConfigError(f"no method {experiment.train.method!r}; there are: {', '.join(METHODS)}")
    device = choose_device(_rank_device(options.device))
    # A configuration given now is taken at its word: a copied project must not train on the original's masks.
    is_given = options.config is not None and experiment.root is not None and before is None
    root = data_root(source, root=options.root, recorded=None if is_given else store.data_root)
    left_out = before.left_out if before else store.experiment.get("left_out", ())
    workspace = open_workspace(
        source,
        root=root,
        left_out=left_out,
        drawn=before.tiles if before else None,
        held_out=held_out_of(store.experiment, source),
    )
    counts = _label_counts(workspace)
    needs = METHODS[experiment.train.method].needs_targets
    features = _features(mode, experiment, store, device, opened=opened) if needs else None
    spec = student_spec(experiment, features.specs if features is not None else {})
    backbone = backbone_weights(experiment, base=source.base)
    ranks = _ranks(device)
    schedule = stage.build_schedule(
        train=experiment.train,
        store=store,
        source=features,
        labelled=workspace.labelled,
        pool=workspace.pool,
        ranks=ranks,
        n_rows=before.n_rows if before else None,
    )
    if before:
        before.require(schedule)
    kept = opened.enter_context(PixelReader(store)) if reads_pixels(experiment, store) else None
    every_tile = {t.id: t for t in workspace.dataset.tiles()}
    maker = cache_stage.view_maker(store, reader=workspace.dataset, tiles=every_tile)
    val = [t for t in workspace.splits.val if workspace.tiles[t].mask is not None]
    _check_before(workspace, spec, val)
    run = before.run if before else _new_run(options, workspace, store, schedule, mode=mode, ranks=ranks)
    job = stage.TrainJob(
        experiment=experiment,
        store=store,
        source=features,
        schedule=schedule,
        maker=maker,
        student_spec=spec,
        backbone=backbone,
        meta={
            "dataset": to_dict(experiment.dataset),
            "recipe": to_dict(experiment.views),
            "crop_px": experiment.views.crop_px,
            "rsmtdf": rsmtdf.__version__,
        },
        run=run,
        device=device,
        validate=partial(_score, workspace=workspace, tiles=val, device=device) if val else None,
        ranks=ranks,
        kept=kept,
    )
    if ranks.rank == 0:
        say(_first_screen(workspace, counts, run, val))
        if kept is not None:
            say(pixels_line(kept, store))
    return job


def summary_text(result: Mapping[str, Any]) -> str:
    """The end-of-run summary of stage 2."""
    speed = f"{result['seconds']:.0f} s ({result['images_per_second']} images/s)"
    memory = f"{result['peak_memory_bytes'] / 2**30:.1f} GiB"
    best = "none" if result["best_miou"] is None else f"{100 * result['best_miou']:.2f} at step {result['best_step']:,}"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["shares"].items())
    now = "" if result["steps_now"] == result["steps"] else f", {result['steps_now']:,} of them now"
    return "\n".join(
        [
            f"trained    {result['method']}, {result['steps']:,} of {result['total_steps']:,} steps{now}, in {speed}",
            f"best mIoU  {best} (EMA student; selected on {result['selected_on']})",
            f"time       {shares}; limited by {result['limited_by']}; peak memory {memory}",
            f"next       rsmtdf evaluate {result['run']} --split test",
            f"           rsmtdf predict {result['run']} IMAGE.tif MAP.tif",
        ]
    )


def _asked(options: TrainOptions, store: FeatureStore) -> Source:
    """The experiment as the options shape it."""
    if options.config is not None:
        experiment = load_experiment(options.config, train=options.train, overrides=options.overrides)
        source = Source(experiment, options.config.parent)
    else:
        where = str(options.cache)
        source = source_from_record(store.experiment, train=options.train, overrides=options.overrides, where=where)
    source = with_labels(source, options.labels)
    store.expect(recipe=source.experiment.views, dataset=source.experiment.dataset)
    return source


def _is_explicit(options: TrainOptions) -> bool:
    """Whether the command line says anything about the experiment."""
    named = any(v is not None for v in options.train.values())
    return bool(named or options.overrides or options.labels or options.config)


def _new_run(
    options: TrainOptions,
    workspace: Workspace,
    store: FeatureStore,
    schedule: Schedule,
    *,
    mode: Mode,
    ranks: stage.Ranks,
) -> RunFolder:
    """A new run's folder, made by the first rank alone."""
    if ranks.world > 1 and options.out is None:
        raise ConfigError("several processes train together: name the run's folder with --out")
    path = options.out or next_run_path(Path("runs"), stem=run_stem(workspace.experiment))
    record = run_record(workspace, store, schedule, mode=mode)
    run = RunFolder.create(path, config=record) if ranks.rank == 0 else None
    ranks.sum(0.0, device=choose_device(_rank_device(options.device)))  # the others wait for the folder
    if options.out is None:
        point_latest(path)
    return run or RunFolder.open(path)


def _features(
    mode: Mode, experiment: Experiment, store: FeatureStore, device: torch.device, *, opened: contextlib.ExitStack
) -> FeatureSource:
    names = [t.name for t in experiment.teachers]
    if mode.teachers == "cached":
        if missing := [n for n in names if n not in store.teachers]:
            raise StoreIncomplete(
                f"{store.path} has no features of {', '.join(missing)} "
                f"(it has {', '.join(store.teachers) or 'none'}); "
                f"add them with rsmtdf cache-features --out {store.path}"
            )
        _expect_described(store, experiment)
        windowed = experiment.train.shuffle_window is not None
        return opened.enter_context(
            CachedFeatures(
                store,
                names,
                device=device,
                threads=experiment.train.feature_threads,
                whole=store.rows(stream="strong") if windowed else None,
            )
        )
    grid = student_grid(experiment)
    teachers = {n: build_teacher(s, student_grid=grid, device=device) for n, s in teacher_sources(experiment).items()}
    for name, teacher in teachers.items():
        if name in store.teachers:
            store.expect_teacher(teacher.spec, store.teachers[name].codec)

    def roundtrip(name: str, tokens: torch.Tensor) -> torch.Tensor:
        return store.teacher(name).roundtrip(tokens)

    return OnlineFeatures(teachers, roundtrip=roundtrip if mode.through_codec else None)


def _expect_described(store: FeatureStore, experiment: Experiment) -> None:
    """Checks the store's teachers against the configuration's, but for their weights, which are not loaded here.

    Raises:
        StoreMismatch: naming every field that differs, expected and found.
    """
    for name, source in teacher_sources(experiment).items():
        stored = store.teachers[name]
        described = describe(source, student_grid=student_grid(experiment))
        store.expect_teacher(replace(described, weights_sha256=stored.spec.weights_sha256), stored.codec)


def _score(student: Student, *, workspace: Workspace, tiles: Sequence[str], device: torch.device) -> dict[str, Any]:
    found = [workspace.tiles[t] for t in tiles]
    return evaluate(student, workspace.dataset, found, device=device)


def _rank_device(name: str) -> str:
    """Under torchrun, `auto` and `cuda` are each rank's own GPU."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local and name in {"auto", "cuda"} and torch.cuda.is_available() else name


def _ranks(device: torch.device) -> stage.Ranks:
    """One process, or this one among those that torchrun started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return stage.Ranks()
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return stage.Ranks(rank=torch.distributed.get_rank(), world=world, reduce=torch.distributed.all_reduce)


def _label_counts(workspace: Workspace) -> LabelCounts:
    """What the labelled tiles show.

    Raises:
        TrainingError: not one labelled pixel.
    """
    spec = workspace.dataset.spec
    tiles = [workspace.tiles[t] for t in workspace.labelled]
    counts = label_counts(workspace.dataset, tiles, classes=len(spec.classes))
    if not counts.pixels.any():
        raise TrainingError(
            f"all pixels of the {len(tiles)} labelled tiles are ignored (255): there is nothing to learn classes from. "
            f"Check label_map and the masks with rsmtdf data check, or choose other --labels"
        )
    return counts


def _check_before(workspace: Workspace, spec: StudentSpec, val: Sequence[str]) -> None:
    """Finds what would otherwise stop a run that has begun: at its first step, or hours later at a validation.

    Raises:
        ConfigError: a budget that is none, or a student that cannot be built.
        DatasetError: a validation image or mask that cannot be read, or a value outside the classes.
    """
    if (budget := workspace.experiment.train.budget) is not None:
        parse_budget(budget)
    with torch.device("meta"):
        build_student(spec, seed=0)
    dataset = workspace.dataset
    tiles = [workspace.tiles[t] for t in val]
    label_counts(dataset, tiles, classes=len(dataset.spec.classes))
    with ThreadPoolExecutor(workspace.experiment.train.workers) as pool:
        # Read once now: stage 1 never looked into these images.
        for _ in pool.map(dataset.read_image, tiles):
            pass


def _first_screen(workspace: Workspace, counts: LabelCounts, run: RunFolder, val: Sequence[str]) -> str:
    experiment = workspace.experiment
    train, labelled, pool = experiment.train, len(workspace.labelled), len(workspace.pool)
    micro = f"micro-batches of {train.micro_batch}+{train.micro_batch}"
    total = int(counts.pixels.sum())
    shares = [
        f"{name} {pixels / total:.1%} in {tiles}"
        for name, pixels, tiles in zip(experiment.dataset.classes, counts.pixels, counts.tiles, strict=True)
    ]
    lines = [
        f"run        {run.path}",
        f"data       {experiment.dataset.name}: {labelled:,} labelled of {pool:,} tiles, {len(val):,} to validate",
        f"labels     {', '.join(shares)} tiles",
        f"method     {train.method}, recipe {train.recipe}, batch {train.batch}+{train.batch} in {micro}",
    ]
    if absent := [c for c, n in zip(experiment.dataset.classes, counts.tiles, strict=True) if not n]:
        lines.append(f"note       no labelled tile shows {', '.join(absent)}: the student cannot learn it")
    if not val:
        lines.append("note       no validation labels: nothing is selected, the last weights are kept")
    return "\n".join(lines)
