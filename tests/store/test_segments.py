from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rsmtdf.errors import StoreError
from rsmtdf.store.segments import plan_growth, view_keys


def plan(new, **changes):
    fields = {"n_rows": 8, "shard_views": 4, "tile_index": {"scène/1_0": 0}, "column_types": {}, "taken": {}}
    return plan_growth(new, **(fields | changes))


def test_rows_are_seed_major_and_start_at_shards(kit):
    growth = plan([kit.weak(3, seeds=2), kit.strong(5)])
    weak, strong = growth.segments
    assert (weak.row_start, weak.rows, weak.row_stop) == (8, 6, 14)
    assert (strong.row_start, strong.rows) == (16, 5)
    assert growth.n_rows == 24
    assert growth.new_tiles == ("scène/0_0", "scène/2_0", "scène/4_0", "scène/3_0")
    np.testing.assert_array_equal(growth.columns["tile"][:8], [1, 0, 2, 1, 0, 2, -1, -1])
    np.testing.assert_array_equal(growth.columns["seed"][:6], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(growth.columns["partner"][8:16], [17, 16, 19, 18, 20, -1, -1, -1])
    np.testing.assert_array_equal(growth.columns["stream"][8:], [2] * 5 + [0] * 3)
    assert np.isnan(growth.columns["blur"][:8]).all()
    assert growth.columns["blur"].dtype == np.float32
    assert list(weak.seed_rows(1)) == [11, 12, 13]


def test_ids_may_be_given_for_every_row(kit):
    short = kit.weak(3, seeds=2)
    long = dataclasses.replace(short, tile_ids=short.tile_ids * 2)
    assert plan([short]).segments == plan([long]).segments


def test_the_tile_lists_order_is_part_of_the_segment(kit):
    a = kit.weak(3)
    b = dataclasses.replace(a, tile_ids=a.tile_ids[::-1])
    assert plan([a]).segments[0].tiles_sha256 != plan([b]).segments[0].tiles_sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 3}, "10 rows cannot be 3 equal seeds"),
        ({"tile_ids": ("a", "b")}, "2 tile ids, expected 5"),
        ({"tile_ids": ("a",) * 5}, "named twice"),
        ({"partner": np.arange(10)[::-1] // 2}, "partner"),
        ({"partner": np.arange(10) + 1}, "partner"),
        ({"partner": np.arange(10) * 1.0}, "partner"),
        ({"columns": {"x": np.zeros(3)}}, "'x' has shape"),
        ({"columns": {"tile": np.zeros(10)}}, "'tile' cannot be a parameter"),
        ({"columns": {"a/b": np.zeros(10)}}, "'a/b' cannot be a parameter"),
        ({"columns": {"x": np.array(["a"] * 10)}}, "numbers or bool"),
        ({"stream": "medium"}, "no such stream"),
        ({"seed_start": -1}, "seeds must lie"),
    ],
)
def test_contradictions_are_refused(kit, change, message):
    with pytest.raises(StoreError, match=message):
        plan([dataclasses.replace(kit.weak(), **change)])


def test_columns_keep_their_type(kit):
    with pytest.raises(StoreError, match="'scale' is float32 in the store, but float64"):
        plan([kit.weak()], column_types={"scale": "float32"})


def test_views_are_there_once(kit):
    with pytest.raises(StoreError, match="already has the weak view of tile 'scène/0_0' under seed 1"):
        plan([kit.weak(seeds=2), kit.weak(seeds=1, start=1, generation=1)])
    taken = {"weak": view_keys(np.array([0]), np.array([1]))}
    with pytest.raises(StoreError, match="already has the weak view of tile 'scène/1_0' under seed 1 \\(1 such"):
        plan([kit.weak()], taken=taken)
    plan([kit.weak(), kit.weak(start=2), kit.strong(), kit.strong(seed=1)])
