"""From options to open resources: the experiment, its data set on disk, its tiles, splits and labelled tiles."""

from __future__ import annotations

import dataclasses
import logging
import os
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsmtdf.cli.configs import shipped_config
from rsmtdf.config import Dtype, Experiment, load_experiment, parse_experiment
from rsmtdf.data.dataset import Dataset, usable_tiles
from rsmtdf.data.splits import Splits, labelled_tiles, make_splits
from rsmtdf.errors import ConfigError, DatasetError
from rsmtdf.keyed import key_seed
from rsmtdf.specs import SplitSpec, Tile, to_dict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """An experiment and the folder its relative paths start from."""

    experiment: Experiment
    base: Path

    def as_dict(self) -> dict[str, Any]:
        """What a store or a run records, for `source_from_record`."""
        return {"config": self.experiment.as_dict(), "base": str(self.base.resolve())}


@dataclass(frozen=True)
class Workspace:
    """The data of an experiment, opened."""

    source: Source
    dataset: Dataset
    tiles: Mapping[str, Tile]
    """By id, without those left out."""
    splits: Splits
    pool: tuple[str, ...]
    """The tiles of the train list that open, sorted."""
    labelled: tuple[str, ...]
    unreadable: Mapping[str, str]
    left_out: tuple[str, ...]
    """Tiles with too few valid pixels, or of files that do not open."""

    @property
    def experiment(self) -> Experiment:
        return self.source.experiment


def load_source(*, dataset: str | None, config: Path | None, overrides: Sequence[str]) -> Source:
    """The experiment of `--dataset NAME` or `--config FILE`.

    Raises:
        ConfigError: neither or both are given, there is none of that name, or it is invalid.
    """
    if (dataset is None) == (config is None):
        raise ConfigError("give either --dataset NAME (rsmtdf configs ls shows the names) or --config FILE")
    path = shipped_config(dataset) if dataset is not None else config
    assert path is not None
    return Source(load_experiment(path, overrides=overrides), path.parent)


def source_from_record(
    record: Mapping[str, Any], *, train: Mapping[str, Any] | None = None, overrides: Sequence[str], where: str
) -> Source:
    """The experiment that a store or a run recorded, with named `train` options and `--set` overrides laid over it."""
    experiment = parse_experiment(record["config"], train=train or {}, overrides=overrides, where=where)
    return Source(experiment, Path(record["base"]))


def with_labels(source: Source, labels: str | None) -> Source:
    """`source` with another labelled set; a list file given on the command line is relative to where one stands."""
    if labels is None:
        return source
    absolute = str(Path(labels).resolve()) if Path(labels).is_file() else labels
    splits = dataclasses.replace(source.experiment.splits, labels=absolute)
    return Source(source.experiment.model_copy(update={"splits": splits}), source.base)


def with_precision(source: Source, precision: str | None) -> Source:
    """`source` with all teachers computing in another dtype; another one makes other teachers of them.

    Raises:
        ConfigError: there is no such precision.
    """
    if precision is None:
        return source
    if precision not in (known := typing.get_args(Dtype)):
        raise ConfigError(f"--precision {precision}: expected one of {', '.join(known)}")
    teachers = tuple(t.model_copy(update={"compute_dtype": precision}) for t in source.experiment.teachers)
    return Source(source.experiment.model_copy(update={"teachers": teachers}), source.base)


def data_root(source: Source, *, root: Path | None, recorded: str | None = None) -> Path:
    """Where the images are: --root, $RSMTDF_DATA/<name>, where a store or run was made from, or the configuration's.

    Raises:
        DatasetError: nowhere, or not a folder.
    """
    name = source.experiment.dataset.name
    given = source.experiment.root
    candidates: list[tuple[str, Path]] = []
    if base := os.environ.get("RSMTDF_DATA"):
        candidates.append(("$RSMTDF_DATA", Path(base) / name))
    if recorded:
        candidates.append(("where it was made from", Path(recorded)))
    if given is not None:
        candidates.append(("root in the configuration", source.base / given))
    # What is asked for is taken at its word; of the others, the first that exists.
    candidates = [("--root", root)] if root is not None else sorted(candidates, key=lambda c: not c[1].is_dir())
    if not candidates:
        raise DatasetError(
            f"where are the images of {name}? Give --root DIR, or set RSMTDF_DATA to the folder that holds {name}/, "
            f"or write root: DIR into the configuration"
        )
    origin, path = candidates[0]
    if not path.is_dir():
        raise DatasetError(
            f"the data root {path} (from {origin}) is not a folder; give the folder with the images by --root DIR"
        )
    return path


