"""Keyed randomness: the words are Philox's, the numbers are frozen, and nothing but the key changes them."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsmtdf.keyed import Draws, key_seed, key_words

MASK = 2**64 - 1
parts = st.lists(st.one_of(st.text(max_size=12), st.integers(-(2**40), 2**40)), min_size=1, max_size=4)


def philox4x64(counter: list[int], key: tuple[int, int]) -> list[int]:
    """Ten rounds of Philox4x64 (Salmon et al. 2011, section 3.3) in plain integers."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
        x0, x1, x2, x3 = (p1 >> 64) ^ x1 ^ k0, p1 & MASK, (p0 >> 64) ^ x3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [x0, x1, x2, x3]


def words(n: int, *key: str | int) -> list[int]:
    draws = Draws(*key)
    return [draws.word() for _ in range(n)]


# --- the words --------------------------------------------------------------------------------------------------


def test_oracle_agrees_with_the_published_known_answers():
    # Random123's kat_vectors, philox 4x64, 10 rounds.
    assert philox4x64([0, 0, 0, 0], (0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@given(parts)
def test_words_are_philox_of_the_hashed_key(key):
    blob = hashlib.blake2b(json.dumps(key, separators=(",", ":")).encode(), digest_size=16).digest()
    expected_key = (int.from_bytes(blob[:8], "little"), int.from_bytes(blob[8:], "little"))
    assert key_words(*key) == expected_key
    # NumPy steps the counter before it makes a block, so the first block is that of counter 1.
    expected = [w for block in range(1, 11) for w in philox4x64([block, 0, 0, 0], expected_key)]
    assert words(40, *key) == expected


def test_golden_numbers():
    """Frozen: a change here is a change of every view ever cached."""
    assert key_words("a", 1) == (15509963789031656520, 5341913124130339930)
    assert key_words("tile/0_0", "strong", 7) == (2396417904504788588, 2389578421058978060)
    assert key_seed("x") == 6597241887223470881
    d = Draws("golden", 1)
    assert [d.unit() for _ in range(3)] == [0.2353352321042501, 0.9030503941334982, 0.636274255984488]
    assert d.integer(-3, 3) == 0
    assert d.chance(0.5) is True
    assert d.uniform(2, 4) == 3.0607217455573266
    assert d.permutation(8).tolist() == [0, 1, 3, 2, 7, 4, 6, 5]
    assert d.choose(list("abcdef"), 3) == ["e", "b", "a"]
    assert d.units(2).tolist() == [0.14440266853188055, 0.036424089786149305]


def test_keys_tell_parts_types_and_order_apart():
    keys = [("a", 1), ("a1",), ("a", "1"), (1, "a"), ("a",), ("a", 1, ""), (1,), ("1",), ("ä",), ("a\u0308",)]
    assert len({key_words(*key) for key in keys}) == len(keys)


def test_key_seed_fits_every_library():
    assert all(0 <= key_seed("s", i) < 2**63 for i in range(200))
    assert len({key_seed("s", i) for i in range(200)}) == 200


# --- nothing but the key matters --------------------------------------------------------------------------------


@given(parts, parts)
def test_interleaved_streams_do_not_touch_each_other(a, b):
    first, second = Draws(*a), Draws(*b)
    pairs = [(first.word(), second.word()) for _ in range(40)]
    assert [p[0] for p in pairs] == words(40, *a)
    assert [p[1] for p in pairs] == words(40, *b)


def test_global_generators_neither_change_the_draws_nor_are_changed_by_them():
    before = words(8, "k")
    np.random.seed(1)  # noqa: NPY002 - the global generator is what must not matter
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert words(8, "k") == before
    Draws("k").permutation(100)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_another_process_draws_the_same(run_python):
    code = "from rsmtdf.keyed import Draws; d = Draws('tile', 3); print([d.word() for _ in range(5)])"
    assert json.loads(run_python(code)) == words(5, "tile", 3)


@given(st.lists(st.sampled_from(["word", "unit", "chance", "integer", "units3", "permutation5"]), max_size=30))
def test_every_draw_takes_its_stated_number_of_words(calls):
    """The sequence is one tape of words: block calls take n of them, whatever was buffered before."""
    d = Draws("tape")
    taken = 0
    for call in calls:
        match call:
            case "word":
                d.word()
            case "unit":
                d.unit()
            case "chance":
                d.chance(0.0)
            case "integer":
                d.integer(0, 9)
            case "units3":
                d.units(3)
            case "permutation5":
                d.permutation(5)
        taken += {"units3": 3, "permutation5": 5}.get(call, 1)
    assert d.word() == words(taken + 1, "tape")[-1]


def test_units_equal_repeated_unit():
    one, many = Draws("u"), Draws("u")
    assert many.units(100).tolist() == [one.unit() for _ in range(100)]


# --- the distributions ------------------------------------------------------------------------------------------


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


# The key is fixed, so these never flicker; the bounds are the 0.1 % and 99.9 % points of chi-square.
def test_units_are_uniform():
    u = Draws("chi").units(20_000)
    assert ((u >= 0) & (u < 1)).all()
    assert 8.3 < chi_square(np.histogram(u, 24, (0, 1))[0]) < 49.7  # 23 degrees of freedom
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.025


def test_integers_are_uniform_and_reach_both_ends():
    d = Draws("chi", "integer")
    drawn = np.array([d.integer(-3, 7) for _ in range(11_000)])
    assert (drawn.min(), drawn.max()) == (-3, 7)
    assert 1.4 < chi_square(np.bincount(drawn + 3, minlength=11)) < 29.6  # 10 degrees of freedom


def test_first_draws_of_neighbouring_keys_are_uniform():
    first = np.array([Draws("tile", i).unit() for i in range(4_000)])
    assert 2.0 < chi_square(np.histogram(first, 12, (0, 1))[0]) < 31.3  # 11 degrees of freedom


@given(st.integers(-(10**6), 10**6), st.integers(0, 10**6), parts)
def test_integers_stay_inside(low, width, key):
    d = Draws(*key)
    assert all(low <= d.integer(low, low + width) <= low + width for _ in range(5))


def test_integer_of_one_value():
    assert Draws("x").integer(4, 4) == 4


@pytest.mark.parametrize(("p", "expected"), [(0.0, 0), (1.0, 1000)])
def test_chance_at_its_ends(p, expected):
    d = Draws("p")
    assert sum(d.chance(p) for _ in range(1000)) == expected


def test_chance_has_its_probability():
    d = Draws("p", "inner")
    assert abs(sum(d.chance(0.2) for _ in range(5000)) / 5000 - 0.2) < 0.02


# --- permutations -----------------------------------------------------------------------------------------------


@given(st.integers(0, 300), parts)
def test_permutation_is_one(n, key):
    p = Draws(*key).permutation(n)
    assert p.dtype == np.int64
    assert sorted(p.tolist()) == list(range(n))


def test_permutations_are_uniform():
    counts = np.zeros(24)
    seen: dict[tuple[int, ...], int] = {}
    for i in range(4_800):
        counts[seen.setdefault(tuple(Draws("perm", i).permutation(4).tolist()), len(seen))] += 1
    assert len(seen) == 24
    assert 8.3 < chi_square(counts) < 49.7


@given(st.integers(1, 40), st.data())
def test_choose_is_a_prefix_of_a_larger_choice(n, data):
    """The nested label lists (1 % in 5 % in 10 %) rest on this."""
    items = [f"t{i:03d}" for i in range(n)]
    small = data.draw(st.integers(0, n))
    large = data.draw(st.integers(small, n))
    few, many = Draws("list").choose(items, small), Draws("list").choose(items, large)
    assert many[:small] == few
    assert len(set(many)) == large


def test_choose_never_gives_more_than_there_is():
    assert sorted(Draws("x").choose(["a", "b"], 5)) == ["a", "b"]
