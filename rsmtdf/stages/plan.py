"""What stage 1 will make and cost, before anything is written: views, bytes, files, hours, break-even."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rsmtdf.config import CacheConfig, TrainConfig
from rsmtdf.errors import ConfigError

MAX_AUTO_SEEDS = 10
"""The paper recipe's number of strong seeds, and the ceiling of `--seeds auto`."""
MIN_AUTO_SEEDS = 3
WEAK_TOTAL = 20_000
WEAK_RANGE = (64, 1000)
GB = 1e9


@dataclass(frozen=True)
class Amounts:
    """How many views a store shall hold."""

    strong_seeds: int
    weak_views: int
    plain: bool


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
    bytes_per_view: dict[str, int]
    store_bytes: int
    new_bytes: int
    new_files: int
    free_bytes: int | None
    """None: no limit is known (object stores)."""
    seconds_per_view: float | None
    """All teachers together, measured on this device; None: not measured."""
    epochs_to_break_even: float

    @property
    def hours(self) -> float | None:
        return None if self.seconds_per_view is None else self.new_views * self.seconds_per_view / 3600

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "hours": self.hours}

    def text(self) -> str:
        """A few lines for a terminal."""
        streams = " + ".join(f"{n:,} {stream}" for stream, n in self.views.items() if n)
        per_view = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in self.bytes_per_view.items())
        store = f"store {self.store_bytes / GB:.2f} GB, about {self.new_files:,} files"
        free = "no limit known there" if self.free_bytes is None else f"{self.free_bytes / GB:.1f} GB free"
        time = "not measured" if self.hours is None else _duration(self.hours * 3600)
        return "\n".join(
            [
                f"tiles      {self.pool_tiles:,} in the pool, {self.labelled_tiles:,} labelled",
                f"views      {streams} = {sum(self.views.values()):,}; {self.new_views:,} to compute",
                f"per view   {per_view}",
                f"disk       {self.new_bytes / GB:.2f} GB to write ({store}); {free}",
                f"time       {time}",
                f"pays off   after {self.epochs_to_break_even:.1f} epochs against teachers in every training step",
            ]
        )


def resolve_amounts(
    *,
    cache: CacheConfig,
    train: TrainConfig,
    pool: int,
    labelled: int,
    bytes_per_view: Mapping[str, int],
    free_bytes: int | None,
    done_bytes: int = 0,
    missing: Callable[[Amounts], int] | None = None,
) -> Amounts:
    """The numbers of strong seeds and weak views: as asked, or fitted to the space (design, section 3).

    Args:
        bytes_per_view: of each teacher in the chosen codec.
        free_bytes: on the disk; None: no limit is known, so without `max_gb` everything fits.
        done_bytes: features of these teachers that the store has; the space they take counts as available, since they
            are not made again.
        missing: how many views the store would have to grow by; None: there is no store. What it holds already, or was
            made to hold, fits.

    Raises:
        ConfigError: `seeds: auto` and fewer than three fit; the message prices the ways out.
    """
    size = sum(bytes_per_view.values())
    fitted = math.inf if free_bytes is None else (free_bytes + done_bytes) / 2
    budget = fitted if cache.max_gb is None else cache.max_gb * GB
    steps = train.steps if train.epochs is None else None

    def asked(a: Amounts) -> int:
        return a.strong_seeds * pool + a.weak_views * labelled + (pool if a.plain else 0)

    new = missing or asked
    if cache.weak_views == "auto":
        weak = min(max(WEAK_TOTAL // max(labelled, 1), WEAK_RANGE[0]), WEAK_RANGE[1])
        if steps:
            # A run can show each labelled tile no more views than it has turns for.
            weak = min(weak, max(math.ceil(steps * train.batch / max(labelled, 1)), 1))
        while weak > WEAK_RANGE[0] and weak * labelled * size > budget / 2 and new(Amounts(0, weak, False)):
            weak = max(weak // 2, WEAK_RANGE[0])
    else:
        weak = cache.weak_views
    if cache.seeds != "auto":
        return Amounts(cache.seeds, weak, cache.plain)
    options = [Amounts(n, weak, cache.plain) for n in range(MAX_AUTO_SEEDS, 0, -1)]
    best = next((a for a in options if asked(a) * size <= budget or not new(a)), None)
    if best is None or (best.strong_seeds < MIN_AUTO_SEEDS and new(best)):
        raise ConfigError(_no_room(cache, pool, labelled, weak, size, budget))
    return best


def make_plan(
    *,
    amounts: Amounts,
    pool: int,
    labelled: int,
    views: Mapping[str, int],
    new_views: int,
    new_features: Mapping[str, int],
    bytes_per_view: Mapping[str, int],
    stored_bytes: int,
    shard_views: int,
    free_bytes: int | None,
    seconds_per_view: float | None = None,
) -> Plan:
    """The plan to bring a store of `stored_bytes` to `views`; see `Plan` for the terms."""
    new_bytes = sum(n * bytes_per_view[name] for name, n in new_features.items())
    shards = {name: math.ceil(n / shard_views) for name, n in new_features.items()}
    asked = amounts.strong_seeds * pool + amounts.weak_views * labelled + (pool if amounts.plain else 0)
    return Plan(
        pool_tiles=pool,
        labelled_tiles=labelled,
        amounts=amounts,
        views=dict(views),
        new_views=new_views,
        new_features=dict(new_features),
        bytes_per_view=dict(bytes_per_view),
        store_bytes=stored_bytes + new_bytes,
        new_bytes=new_bytes,
        # Per shard: data, status and provenance of each teacher, and the views' own status.
        new_files=3 * sum(shards.values()) + math.ceil(new_views / shard_views),
        free_bytes=free_bytes,
        seconds_per_view=seconds_per_view,
        # An online epoch sends the strong view and a labelled one through the teachers for each tile of the pool.
        epochs_to_break_even=asked / (2 * pool) if pool else 0.0,
    )


def _no_room(cache: CacheConfig, pool: int, labelled: int, weak: int, size: int, budget: float) -> str:
    def need(n: int) -> float:
        return (n * pool + weak * labelled) * size / GB

    ways = [f"--seeds 1 or 2 ({need(1):.1f} or {need(2):.1f} GB, weaker augmentation)"]
    if (fits := int((budget / size - weak * labelled) // MIN_AUTO_SEEDS)) > 0:
        ways.append(f"a pool of at most {fits:,} tiles")
    if cache.codec != "int4":
        part = {"int8": "0.56", "fp16": "0.28"}[cache.codec]
        ways.append(f"--codec int4 ({part} of the bytes, 9 % error)")
    ways.append(f"fewer --weak-views (now {weak} for each of {labelled:,} labelled tiles)")
    ways.append(f"--max-gb {math.ceil(need(MIN_AUTO_SEEDS))} with --out on a larger disk")
    return (
        f"{budget / GB:.1f} GB hold fewer than {MIN_AUTO_SEEDS} strong seeds of {pool:,} tiles in {cache.codec} "
        f"({need(MIN_AUTO_SEEDS):.1f} GB). Ways out: {'; '.join(ways)}"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
