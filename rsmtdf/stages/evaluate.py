"""Scores of a student on labelled tiles: whole tiles as published, one confusion matrix over all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from rsmtdf.config import parse_experiment
from rsmtdf.data.dataset import Dataset
from rsmtdf.data.splits import Splits, select_tiles
from rsmtdf.errors import CheckpointError, DatasetError
from rsmtdf.inference.model import Precision, logits_of
from rsmtdf.inference.whole import predicted_tiles
from rsmtdf.learning.metrics import Confusion, Mean, scores
from rsmtdf.learning.run import RunFolder
from rsmtdf.signals import StopFlag
from rsmtdf.specs import DatasetSpec, Tile, TileReader
from rsmtdf.student.artifact import load_student
from rsmtdf.student.model import Student

Progress = Callable[[int, int], None]
"""Called with (tiles done, tiles in all)."""


class LabelledTiles(TileReader, Protocol):
    """A `TileReader` that knows its classes (`rsmtdf.data.dataset.Dataset`)."""

    @property
    def spec(self) -> DatasetSpec: ...


def evaluate(
    student: Student,
    dataset: LabelledTiles,
    tiles: Sequence[Tile],
    *,
    device: torch.device,
    batch: int = 4,
    workers: int = 2,
    mean: Mean = "present",
    precision: Precision = "float32",
    progress: Progress | None = None,
    stop: StopFlag | None = None,
) -> dict[str, Any]:
    """Scores `student` on `tiles`; its training mode is put back as it was.

    Args:
        student: on `device`.
        dataset: reads the tiles; its spec names the classes, and those left out of the means.
        tiles: with masks.
        device: where the student is.
        batch: tiles per forward pass.
        workers: threads that read tiles ahead.
        mean: what `miou` and `mf1` run over; `published` counts an absent class as 0.
        precision: of the forward pass.
        progress: see `Progress`.
        stop: ends the work between two batches.

    Returns:
        JSON-ready: all of `rsmtdf.learning.metrics.scores` (`miou`, `per_class`, `confusion`, `oa`, `mf1`, `kappa`,
        `pixels`, ...), `tiles` and `seconds`. Scores are fractions; None where undefined.

    Raises:
        DatasetError: no tiles, or tiles without a mask.
        CheckpointError: the student has another number of classes.
        Interrupted: `stop` was raised.
    """
    spec = dataset.spec
    _check_labelled(tiles)
    if student.spec.classes != len(spec.classes):
        raise CheckpointError(
            f"the student tells {student.spec.classes} classes apart, data set {spec.name} has "
            f"{len(spec.classes)} ({', '.join(spec.classes)}); evaluate it on the data set it was trained for"
        )
    started = time.perf_counter()
    confusion = Confusion(classes=len(spec.classes), device=device)
    done, was_training = 0, student.training
    student.eval()
    try:
        for prediction, label in predicted_tiles(
            logits_of(student, device=device, precision=precision),
            dataset,
            tiles,
            patch_px=student.patch_px,
            device=device,
            batch=batch,
            workers=workers,
        ):
            confusion.update(prediction, label)
            done += len(label)
            if progress is not None:
                progress(done, len(tiles))
            if stop is not None:
                stop.check(f"evaluation ended after {done} of {len(tiles)} tiles, without a result")
    finally:
        student.train(was_training)
    result = scores(confusion.numpy(), classes=spec.classes, excluded=spec.excluded, mean=mean)
    return {**result, "tiles": done, "seconds": time.perf_counter() - started}


def evaluate_run(
    run: Path,
    *,
    root: Path,
    device: torch.device,
    split: str = "test",
    batch: int = 4,
    workers: int = 2,
    mean: Mean = "present",
    precision: Precision = "float32",
    progress: Progress | None = None,
    stop: StopFlag | None = None,
) -> dict[str, Any]:
    """Scores a run's best student on a split of its own data set under `root`; see `evaluate`.

    Args:
        run: a run folder.
        root: where the data set's images are.
        device: where to compute.
        split: `val`, `test`, `train`, or a list file of tiles (relative to the working directory).
        batch: see `evaluate`.
        workers: see `evaluate`.
        mean: see `evaluate`.
        precision: see `evaluate`.
        progress: see `evaluate`.
        stop: see `evaluate`.

    Returns:
        `evaluate`'s result with `run`, `split` and `step` (of the student's weights, if recorded).

    Raises:
        CheckpointError: no run folder, or it holds no student yet, or one of other classes.
        DatasetError: the data set is not under `root`, or the split is unknown, empty or unlabelled.
    """
    folder = RunFolder.open(run)
    record = folder.config()
    try:
        experiment = parse_experiment(record["config"], where=str(run / "config.json"))
        tiles = record["tiles"]
        # As drawn when the run began: drawn from today's folder, a tile it trained on could be in test.
        splits = Splits(train=tuple(tiles["labelled"]), val=tuple(tiles["val"]), test=tuple(tiles["test"]))
    except KeyError as error:
        raise CheckpointError(f"{run / 'config.json'} lacks {error}; it was not written by rsmtdf train") from error
    loaded = load_student(folder.best, device=device)
    dataset = Dataset(experiment.dataset, root)
    chosen = select_tiles(dataset, splits, split, base=Path())
    result = evaluate(
        loaded.student,
        dataset,
        [dataset.tile(tile_id) for tile_id in chosen],
        device=device,
        batch=batch,
        workers=workers,
        mean=mean,
        precision=precision,
        progress=progress,
        stop=stop,
    )
    return {**result, "run": str(run), "split": split, "step": loaded.meta.get("run", {}).get("step")}


def _check_labelled(tiles: Sequence[Tile]) -> None:
    if not tiles:
        raise DatasetError("there is no tile to evaluate on; choose another --split")
    if unlabelled := [tile.id for tile in tiles if tile.mask is None]:
        more = ", ..." if len(unlabelled) > 3 else ""
        raise DatasetError(
            f"labels needed: {len(unlabelled)} of {len(tiles)} tiles to evaluate have no mask "
            f"({', '.join(unlabelled[:3])}{more}); add their masks, or evaluate a split or list of labelled tiles"
        )
