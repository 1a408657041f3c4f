"""What a run records of how it began, so that resuming and scoring it never draw anything anew.

Splits are drawn from what lies in a folder, and folders grow: drawn again later, a training tile could become a test
tile. So a run keeps the ids it drew, the rows the store had, and a digest of its schedule.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import rsmtdf
from rsmtdf.cli.workspace import Source, Workspace, source_from_record
from rsmtdf.config import Experiment
from rsmtdf.errors import CheckpointError, ConfigError
from rsmtdf.learning.run import RunFolder
from rsmtdf.learning.sampler import Schedule
from rsmtdf.store import places
from rsmtdf.store.store import FeatureStore

FREE = ("root", "cache.", "train.workers", "train.feature_threads")
"""What a resumed run may have otherwise: none of it changes a weight."""


@dataclass(frozen=True)
class Mode:
    """Where a run's targets come from."""

    teachers: str = "cached"
    """cached or online."""
    through_codec: bool = False
    """With online: features rounded as the store would."""


@dataclass(frozen=True)
class Begun:
    """A run that has begun, as its folder records it."""

    run: RunFolder
    source: Source
    root: str
    mode: Mode
    left_out: Sequence[str]
    store_identity: str
    tiles: Mapping[str, Sequence[str]]
    """`labelled`, `val` and `test`: the ids that were drawn."""
    n_rows: int
    schedule: str

    def require(self, schedule: Schedule) -> None:
        """Checks that the steps to come are those that the run began with.

        Raises:
            CheckpointError: they are not.
        """
        if schedule.digest() != self.schedule:
            raise CheckpointError(
                f"{self.run.path} cannot be resumed: the store's views for its steps are no longer those it began with "
                f"(was the store made anew, or some of its views withdrawn?). Start a new run with another --out"
            )


def begun(path: Path) -> Begun:
    """What the run at `path` recorded.

    Raises:
        CheckpointError: there is no run, or its record is not complete.
    """
    run = RunFolder.open(path)
    record = run.config()
    needed = ("config", "base", "root", "store", "mode", "left_out", "tiles", "schedule")
    if lacking := [key for key in needed if key not in record]:
        raise CheckpointError(f"{path / 'config.json'} lacks {', '.join(lacking)}; it was not written by rsmtdf train")
    return Begun(
        run=run,
        source=source_from_record(record, overrides=(), where=str(path / "config.json")),
        root=record["root"],
        mode=Mode(**record["mode"]),
        left_out=record["left_out"],
        store_identity=record["store"]["identity"],
        tiles=record["tiles"],
        n_rows=record["store"]["rows"],
        schedule=record["schedule"],
    )


def resumable(path: Path | None, *, asked: Source | None, mode: Mode | None, store: FeatureStore) -> Begun:
    """The run at `path`, if it may go on from `store`.

    Args:
        asked: what the command line asks for; None where it asks for nothing in particular.
        mode: likewise.

    Raises:
        ConfigError: no path, another store, or settings that differ from the run's, each named.
    """
    if path is None:
        raise ConfigError("--resume needs --out RUN: the folder of the run to go on with")
    found = begun(path)
    if found.store_identity != store.identity:
        raise ConfigError(f"{path} was trained from a store of another identity than {store.path}")
    changed = differences(found.source.experiment, asked.experiment) if asked else []
    if mode is not None and mode != found.mode:
        changed.append(f"teachers: the run has {found.mode}, now {mode}")
    if changed:
        raise ConfigError(
            f"{path} cannot be resumed with other settings:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nLeave these options out, or start a new run with another --out"
        )
    return found


def differences(before: Experiment, now: Experiment) -> list[str]:
    """One line per setting that differs and matters to a resumed run."""
    old, new = _flat(before.as_dict()), _flat(now.as_dict())
    return [
        f"{key}: the run has {old.get(key)}, now {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(FREE) and old.get(key) != new.get(key)
    ]


def run_record(workspace: Workspace, store: FeatureStore, schedule: Schedule, *, mode: Mode) -> dict[str, Any]:
    """What a new run writes into its config.json."""
    return {
        **workspace.source.as_dict(),
        "store": {"path": places.absolute(store.path), "identity": store.identity, "rows": store.n_rows},
        "root": str(workspace.dataset.root.resolve()),
        "mode": {"teachers": mode.teachers, "through_codec": mode.through_codec},
        "left_out": list(workspace.left_out),
        "tiles": {
            "labelled": list(workspace.labelled),
            "val": list(workspace.splits.val),
            "test": list(workspace.splits.test),
        },
        "schedule": schedule.digest(),
        "versions": {"rsmtdf": rsmtdf.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def run_stem(experiment: Experiment) -> str:
    """The default name of a run, without its number: <dataset>-<labels>-<method>."""
    labels = experiment.splits.labels
    if not (labels == "all" or labels.endswith("%") or labels.isdecimal()):
        labels = Path(labels).stem  # a list file
    return f"{experiment.dataset.name}-{labels}-{experiment.train.method}"


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys."""
    if isinstance(data, dict):
        items = data.items()
    elif isinstance(data, list) and any(isinstance(v, dict) for v in data):
        items = {str(i): v for i, v in enumerate(data)}.items()
    else:
        return {prefix.rstrip("."): data}
    return {k: v for key, value in items for k, v in _flat(value, f"{prefix}{key}.").items()}
