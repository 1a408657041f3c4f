"""The plan: what stage 1 will make, what that costs in bytes, files and hours, and when it has paid for itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rsmtdf.config import TrainConfig
from rsmtdf.learning.budget import parse_budget, total_steps
from rsmtdf.stages.plan.amounts import Amounts
from rsmtdf.stages.plan.pace import Estimate, Pace, TrainingPace


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What training from the store takes, and when the store has paid for itself; None: not measured."""

    epochs_to_break_even: float
    """Passes over the pool after which the store has cost less than teachers in every training step: in time where
    that was measured, else in teacher passes."""
    runs_to_break_even: float | None
    """The same in runs of the configured length."""
    steps: int | None
    """Of such a run; None: its budget is a time, and the step was not measured."""
    bytes_per_step: int
    """Of features that a step reads."""
    step_seconds: float | None
    peak_bytes: int | None
    memory_of: str
    """What `peak_bytes` counts: a device's memory, or that of the process."""
    disk_bytes_per_second: float | None
    """That the disk has read in a calibration."""

    @property
    def hours(self) -> float | None:
        both = self.steps is not None and self.step_seconds is not None
        return self.steps * self.step_seconds / 3600 if both else None  # type: ignore[operator]

    @property
    def read_bytes_per_second(self) -> float | None:
        """That training needs so as not to wait."""
        return self.bytes_per_step / self.step_seconds if self.step_seconds else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "hours": self.hours, "read_bytes_per_second": self.read_bytes_per_second}


@dataclass(frozen=True)
class Plan:
    """Stage 1 in numbers; `new_*` is what will be computed."""

    pool_tiles: int
    labelled_tiles: int
    amounts: Amounts
    views: dict[str, int]
    """Stream -> views the finished store holds, of other label sets too."""
    new_views: int
    """Views to make: those that one of the teachers lacks."""
    new_features: dict[str, int]
    """Teacher -> views whose features it lacks."""
    codec: str
    bytes_per_view: dict[str, int]
    """Teacher -> bytes in the chosen codec."""
    codec_bytes: dict[str, dict[str, int]]
    """Codec -> teacher -> bytes of the finished store's features."""
    store_bytes: int
    new_bytes: int
    new_files: dict[str, int]
    """Teacher -> files; `views` -> those of the views themselves."""
    free_bytes: int | None
    """None: no limit is known (object stores)."""
    shard_views: int
    train: TrainConfig = field(repr=False)
    estimate: Estimate | None = None
    """None: not measured."""
    pace: Pace | None = None
    training: TrainingPace | None = None

    @property
    def hours(self) -> float | None:
        return None if self.estimate is None else self.estimate.seconds / 3600

    def priced(
        self, pace: Pace, *, statistics: Mapping[str, int], decodes: float, training: TrainingPace | None = None
    ) -> Plan:
        """The plan with what a calibration found; see `Pace.estimate` for the arguments."""
        estimate = pace.estimate(
            views=self.new_views,
            features=self.new_features,
            bytes_per_view=self.bytes_per_view,
            statistics=statistics,
            decodes=decodes,
            in_flight=self.shard_views,
        )
        return replace(self, pace=pace, estimate=estimate, training=training)

    @property
    def outlook(self) -> Outlook:
        """Training and break-even."""
        size, batch, pool = sum(self.bytes_per_view.values()), self.train.batch, self.pool_tiles
        step = None if self.training is None else self.training.step_seconds
        steps = _run_steps(self.train, pool, step)
        epochs, runs = self._break_even(steps)
        return Outlook(
            epochs_to_break_even=epochs,
            runs_to_break_even=runs,
            steps=steps,
            # A step sees `batch` labelled and as many strong views, each with every teacher's features.
            bytes_per_step=2 * batch * size,
            step_seconds=step,
            peak_bytes=None if self.training is None else self.training.peak_bytes,
            memory_of="" if self.training is None else self.training.device,
            disk_bytes_per_second=None if self.pace is None else self.pace.read_bytes_per_second,
        )

    def _break_even(self, steps: int | None) -> tuple[float, float | None]:
        """Epochs and runs; inf where reading takes longer than the teachers would."""
        a, pool = self.amounts, self.pool_tiles
        asked = a.strong_seeds * pool + a.weak_views * self.labelled_tiles + (pool if a.plain else 0)
        cost, saved = float(asked), 1.0
        if self.pace is not None:
            names = self.bytes_per_view
            cost = self.pace.estimate(
                views=asked,
                features=dict.fromkeys(names, asked),
                bytes_per_view=names,
                statistics={},
                decodes=0.0,
                in_flight=self.shard_views,
            ).seconds
            rate = self.pace.read_bytes_per_second
            saved = self.pace.online_seconds(names) - (sum(names.values()) / rate if rate else 0.0)
        if saved <= 0:
            return math.inf, math.inf
        # An online epoch shows the teachers the strong view of each tile of the pool, and as many labelled views.
        epochs = cost / (2 * pool * saved) if pool else 0.0
        return epochs, cost / (steps * 2 * self.train.batch * saved) if steps else None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = asdict(replace(self, train=TrainConfig(steps=1)))
        del plain["train"]
        outlook = {k: None if v == math.inf else v for k, v in self.outlook.as_dict().items()}
        return {**plain, "hours": self.hours, "outlook": outlook}


def make_plan(
    *,
    amounts: Amounts,
    train: TrainConfig,
    pool: int,
    labelled: int,
    views: Mapping[str, int],
    new_views: int,
    new_features: Mapping[str, int],
    codec: str,
    codec_sizes: Mapping[str, Mapping[str, int]],
    new_shards: Mapping[str, int],
    files_per_shard: int,
    stored_bytes: int,
    shard_views: int,
    free_bytes: int | None,
) -> Plan:
    """The plan to bring a store of `stored_bytes` to `views`; see `Plan` for the terms.

    Args:
        codec_sizes: codec -> teacher -> bytes of a view's features.
        new_shards: teacher -> shards that will be written; `views` -> shards of views that will be made.
        files_per_shard: of a teacher, in the chosen codec.
    """
    sizes = codec_sizes[codec]
    new_bytes = sum(n * sizes[name] for name, n in new_features.items())
    files = {name: files_per_shard * new_shards[name] for name in new_features}
    held = sum(views.values())
    return Plan(
        pool_tiles=pool,
        labelled_tiles=labelled,
        amounts=amounts,
        views=dict(views),
        new_views=new_views,
        new_features=dict(new_features),
        codec=codec,
        bytes_per_view=dict(sizes),
        codec_bytes={c: {name: n * held for name, n in each.items()} for c, each in codec_sizes.items()},
        store_bytes=stored_bytes + new_bytes,
        new_bytes=new_bytes,
        # The views' own status words, a file per shard.
        new_files={**files, "views": new_shards["views"]},
        free_bytes=free_bytes,
        shard_views=shard_views,
        train=train,
    )


def _run_steps(train: TrainConfig, pool: int, step_seconds: float | None) -> int | None:
    if train.budget is not None and parse_budget(train.budget)[0] == "seconds" and step_seconds is None:
        return None
    return total_steps(
        epochs=train.epochs,
        steps=train.steps,
        budget=train.budget,
        steps_per_epoch=2 * (pool // 2) // train.batch,
        step_seconds=step_seconds,
    )
