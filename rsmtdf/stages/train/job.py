"""What a run is made of, opened by the caller, and the rows that its steps will use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rsmtdf.config import Experiment, TrainConfig
from rsmtdf.errors import StoreIncomplete, TrainingError
from rsmtdf.learning.batch import Reduce
from rsmtdf.learning.run import RunFolder
from rsmtdf.learning.sampler import Schedule
from rsmtdf.specs import FeatureSource
from rsmtdf.store.queries import strong_pairs, weak_rows
from rsmtdf.store.store import FeatureStore
from rsmtdf.student.model import Student
from rsmtdf.student.spec import StudentSpec
from rsmtdf.views.kept import KeptViews
from rsmtdf.views.maker import ViewMaker


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1
    reduce: Reduce | None = None
    """Sums a tensor over ranks, in place; None for one process."""

    def sum(self, value: float, *, device: torch.device) -> float:
        """The sum of a number over ranks."""
        if self.reduce is None:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=device)
        self.reduce(total)
        return float(total.item())


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything a run works with."""

    experiment: Experiment
    store: FeatureStore
    source: FeatureSource | None
    """None for methods without teachers."""
    schedule: Schedule
    maker: ViewMaker
    student_spec: StudentSpec
    backbone: Mapping[str, torch.Tensor] | None
    """Pretrained weights of the backbone; None starts from keyed random ones."""
    meta: Mapping[str, Any]
    """Goes into the student's file: data set, recipe, crop."""
    run: RunFolder
    device: torch.device
    validate: Callable[[Student], dict[str, Any]] | None
    """Scores a student on the validation tiles; None where there are none."""
    ranks: Ranks = Ranks()
    kept: KeptViews | None = None
    """Stored pixels, read in place of being made; None: all views are made."""


def build_schedule(
    *,
    train: TrainConfig,
    store: FeatureStore,
    source: FeatureSource | None,
    labelled: Sequence[str],
    pool: Sequence[str],
    ranks: Ranks,
    n_rows: int | None = None,
) -> Schedule:
    """The rows of every step, from the store's columns.

    Args:
        n_rows: use only the first rows, those the store had when a run that is resumed began; None: all.

    Raises:
        StoreIncomplete: stage 1 has not finished, or a labelled tile has no weak views.
        TrainingError: nothing labelled, fewer tiles than a batch, or a batch that the ranks cannot share.
    """
    micro = train.micro_batch * ranks.world
    if train.batch % micro:
        raise TrainingError(
            f"a batch of {train.batch} cannot be cut into micro-batches of {train.micro_batch} on "
            f"{ranks.world} ranks; set train.batch to a multiple of {micro}"
        )
    cached = list(source.specs) if source is not None and not source.needs_pixels else []
    stop = store.n_rows if n_rows is None else n_rows
    for needed in [[name] for name in cached] or [[]]:
        if pending := int((store.pending_rows(needed) < stop).sum()):
            what = f"features of {needed[0]!r} in {store.path} cover" if needed else f"{store.path} has"
            raise StoreIncomplete(
                f"{what} {store.n_views - pending:,} of {store.n_views:,} views; finish them with the rsmtdf "
                f"cache-features command that the store was made by"
            )
    usable = store.usable(cached)
    usable[stop:] = False
    return Schedule(
        pairs={seed: p for seed, p in strong_pairs(store, pool, usable).items() if len(p)},
        weak=weak_rows(store, sorted(labelled), usable),
        batch=train.batch,
        seed=train.seed,
        shard_views=store.shard_views,
        window=train.shuffle_window,
    )


def resumable_config(train: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run must share with its first part."""
    return train.model_dump(mode="json", exclude={"workers", "feature_threads", "stored_pixels"})
