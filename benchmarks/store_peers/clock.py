"""The clock: all ways in turn, call by call, so that drift and foreign load hit every one alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def interleaved(
    ways: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, np.ndarray]:
    """Name -> seconds of each round. In a round every way is called once, in a random order, with the round's number.

    Args:
        ways: what to time.
        rounds: that count; one more comes first, to warm up.
        before: called with the name before each call, untimed.
    """
    rng = np.random.default_rng(0)
    names = list(ways)
    seconds = {name: np.zeros(rounds) for name in names}
    for k in range(-1, rounds):
        for name in rng.permutation(names).tolist():
            before(name)
            begun = time.perf_counter()
            ways[name](k % rounds)
            if k >= 0:
                seconds[name][k] = time.perf_counter() - begun
    return seconds


def row(
    name: str, seconds: Mapping[str, np.ndarray], *, n_bytes: int, limit: str | None, ours: str | None
) -> dict[str, Any]:
    """One way's figures. Ratios are medians over rounds of what the two took in the same round."""
    mine = seconds[name]
    p10, median, p90 = np.percentile(mine, [10, 50, 90])
    found = {
        "name": name,
        "ms": {"p10": p10 * 1e3, "median": median * 1e3, "p90": p90 * 1e3},
        "mb_per_s": n_bytes / median / 1e6,
    }
    if limit is not None:
        found["share_of_limit"] = float(np.median(seconds[limit] / mine))
    if ours is not None:
        found["times_ours"] = float(np.median(mine / seconds[ours]))
    return found
