from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsmtdf.errors import ConfigError, DatasetError
from rsmtdf.specs import ViewRecipe
from rsmtdf.views.matching import match_pool

RECIPE = ViewRecipe()
POOLS = st.sets(st.text(min_size=1, max_size=6), max_size=40).map(sorted)


def partners(ids: list[str], *, stream: str = "strong", seed: int = 0, generation: int = 0) -> dict[str, str]:
    order, partner = match_pool(RECIPE, tile_ids=ids, stream=stream, seed=seed, generation=generation)
    return {ids[order[r]]: ids[order[partner[r]]] for r in range(len(ids))}


@given(POOLS, st.sampled_from(["strong", "strong2"]), st.integers(0, 99))
def test_the_partner_of_the_partner_is_oneself(ids: list[str], stream: str, seed: int) -> None:
    order, partner = match_pool(RECIPE, tile_ids=ids, stream=stream, seed=seed, generation=0)
    assert order.dtype == partner.dtype == np.int64
    assert sorted(order.tolist()) == list(range(len(ids)))
    rows = np.arange(len(ids))
    np.testing.assert_array_equal(partner[partner], rows)
    alone = rows[partner == rows].tolist()
    assert alone == ([len(ids) - 1] if len(ids) % 2 else [])
    np.testing.assert_array_equal(partner // 2, rows // 2)  # pairs are adjacent, so no batch of pairs cuts one


@given(POOLS, st.randoms(use_true_random=False))
def test_only_the_set_of_ids_counts(ids: list[str], random) -> None:
    shuffled = random.sample(ids, len(ids))
    for stream in ("strong", "weak"):
        a, _ = match_pool(RECIPE, tile_ids=ids, stream=stream, seed=1, generation=0)
        b, _ = match_pool(RECIPE, tile_ids=shuffled, stream=stream, seed=1, generation=0)
        assert [ids[i] for i in a] == [shuffled[i] for i in b]


@pytest.mark.parametrize("stream", ["plain", "weak"])
def test_streams_without_a_box_are_sorted_and_have_no_partner(stream: str) -> None:
    ids = ["b", "c", "a"]
    order, partner = match_pool(RECIPE, tile_ids=ids, stream=stream, seed=0, generation=0)
    assert [ids[i] for i in order] == ["a", "b", "c"]
    assert partner.tolist() == [0, 1, 2]


def test_every_seed_stream_and_generation_is_matched_anew() -> None:
    ids = [f"t{i}" for i in range(100)]
    reference = partners(ids)
    for other in ({"seed": 1}, {"stream": "strong2"}, {"generation": 1}):
        same = sum(reference[i] == mate for i, mate in partners(ids, **other).items())
        assert same < 10


def test_partners_are_spread_over_the_pool() -> None:
    ids = [f"t{i:03d}" for i in range(20)]
    met = {partners(ids, seed=seed)["t000"] for seed in range(200)}
    assert met == set(ids) - {"t000"}


def test_a_pool_grown_twice_keeps_every_earlier_view() -> None:
    generations = [[f"g{g}/{i}" for i in range(n)] for g, n in enumerate((11, 7, 4))]
    before = [partners(ids, generation=g) for g, ids in enumerate(generations[:1])]
    after = [partners(ids, generation=g) for g, ids in enumerate(generations)]
    assert after[:1] == before
    for ids, matched in zip(generations, after, strict=True):
        assert set(matched) == set(matched.values()) == set(ids)


def test_an_id_given_twice_is_named() -> None:
    with pytest.raises(DatasetError, match=r"'a'.*twice"):
        match_pool(RECIPE, tile_ids=["a", "b", "a"], stream="strong", seed=0, generation=0)


def test_an_unknown_stream_of_a_pool_is_named() -> None:
    with pytest.raises(ConfigError, match="'mild'"):
        match_pool(RECIPE, tile_ids=["a"], stream="mild", seed=0, generation=0)  # type: ignore[arg-type]


def test_another_process_matches_the_same(run_python) -> None:
    code = (
        "from rsmtdf.specs import ViewRecipe\n"
        "from rsmtdf.views.matching import match_pool\n"
        "ids = [f't{i}' for i in range(31)]\n"
        "order, _ = match_pool(ViewRecipe(), tile_ids=ids, stream='strong', seed=4, generation=2)\n"
        "print(','.join(map(str, order)))\n"
    )
    here, _ = match_pool(RECIPE, tile_ids=[f"t{i}" for i in range(31)], stream="strong", seed=4, generation=2)
    assert run_python(code).strip() == ",".join(map(str, here))
    assert here[:5].tolist() == [11, 0, 26, 24, 1], "the matching is part of every store: bump ViewRecipe.version"
