"""The schedule: a pure function of (seed, step), every view in its turn, pairs together, any cut the same batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsmtdf.errors import TrainingError
from rsmtdf.learning.sampler import Schedule


def make(
    *, seeds: int = 3, pairs: int = 10, labelled: int = 5, views: int = 4, batch: int = 8, seed: int = 0, **options: int
) -> Schedule:
    rows = {s: 1000 * (s + 1) + np.arange(2 * pairs).reshape(pairs, 2) for s in range(seeds)}
    weak = np.arange(labelled * views).reshape(labelled, views)
    return Schedule(pairs=rows, weak=weak, batch=batch, seed=seed, **options)


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    one, two = make(), make()
    ahead = [one.rows(s) for s in range(30)]
    for step in (29, 3, 17, 0):
        again = two.rows(step)
        assert np.array_equal(again.labelled, ahead[step].labelled)
        assert np.array_equal(again.strong, ahead[step].strong)
    assert not np.array_equal(make(seed=1).rows(0).strong, ahead[0].strong)


def test_an_epoch_shows_each_pair_once_of_one_seed() -> None:
    schedule = make(pairs=12, batch=8)
    assert schedule.steps_per_epoch == 3
    rows = np.concatenate([schedule.rows(s).strong for s in range(3)])
    assert len(set(rows.tolist())) == 24
    assert len({r // 1000 for r in rows.tolist()}) == 1


def test_seeds_cycle_without_replacement() -> None:
    schedule = make(seeds=4)
    for cycle in range(3):
        assert {schedule.strong_seed(4 * cycle + i) for i in range(4)} == {0, 1, 2, 3}
    orders = {tuple(schedule.strong_seed(4 * c + i) for i in range(4)) for c in range(6)}
    assert len(orders) > 1, "each cycle has its own order"


def test_labelled_tiles_and_their_views_come_round_evenly() -> None:
    schedule = make(labelled=5, views=4, batch=10)
    rows = np.concatenate([schedule.rows(s).labelled for s in range(2)])
    assert sorted(rows // 4) == sorted(list(range(5)) * 4), "20 images: each of 5 tiles four times"
    assert len(set(rows.tolist())) == 20, "and each time another view"


@given(st.sampled_from([(1, 4), (2, 2), (4, 1)]), st.integers(0, 40))
def test_ranks_and_accumulation_only_cut_the_batch(cut: tuple[int, int], step: int) -> None:
    world, _ = cut
    whole = make(batch=8).rows(step)
    parts = [p for rank in range(world) for p in whole.micro_batches(2, rank=rank, world=world)]
    assert sorted(np.concatenate([p.strong for p in parts])) == sorted(whole.strong)
    assert sorted(np.concatenate([p.labelled for p in parts])) == sorted(whole.labelled)
    assert all(len(p.strong) == 2 and p.strong[1] == p.strong[0] + 1 for p in parts), "a pair stays together"


def test_tiles_with_fewer_weak_views_use_what_they_have() -> None:
    weak = np.array([[0, 1, 2, 3], [10, 11, -1, -1]])
    schedule = Schedule(pairs={0: np.arange(8).reshape(4, 2)}, weak=weak, batch=4, seed=0)
    rows = np.concatenate([schedule.rows(s).labelled for s in range(4)])
    assert set(rows.tolist()) == {0, 1, 2, 3, 10, 11}


def test_too_few_tiles_for_a_batch_says_how_many() -> None:
    with pytest.raises(TrainingError, match="a batch needs 32 unlabelled tiles, but the pool has only 20 in pairs"):
        make(pairs=10, batch=32)
    with pytest.raises(TrainingError, match="nothing to learn classes from"):
        make(labelled=0)


def epoch_rows(schedule: Schedule, epoch: int) -> np.ndarray:
    steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
    return np.concatenate([schedule.rows(s).strong for s in steps])


@given(st.integers(1, 5), st.integers(0, 6), st.sampled_from([2, 4, 8]))
def test_a_window_holds_few_shards_at_a_time_and_shows_every_pair(window: int, epoch: int, batch: int) -> None:
    shard_views = 8
    schedule = make(pairs=40, batch=batch, shard_views=shard_views, window=window)
    rows = epoch_rows(schedule, epoch)
    assert sorted(rows) == sorted(epoch_rows(make(pairs=40, batch=batch), epoch)), "the same views, once each"
    assert (rows[1::2] == rows[::2] + 1).all(), "partners together"
    shards = rows // shard_views
    for first in range(0, len(rows), shard_views * window):
        assert len(set(shards[first : first + shard_views * window].tolist())) <= window
    again = make(pairs=40, batch=batch, shard_views=shard_views, window=window)
    last = (epoch + 1) * schedule.steps_per_epoch - 1
    assert np.array_equal(again.rows(last).strong, rows[-batch:]), "whatever was asked for before"


def test_windows_are_shuffled_anew_each_epoch() -> None:
    schedule = make(seeds=1, pairs=40, shard_views=8, window=2)
    one, two = epoch_rows(schedule, 0), epoch_rows(schedule, 1)
    assert not np.array_equal(one, two)
    assert list(dict.fromkeys((one // 8).tolist())) != list(dict.fromkeys((two // 8).tolist())), "shards in other order"
    first = one[:16:2]
    assert not np.array_equal(first, np.sort(first)), "pairs of a window are mixed"


def test_a_window_of_all_shards_is_the_full_shuffle_but_another_schedule() -> None:
    full, wide = make(pairs=40), make(pairs=40, shard_views=8, window=100)
    assert np.array_equal(epoch_rows(full, 2), epoch_rows(wide, 2))
    digests = {make(pairs=40, shard_views=8, window=w).digest() for w in (1, 2, 3)} | {full.digest()}
    assert len(digests) == 4
    assert full.digest() == make(pairs=40, shard_views=8).digest(), "runs that began without windows go on"
