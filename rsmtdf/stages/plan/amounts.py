"""How many views a store shall hold: as asked, or fitted to the disk, with the ways out priced where too few fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rsmtdf.config import CacheConfig, TrainConfig
from rsmtdf.errors import ConfigError
from rsmtdf.stages.plan.units import size_text

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


def _no_room(cache: CacheConfig, pool: int, labelled: int, weak: int, size: int, budget: float) -> str:
    def need(n: int) -> float:
        return (n * pool + weak * labelled) * size

    ways = [f"--seeds 1 or 2 ({size_text(need(1))} or {size_text(need(2))}, weaker augmentation)"]
    if (fits := int((budget / size - weak * labelled) // MIN_AUTO_SEEDS)) > 0:
        ways.append(f"--pool {fits} (a keyed part of the {pool:,} tiles)")
    if cache.codec != "int4":
        part = {"int8": 0.56, "fp16": 0.28}[cache.codec]
        ways.append(f"--codec int4 ({size_text(part * need(MIN_AUTO_SEEDS))}, {part} of the bytes, 9 % error)")
    ways.append(f"fewer --weak-views (now {weak} for each of {labelled:,} labelled tiles)")
    enough = math.ceil(need(MIN_AUTO_SEEDS) / GB * 1000) / 1000
    ways.append(f"--max-gb {enough:g}, with --out on a larger disk if this one is too small")
    return (
        f"{size_text(budget)} hold fewer than {MIN_AUTO_SEEDS} strong seeds of {pool:,} tiles in {cache.codec} "
        f"({size_text(need(MIN_AUTO_SEEDS))}). Ways out: {'; '.join(ways)}"
    )
