"""What a store lacks: counted per tile, also where seeds were removed and others stayed."""

from __future__ import annotations

from rsmtdf.stages.cache.grow import Addition, plan_growth


def lacking(have, *, pool=(), labelled=("a", "b"), strong_seeds=0, weak_views=4, plain=False):
    return plan_growth(
        have, pool=pool, labelled=labelled, strong_seeds=strong_seeds, weak_views=weak_views, plain=plain
    )


def test_an_empty_store():
    assert lacking({}, pool=("b", "c"), strong_seeds=2, weak_views=3, plain=True) == [
        Addition(stream="strong", seeds=range(1), tiles=("b", "c")),
        Addition(stream="strong", seeds=range(1, 2), tiles=("b", "c")),
        Addition(stream="weak", seeds=range(3), tiles=("a", "b")),
        Addition(stream="plain", seeds=range(1), tiles=("a", "b", "c")),
    ]


def test_more_weak_views_and_more_tiles():
    assert lacking({"weak": {"a": {0, 1}}}) == [
        Addition(stream="weak", seeds=range(4), tiles=("b",)),
        Addition(stream="weak", seeds=range(2, 4), tiles=("a",)),
    ]
    assert lacking({"weak": {"a": set(range(9)), "b": set(range(4))}}) == []


def test_removed_weak_seeds_are_the_first_to_come_back():
    """Never a seed that is there: the store refuses a view twice."""
    have = {"weak": {"a": {0, 2, 3}, "b": {0, 2, 3}}}
    assert lacking(have) == [Addition(stream="weak", seeds=range(1, 2), tiles=("a", "b"))]
    assert lacking(have, weak_views=6) == [
        Addition(stream="weak", seeds=range(1, 2), tiles=("a", "b")),
        Addition(stream="weak", seeds=range(4, 6), tiles=("a", "b")),
    ]
    assert lacking({"weak": {"a": {1, 7}, "b": {0, 1, 2, 3}}}) == [
        Addition(stream="weak", seeds=range(1), tiles=("a",)),
        Addition(stream="weak", seeds=range(2, 3), tiles=("a",)),
    ]


def test_a_removed_strong_seed_comes_back():
    assert lacking({"strong": {"a": {0, 2}, "b": {0, 2}}}, pool=("a", "b"), labelled=(), strong_seeds=3) == [
        Addition(stream="strong", seeds=range(1, 2), tiles=("a", "b"))
    ]
