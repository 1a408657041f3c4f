"""Training's features from a bucket: the same as from a disk, ahead, whatever goes wrong on the way."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from rsmtdf.errors import StoreCorrupt, StoreError
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.store import FeatureStore


def load_kit():
    file = Path(__file__).parents[1] / "store" / "conftest.py"
    spec = importlib.util.spec_from_file_location("store_kit", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Kit()


@pytest.fixture
def kit():
    return load_kit()


@pytest.fixture
def local(kit, tmp_path) -> FeatureStore:
    return kit.full(tmp_path / "feats.zarr", codec="int8")


@pytest.fixture
def remote(local, place) -> FeatureStore:
    for file in local.path.rglob("*"):
        if file.is_file() and file.name != "locks":
            (place / file.relative_to(local.path).as_posix()).write_bytes(file.read_bytes())
    return FeatureStore.open(place)


def test_a_stream_from_a_bucket_with_trouble_on_the_way(kit, local, remote, faults):
    rows = kit.rows(local)
    batches = [np.random.default_rng(k).choice(rows, 5) for k in range(8)]
    with CachedFeatures(local, ["t"], device="cpu") as source:
        expected = [f["t"] for f in source.stream(batches)]
    with CachedFeatures(remote, ["t"], device="cpu", rows=rows) as source:
        faults.at_random(share=0.2, seed=1)
        found = [f["t"] for f in source.stream(batches, ahead=3)]
        assert faults.met
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_bucket_that_is_gone_is_no_damage(kit, remote, faults):
    with CachedFeatures(remote, ["t"], device="cpu") as source:
        faults.answer(500, times=10_000)
        with pytest.raises(StoreError, match=r"view 12 .*c\.3\.0\.0: .*failed.*run the same command again") as caught:
            source.fetch(np.array([12]))
        assert not isinstance(caught.value, StoreCorrupt)
        faults.clear()
        source.fetch(np.array([12]))


def test_damage_and_the_fallback(kit, local, remote, place):
    rows = kit.rows(local)
    with FeatureReader(local, "t") as a, FeatureReader(remote, "t", force_zarr=True) as b:
        one, other = a.get_many(rows), b.get_many(rows)
        assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in other.items()}
    shard = place / "teachers" / "t" / "codes" / "c.3.0.0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(bytes(data))
    for force_zarr in (False, True):
        with CachedFeatures(remote, ["t"], device="cpu", force_zarr=force_zarr) as source:
            with pytest.raises(StoreCorrupt, match=rf"view 12 .*file {shard}: .*rsmtdf cache repair {place}"):
                source.fetch(np.array([0, 12]))
            source.fetch(np.array([0, 13]))
