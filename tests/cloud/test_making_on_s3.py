"""Making stores in a bucket: whole or not at all, once, and never on top of what an earlier attempt has left."""

from __future__ import annotations

import json
import time

import pytest

from rsmtdf.errors import StoreError, StoreNotFound
from rsmtdf.objects import store_path
from rsmtdf.signals import StopFlag
from rsmtdf.store import growth, repair
from rsmtdf.store.leases import ObjectLocks
from rsmtdf.store.merge import merge
from rsmtdf.store.recode import recode
from rsmtdf.store.status import TODO, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.verify import verify
from tests.store.conftest import Kit


class Kill(BaseException):
    """What ends a process at once."""


@pytest.fixture
def kit() -> Kit:
    return Kit()


def test_what_a_killed_recode_has_left_is_not_taken_for_the_next_stores(kit, place, tmp_path, monkeypatch):
    kit.full(tmp_path / "a")

    def killed(*_args: object) -> bool:
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(growth, "commit_first", killed)
        with pytest.raises(Kill):
            recode(tmp_path / "a", place, codec="int8", stop=StopFlag())
    store = kit.create(place)
    store.extend([kit.strong(6, seed=3, first_tile=30)])
    assert (state_of(store.view_status())[kit.rows(store)] == TODO).all()
    kit.add_teacher(store)
    kit.fill(store)
    report = verify(place, stop=StopFlag())
    assert (report.damage, report.remarks) == ([], [])


def test_who_comes_too_late_leaves_the_store_of_the_other_alone(kit, place, monkeypatch):
    """B looked before A had made, grown and filled the store, and makes its own after."""
    make = growth.make_whole

    def late(path, fill):
        monkeypatch.setattr(growth, "make_whole", make)
        other = kit.create(path)
        other.extend([kit.weak(40)])
        kit.add_teacher(other)
        kit.fill(other)
        return make(path, fill)

    monkeypatch.setattr(growth, "make_whole", late)
    with pytest.raises(StoreError, match="something is there already"):
        kit.create(place)
    assert verify(place, stop=StopFlag()).damage == []
    assert FeatureStore.open(place).n_views == 80


def test_a_repair_that_stood_still_too_long_changes_nothing(kit, place, monkeypatch):
    """Another process has taken over, mended the shard and goes on working when this one wakes up."""
    kit.full(place)
    damaged = place / "teachers/t/features/c.0.0.0"
    good = damaged.read_bytes()
    damaged.write_bytes(b"damaged")
    monkeypatch.setattr(
        repair, "locks_of", lambda path: ObjectLocks(store=path, folder=path / "provenance", lease_s=2.0)
    )
    slept = []

    def progress(done: int, total: int) -> None:
        if not slept:
            slept.append(done)
            for name in (place / "provenance/claims").names():
                (place / "provenance/claims" / name).unlink()
            (place / "provenance/mutex").write_bytes(
                json.dumps({"owner": "process 7 on x", "key": "x", "beat": 1}).encode()
            )
            damaged.write_bytes(good)
            time.sleep(2.5)

    with pytest.raises(StoreError):
        repair.repair(place, stop=StopFlag(), progress=progress)
    assert FeatureStore.open(place).usable(["t"])[:4].all()


def test_merging_in_a_bucket_tells_what_it_did(kit, place):
    a, b = place / "a", place / "b"
    store = kit.create(a)
    store.extend([kit.weak()])
    kit.add_teacher(store)
    kit.fill(store)
    other = kit.create(b)
    other.extend([kit.weak(start=5)])
    kit.add_teacher(other)
    kit.fill(other)
    report = merge(a, b, stop=StopFlag())
    assert report.as_dict()["store"] == str(a)
    assert FeatureStore.open(a).n_views == 20
    assert verify(a, stop=StopFlag()).damage == []


def test_a_bucket_that_is_not_there(kit, place):
    nowhere = store_path("s3://no-such-bucket/x.zarr", retry_s=2)
    with pytest.raises(StoreNotFound, match=r"no feature store at s3://no-such-bucket/x\.zarr"):
        FeatureStore.open(nowhere)
    with pytest.raises(StoreError, match=r"feature store s3://no-such-bucket/x\.zarr: .*NoSuchBucket"):
        kit.create(nowhere)
    with pytest.raises(StoreError):
        verify(nowhere, stop=StopFlag())
