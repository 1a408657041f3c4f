"""Verify and repair of a store in a bucket: damage is found and undone as on a disk, and an outage is none."""

from __future__ import annotations

import numpy as np
import pytest

from rsmtdf.errors import StoreCorrupt, StoreError
from rsmtdf.signals import StopFlag
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.repair import repair
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.verify import verify
from tests.store.conftest import Kit


@pytest.fixture
def kit() -> Kit:
    return Kit()


@pytest.fixture
def store(kit, place) -> FeatureStore:
    """18 views in 6 shards, int8, sealed."""
    store = kit.full(place, codec="int8")
    store.seal()
    return store


def flip(file) -> None:
    data = bytearray(file.read_bytes())
    data[9] ^= 1
    file.write_bytes(bytes(data))


def check(place):
    return verify(place, stop=StopFlag())


def test_a_sound_store(store, place):
    report = check(place)
    assert (report.damage, report.remarks) == ([], [])
    assert report.is_complete
    assert report.teachers["t"].checked == 18


NAMES = [
    "teachers/t/codes/c.0.0.0",
    "teachers/t/token_scale/c.3.0",
    "teachers/t/status/c.2",
    "teachers/t/status/sealed",
    "views/tile/c.0",
    "views/seed/zarr.json",
    "provenance/t/1.json",
    "provenance/twins/zarr.json",
]


def test_damage_is_found_and_undone(kit, store, place):
    rows = kit.rows(store)
    with CachedFeatures(store, ["t"], device="cpu") as source:
        truth = source.fetch(rows)["t"].numpy()
    for name in NAMES:
        flip(place / name)
    (place / "teachers/t/codes/c.4.0.0").unlink()
    assert {str(d.file) for d in check(place).damage} == {
        str(place / name) for name in [*NAMES, "teachers/t/codes/c.4.0.0"]
    }
    report = repair(place, stop=StopFlag())
    assert report.not_repaired == []
    assert report.withdrawn == {"t": [0, 8, 9, 12, 16]}
    assert check(place).is_sound
    store = FeatureStore.open(place, writable=True)
    assert kit.fill(store) == [0, 2, 3, 4]
    assert check(place).is_complete
    with CachedFeatures(FeatureStore.open(place), ["t"], device="cpu") as source:
        assert np.array_equal(source.fetch(rows)["t"].numpy(), truth)


def test_an_outage_is_no_damage(store, place, faults):
    before = store.status("t")
    faults.answer(500, times=2, part="codes")
    assert check(place).is_sound, "requests are tried again"
    faults.answer(503, times=10_000, part="codes")
    for act in (verify, repair):
        with pytest.raises(StoreError, match="Nothing is known to be wrong") as caught:
            act(place, stop=StopFlag())
        assert not isinstance(caught.value, StoreCorrupt)
    faults.clear()
    assert np.array_equal(store.status("t"), before)