def open_workspace(
    source: Source,
    *,
    root: Path,
    left_out: Collection[str] | None = None,
    drawn: Mapping[str, Sequence[str]] | None = None,
    held_out: Mapping[str, Sequence[str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Workspace:
    """Scans the data set, splits it, and names the pool and the labelled tiles.

    Lists are generated from what lies on disk alone, before anything is left out, so that every stage draws the same.

    Args:
        left_out: tiles that stage 1 found unusable, as the store recorded them; None: look into the files, as
            stage 1 does.
        drawn: the `labelled`, `val` and `test` tiles of a run that has begun, instead of drawing anew; the pool is
            then every other tile.
        held_out: the `val` and `test` tiles that the store's first caching drew, which stay held out as the folder
            grows; see `held_out_record`.
        progress: called with (files looked into, files in all).

    Raises:
        DatasetError: no usable images, or lists that do not fit them.
    """
    experiment = source.experiment
    dataset = Dataset(experiment.dataset, root)
    tiles = dataset.tiles()
    if not tiles:
        raise DatasetError(f"{root} holds no usable images for data set {experiment.dataset.name}")
    unreadable = dataset.unreadable
    if left_out is None:
        _warn_of_orphans(dataset)
        usable = usable_tiles(dataset, tiles, workers=experiment.cache.workers, progress=progress)
        unreadable = usable.unreadable
        left_out = {t.id for t in tiles} - {t.id for t in usable.kept} | set(usable.left_out)
    kept = {t.id: t for t in tiles if t.id not in left_out}
    if drawn is None:
        splits, labelled = _draw(source, dataset, tiles, kept, left_out, held_out)
    else:
        splits, labelled = _as_drawn(drawn, kept, root=root)
    pool = set(splits.train)
    if experiment.cache.pool == "unlabelled":
        pool -= set(labelled)
    if experiment.cache.pool_tiles is not None:
        pool = _keyed_part(pool, experiment.cache.pool_tiles)
    return Workspace(
        source=source,
        dataset=dataset,
        tiles=kept,
        splits=splits,
        pool=tuple(sorted(pool)),
        labelled=tuple(labelled),
        unreadable=unreadable,
        left_out=tuple(sorted(left_out)),
    )


def held_out_record(workspace: Workspace) -> dict[str, Any]:
    """For a store to keep: the tiles held out, and the rule they were drawn by."""
    rule = _drawing_rule(workspace.experiment.splits)
    return {"rule": rule, "val": list(workspace.splits.val), "test": list(workspace.splits.test)}


def held_out_of(record: Mapping[str, Any], source: Source) -> dict[str, Sequence[str]] | None:
    """The tiles that a store's record holds out; None where there are none or the rule is another one now."""
    kept = record.get("held_out")
    if kept is None or kept["rule"] != _drawing_rule(source.experiment.splits):
        return None
    return {"val": kept["val"], "test": kept["test"]}


def _drawing_rule(splits: SplitSpec) -> dict[str, Any]:
    """What the drawing of val and test depends on, besides the folder."""
    rule = to_dict(splits)
    del rule["labels"]
    return rule


def _draw(
    source: Source,
    dataset: Dataset,
    tiles: Sequence[Tile],
    kept: Collection[str],
    left_out: Collection[str],
    held_out: Mapping[str, Sequence[str]] | None,
) -> tuple[Splits, tuple[str, ...]]:
    """The splits and the labelled tiles of what lies on disk, without the tiles left out."""
    spec = source.experiment.splits
    drawn = make_splits(dataset, tiles, spec, base=source.base, held_out=held_out)
    splits = Splits(*(tuple(t for t in part if t in kept) for part in (drawn.train, drawn.val, drawn.test)))
    labelled = labelled_tiles(dataset, splits.train, spec.labels, seed=spec.seed, base=source.base, left_out=left_out)
    return splits, tuple(labelled)


def _as_drawn(
    drawn: Mapping[str, Sequence[str]], kept: Collection[str], *, root: Path
) -> tuple[Splits, tuple[str, ...]]:
    """The splits and the labelled tiles that a run recorded.

    Raises:
        DatasetError: some of them are no longer on disk.
    """
    held_out = {*drawn["val"], *drawn["test"]}
    if gone := sorted({*drawn["labelled"], *held_out} - set(kept)):
        raise DatasetError(
            f"{len(gone)} tiles that the run was begun with are not below {root} any more (first: "
            f"{', '.join(gone[:3])}); restore their images, or give the folder that has them with --root"
        )
    train = tuple(sorted(set(kept) - held_out))
    return Splits(train=train, val=tuple(drawn["val"]), test=tuple(drawn["test"])), tuple(drawn["labelled"])


def _keyed_part(pool: Collection[str], n: int) -> set[str]:
    """`n` tiles of `pool`, or all where there are fewer: those with the smallest keys.

    Each tile has a key of its own, so a smaller part lies within a larger one, and new images displace few.
    """
    return set(sorted(pool, key=lambda tile: (key_seed("part of the pool", tile), tile))[:n])


def _warn_of_orphans(dataset: Dataset) -> None:
    if orphans := dataset.listing.scan.orphan_masks:
        log.warning(
            "%d mask(s) belong to no image and are not used (%s); an image missing or named otherwise? "
            "rsmtdf data check lists them",
            len(orphans),
            ", ".join(orphans[:3]),
        )
