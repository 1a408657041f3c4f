"""What the stages ask of a store: coverage, generations, weak rows by tile, strong pairs by seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rsmtdf.errors import StoreIncomplete
from rsmtdf.specs import DatasetSpec, ViewRecipe
from rsmtdf.store.queries import coverage, next_generation, strong_pairs, weak_rows
from rsmtdf.store.segments import NewSegment
from rsmtdf.store.store import FeatureStore

DATASET = DatasetSpec(name="x", classes=("a",), palette=((0, 0, 0),))


def segment(stream: str, tiles: list[str], *, seed: int = 0, seeds: int = 1, generation: int = 0) -> NewSegment:
    rows = len(tiles) * seeds
    partner = np.arange(rows)
    if stream == "strong":
        even = rows - rows % 2
        partner[:even] = np.arange(even) ^ 1
    return NewSegment(
        stream=stream, seed_start=seed, seeds=seeds, generation=generation, tile_ids=tuple(tiles),
        columns={"hflip": np.zeros(rows, np.uint8)}, partner=partner,
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    store = FeatureStore.create(
        tmp_path / "s.zarr", recipe=ViewRecipe(), dataset=DATASET, data_root="", experiment={}, shard_views=4
    )
    store.extend(
        [
            segment("strong", ["a", "b", "c"], seed=0),
            segment("strong", ["c", "a", "b"], seed=1),
            segment("weak", ["a", "b"], seeds=3),
            segment("strong", ["d", "e"], seed=0, generation=1),
            segment("weak", ["a"], seed=3, seeds=2, generation=1),
        ]
    )
    return store


def named(store: FeatureStore, rows: np.ndarray) -> list[str]:
    return [store.tile_ids[int(store.column("tile")[r])] for r in np.ravel(rows)]


def test_coverage_and_generations(store: FeatureStore) -> None:
    assert coverage(store, "strong") == {"a": {0, 1}, "b": {0, 1}, "c": {0, 1}, "d": {0}, "e": {0}}
    assert coverage(store, "weak") == {"a": {0, 1, 2, 3, 4}, "b": {0, 1, 2}}
    assert coverage(store, "plain") == {}
    assert [next_generation(store, "strong", s) for s in (0, 1, 2)] == [2, 1, 0]


def test_weak_rows_are_each_tiles_by_seed(store: FeatureStore) -> None:
    table = weak_rows(store, ["b", "a"], np.ones(store.n_rows, bool))
    assert table.shape == (2, 5)
    assert table[0, 3:].tolist() == [-1, -1]
    assert set(named(store, table[0, :3])) == {"b"}
    assert set(named(store, table[1])) == {"a"}
    assert store.column("seed")[table[1]].tolist() == [0, 1, 2, 3, 4]


def test_unusable_weak_rows_are_left_out_and_a_tile_without_any_is_named(store: FeatureStore) -> None:
    usable = np.ones(store.n_rows, bool)
    usable[store.rows(stream="weak", seed=1)] = False
    assert (weak_rows(store, ["a"], usable) >= 0).sum() == 4
    with pytest.raises(StoreIncomplete, match=r"no finished weak views of 2 of 3 labelled tiles \(first: c, unknown\)"):
        weak_rows(store, ["a", "c", "unknown"], usable)


def test_weak_rows_of_many_tiles_search_once_and_convert_nothing(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of another dtype have the whole sorted column converted, 10 ms a search at 6 million rows."""
    keys: list[tuple[int, bool]] = []
    search = np.searchsorted

    def counted(values: np.ndarray, wanted: np.ndarray, **options: str) -> np.ndarray:
        keys.append((np.size(wanted), np.asarray(wanted).dtype == values.dtype))
        return search(values, wanted, **options)

    monkeypatch.setattr(np, "searchsorted", counted)
    assert (weak_rows(store, ["b", "a", "b"], np.ones(store.n_rows, bool)) >= 0).sum(axis=1).tolist() == [3, 5, 3]
    assert set(keys) == {(3, True)}
    assert len(keys) <= 2


def test_no_labelled_tile_is_an_empty_table(store: FeatureStore, tmp_path: Path) -> None:
    assert weak_rows(store, [], np.ones(store.n_rows, bool)).shape == (0, 0)
    empty = FeatureStore.create(
        tmp_path / "e.zarr", recipe=ViewRecipe(), dataset=DATASET, data_root="", experiment={}, shard_views=4
    )
    with pytest.raises(StoreIncomplete, match=r"no finished weak views of 1 of 1"):
        weak_rows(empty, ["a"], np.ones(0, bool))


def test_strong_pairs_span_generations_and_leave_the_lone_tile_out(store: FeatureStore) -> None:
    pairs = strong_pairs(store, {"a", "b", "c", "d", "e"}, np.ones(store.n_rows, bool))
    assert [named(store, p) for p in (pairs[0], pairs[1])] == [["a", "b", "d", "e"], ["c", "a"]]


def test_a_pair_goes_when_one_of_it_is_not_in_the_pool_or_not_usable(store: FeatureStore) -> None:
    usable = np.ones(store.n_rows, bool)
    assert [named(store, p) for p in strong_pairs(store, {"a", "b", "d"}, usable).values()] == [["a", "b"], []]
    usable[store.rows(stream="strong", seed=0)[0]] = False
    assert named(store, strong_pairs(store, {"a", "b", "c", "d", "e"}, usable)[0]) == ["d", "e"]
