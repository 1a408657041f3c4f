"""The plan: counts, bytes, and how many seeds fit, with the ways out priced where too few do."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from rsmtdf.config import CacheConfig, TrainConfig
from rsmtdf.errors import ConfigError
from rsmtdf.stages.plan import (
    Amounts,
    Cost,
    Pace,
    Plan,
    TrainingPace,
    make_plan,
    plan_text,
    resolve_amounts,
    size_text,
)
from rsmtdf.stages.plan.units import count_text

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
    assert f"--max-gb {math.ceil((3 * 1000 + 20 * 64) * VIEW / 1e6) / 1000:g}, with" in text
    assert f"--codec int4 ({size_text(0.56 * (3 * 1000 + 20 * 64) * VIEW)}, 0.56 of the bytes" in text
    fits = int((6e9 / VIEW - 20 * 64) // 3)
    assert f"--pool {fits} " in text
    assert amounts(CacheConfig(max_gb=6, weak_views=64), pool=fits).strong_seeds == 3, "the way out is one"
    with pytest.raises(ConfigError):
        amounts(CacheConfig(max_gb=6, weak_views=64), pool=fits + 1)
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


def planned(*, train: TrainConfig | None = None, new: int = 400) -> Plan:
    return make_plan(
        amounts=Amounts(4, 10, True),
        train=train or TrainConfig(steps=50, batch=16),
        pool=100,
        labelled=20,
        views={"strong": 400, "weak": 250, "plain": 100},
        new_views=new,
        new_features={"dense": 130, "coarse": new},
        codec="int8",
        codec_sizes={"int8": SIZES, "fp16": {name: 2 * n for name, n in SIZES.items()}},
        new_shards={"dense": 3, "coarse": 7, "views": 7},
        files_per_shard=4,
        stored_bytes=10**9,
        shard_views=64,
        free_bytes=10**12,
    )


def test_the_plan_adds_up() -> None:
    plan = planned()
    assert plan.new_bytes == 130 * 2_000_000 + 400 * 500_000
    assert plan.store_bytes == 10**9 + plan.new_bytes
    assert plan.new_files == {"dense": 12, "coarse": 28, "views": 7}
    assert plan.codec_bytes["fp16"] == {"dense": 750 * 4_000_000, "coarse": 750 * 1_000_000}
    assert (plan.hours, plan.outlook.hours, plan.outlook.peak_bytes) == (None, None, None)
    assert plan.outlook.epochs_to_break_even == 3.5, "700 views; an online epoch of 100 tiles is 200 teacher views"
    assert plan.outlook.runs_to_break_even == 700 / (50 * 32)
    text = plan_text(plan)
    assert "400 strong + 250 weak + 100 plain = 750 views; 400 to compute" in text
    assert re.search(r"^time +not measured$", text, re.MULTILINE)
    assert re.search(r"int8 +1\.50 GB +375 MB +1\.88 GB +<- chosen", text)
    assert re.search(r"fp16 +3\.00 GB +750 MB +3\.75 GB$", text, re.MULTILINE)
    assert "460 MB in 47 files to write, 1.46 GB then; 1.00 TB free" in text


def test_what_was_measured_replaces_the_count_of_teacher_passes() -> None:
    """Views, disk and statistics cost nothing here: teachers alone decide, 0.2 s a view on one of two cores."""
    free = Cost(wall=0.0, cpu=0.0)
    pace = Pace(
        device="cpu",
        cores=2,
        workers=2,
        batch=8,
        view=free,
        decode=free,
        teachers={"dense": Cost(wall=0.15, cpu=0.15), "coarse": Cost(wall=0.05, cpu=0.05)},
        encode={"dense": free, "coarse": free},
        write=free,
        read_bytes_per_second=VIEW / 0.1,
        build_seconds=0.0,
    )
    training = TrainingPace(device="cpu", step_seconds=4.0, micro_batches=8, peak_bytes=3 * 10**9)
    plan = planned().priced(pace, statistics={}, decodes=0.0, training=training)
    assert plan.hours == pytest.approx((130 * 0.15 + 400 * 0.05) / 3600)
    outlook = plan.outlook
    # 700 views at 0.2 s, against 0.2 s less 0.1 s of reading for each of an epoch's 200 views.
    assert outlook.epochs_to_break_even == pytest.approx(700 * 0.2 / (200 * 0.1))
    assert outlook.runs_to_break_even == pytest.approx(700 * 0.2 / (50 * 32 * 0.1))
    assert outlook.hours == pytest.approx(50 * 4 / 3600)
    assert outlook.read_bytes_per_second == pytest.approx(32 * VIEW / 4)
    text = plan_text(plan)
    assert "50 steps of recipe practical: about 3 min, 3.00 GB of memory on cpu (measured on one micro-batch)" in text
    assert "20.0 MB/s of features (80.0 MB a step); this disk read 25.0 MB/s" in text
    slow_disk = replace(pace, read_bytes_per_second=VIEW / 0.3)
    never = planned().priced(slow_disk, statistics={}, decodes=0.0)
    assert "pays off   never" in plan_text(never)
    json.dumps(never.as_dict(), allow_nan=False)


def test_a_budget_in_hours_needs_the_step_time() -> None:
    by_time = TrainConfig(budget="1h", batch=16)
    assert planned(train=by_time).outlook.steps is None
    assert planned(train=TrainConfig(budget="2k-steps", batch=16)).outlook.steps == 2000
    assert planned(train=TrainConfig(epochs=3, batch=16)).outlook.steps == 3 * (100 // 16)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 MB"),
        (15_000, "15 kB"),
        (999_400, "999 kB"),
        (999_600, "1.00 MB"),
        (8_400_000, "8.40 MB"),
        (84_000_000, "84.0 MB"),
        (999_000_000, "999 MB"),
        (999_960_000, "1.00 GB"),
        (1.337e9, "1.34 GB"),
        (9.996e9, "10.0 GB"),
        (123.4e9, "123 GB"),
        (2.1e12, "2.10 TB"),
    ],
)
def test_sizes_are_told_in_the_unit_that_fits(n: float, text: str) -> None:
    assert size_text(n) == text


def test_one_of_a_thing_is_no_plural() -> None:
    assert (count_text(1, "view"), count_text(0, "view"), count_text(1000, "file")) == (
        "1 view",
        "0 views",
        "1,000 files",
    )
