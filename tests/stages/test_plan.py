"""The plan: counts, bytes, and how many seeds fit, with the ways out priced where too few do."""

from __future__ import annotations

import pytest

from rsmtdf.config import CacheConfig, TrainConfig
from rsmtdf.errors import ConfigError
from rsmtdf.stages.plan import Amounts, make_plan, resolve_amounts

SIZES = {"dense": 2_000_000, "coarse": 500_000}
VIEW = sum(SIZES.values())


def amounts(
    cache: CacheConfig, *, pool: int = 1000, labelled: int = 20, free: float = 1e12, steps: int = 8000
) -> Amounts:
    train = TrainConfig(steps=steps, batch=16)
    return resolve_amounts(
        cache=cache, train=train, pool=pool, labelled=labelled, bytes_per_view=SIZES, free_bytes=int(free)
    )


def test_auto_is_ten_seeds_and_a_thousand_weak_views_where_there_is_room() -> None:
    assert amounts(CacheConfig()) == Amounts(10, 1000, False)
    assert amounts(CacheConfig(), labelled=100).weak_views == 200
    assert amounts(CacheConfig(), labelled=5000, steps=10**6, free=1e13).weak_views == 64


def test_weak_views_are_no_more_than_a_run_can_show() -> None:
    assert amounts(CacheConfig(), steps=100).weak_views == 80, "100 steps of 16 over 20 tiles"


def test_seeds_fit_the_space_given() -> None:
    budget = (20 * 64 + 1000 * 5) * VIEW / 1e9
    found = amounts(CacheConfig(max_gb=budget, weak_views=64))
    assert found.strong_seeds == 5
    half_free = amounts(CacheConfig(weak_views=64), free=2 * budget * 1e9)
    assert half_free.strong_seeds == 5, "without --max-gb, half of the free space"


def test_fewer_than_three_seeds_stop_with_the_ways_out_priced() -> None:
    with pytest.raises(ConfigError) as error:
        amounts(CacheConfig(max_gb=6, weak_views=64))
    text = str(error.value)
    assert "fewer than 3 strong seeds of 1,000 tiles" in text
    assert f"{(3 * 1000 + 20 * 64) * VIEW / 1e9:.1f} GB" in text
    assert "--seeds 1 or 2" in text
    assert "--max-gb 11" in text
    assert "--codec int4 (0.56 of the bytes" in text
    with pytest.raises(ConfigError) as smallest:
        amounts(CacheConfig(codec="int4", max_gb=6, weak_views=64))
    assert "--codec" not in str(smallest.value)


def test_asked_numbers_are_taken_as_they_are() -> None:
    assert amounts(CacheConfig(seeds=1, weak_views=7, plain=True, max_gb=0.001)) == Amounts(1, 7, True)


def test_auto_keeps_what_the_store_was_made_for_however_full_the_disk() -> None:
    def auto(held: int, *, free: int) -> Amounts:
        def missing(a: Amounts) -> int:
            return max(a.strong_seeds - held, 0) * 1000 + max(a.weak_views - 64, 0) * 20

        return resolve_amounts(
            cache=CacheConfig(),
            train=TrainConfig(),
            pool=1000,
            labelled=20,
            bytes_per_view=SIZES,
            free_bytes=free,
            done_bytes=0,
            missing=missing,
        )

    assert auto(5, free=0) == Amounts(5, 64, False)
    assert auto(2, free=0).strong_seeds == 2, "fewer than auto would begin with, but they are there"
    assert auto(2, free=10**12).strong_seeds == 10
    with pytest.raises(ConfigError, match="fewer than 3 strong seeds"):
        auto(0, free=0)


def test_the_plan_adds_up() -> None:
    plan = make_plan(
        amounts=Amounts(4, 10, True),
        pool=100,
        labelled=20,
        views={"strong": 400, "weak": 250, "plain": 100},
        new_views=400,
        new_features={"dense": 130, "coarse": 400},
        bytes_per_view=SIZES,
        stored_bytes=10**9,
        shard_views=64,
        free_bytes=10**12,
        seconds_per_view=0.5,
    )
    assert plan.new_bytes == 130 * 2_000_000 + 400 * 500_000
    assert plan.store_bytes == 10**9 + plan.new_bytes
    assert plan.new_files == 3 * (3 + 7) + 7
    assert plan.hours == pytest.approx(400 * 0.5 / 3600)
    assert plan.epochs_to_break_even == 3.5, "an online epoch of 100 tiles is 200 teacher views"
    assert "400 strong + 250 weak + 100 plain = 750; 400 to compute" in plan.text()
