"""Repair: damage of every kind is withdrawn or named, and good shards are left alone."""

from __future__ import annotations

import numpy as np
import pytest

from rsmtdf.errors import StoreCorrupt, StoreError
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.repair import repair
from rsmtdf.store.store import FeatureStore


@pytest.fixture
def path(kit, tmp_path):
    kit.full(tmp_path / "feats.zarr")
    return tmp_path / "feats.zarr"


def mend(path):
    return repair(path, stop=StopFlag(), progress=lambda done, total: None)


def flip(file, at: int = 9) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def is_whole(kit, path) -> bool:
    store = FeatureStore.open(path)
    rows = kit.rows(store)
    with CachedFeatures(store, ["t"], device="cpu") as source:
        found = source.fetch(rows)["t"].numpy()
    return all(np.array_equal(f, kit.feature("t", r).numpy()) for f, r in zip(found, rows.tolist(), strict=True))


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "another shard's"])
def test_a_bad_shard_is_withdrawn_and_can_be_filled(kit, path, damage, sealed):
    if sealed:
        FeatureStore.open(path, writable=True).seal()
    file = path / "teachers/t/features/c.3.0.0"
    if damage == "flipped":
        flip(file)
    elif damage == "missing":
        file.unlink()
    else:
        other = path / "teachers/t/features/c.0.0.0"
        file.write_bytes(other.read_bytes() if damage == "another shard's" else file.read_bytes()[:-7])
    report = mend(path)
    assert report.teachers["t"].withdrawn == {3}
    assert report.teachers["t"].checked == 18
    assert len(report.teachers["t"].damaged) == (1 if damage == "flipped" else 4)
    assert not report.is_sound
    assert kit.fill(FeatureStore.open(path, writable=True)) == [3]
    assert mend(path).is_sound
    assert is_whole(kit, path)


def test_damaged_status_words_of_a_teacher(kit, path):
    flip(path / "teachers/t/status/c.3")
    with pytest.raises(StoreCorrupt, match="rsmtdf cache repair"):
        FeatureStore.open(path).status("t")
    report = mend(path)
    assert report.teachers["t"].withdrawn == {3}
    assert [line.endswith("status/c.3: damaged; the shard was withdrawn") for line in report.status] == [True]
    assert kit.fill(FeatureStore.open(path, writable=True)) == [3]
    assert mend(path).is_sound
    assert is_whole(kit, path)


def test_damaged_status_words_of_the_views_withdraw_every_teacher(kit, path):
    """Features of pixels that nobody can vouch for any more are no targets."""
    store = FeatureStore.open(path, writable=True)
    kit.add_teacher(store, "u")
    kit.fill(store, ["u"])
    flip(path / "views/status/c.1")
    report = mend(path)
    assert [report.teachers[t].withdrawn for t in ("t", "u")] == [{1}, {1}]
    store = FeatureStore.open(path, writable=True)
    assert store.missing_teachers(["t", "u"]) == {1: ["t", "u"]}
    kit.fill(store, ["t", "u"])
    assert mend(path).is_sound
    assert is_whole(kit, path)


@pytest.mark.parametrize("array", ["views/status", "teachers/t/status"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_sealed_words_bring_a_chunk_back(kit, path, array, damage):
    FeatureStore.open(path, writable=True).seal()
    file = path / array / "c.2"
    good = file.read_bytes()
    flip(file) if damage == "flipped" else file.unlink()
    report = mend(path)
    assert report.status == [f"{file}: damaged; written again from the sealed copy"]
    assert report.teachers["t"].withdrawn == set()
    assert file.read_bytes() == good
    assert mend(path).is_sound


def test_a_damaged_seal_is_dropped_for_the_chunks(kit, path):
    FeatureStore.open(path, writable=True).seal()
    sealed = path / "teachers/t/status/sealed"
    flip(sealed, 40)
    assert mend(path).status == [f"{sealed}: damaged; removed, the chunk files beside it hold the same"]
    assert not sealed.exists()
    assert mend(path).is_sound
    assert is_whole(kit, path)


@pytest.mark.parametrize("name", ["views/tile/c.0", "tiles/id_bytes/c.0", "teachers/t/features/zarr.json"])
def test_what_cannot_be_repaired_is_named_and_nothing_is_withdrawn(path, name):
    flip(path / name, 0)
    report = mend(path)
    assert len(report.not_repaired) == 1
    assert name.rpartition("/")[0] in report.not_repaired[0]
    assert report.teachers["t"].withdrawn == set()
    assert not report.is_sound


def test_metadata_that_make_good_shards_unreadable_discard_nothing(path):
    """One byte of an array's metadata must not cost the array."""
    file = path / "teachers/t/features/zarr.json"
    text = file.read_text()
    file.write_text(text.replace('"endian": "little"', '"endian": "big"', 1))
    report = mend(path)
    assert len(report.teachers["t"].damaged) == 18
    assert report.teachers["t"].withdrawn == set()
    assert "not in the store's own layout" in report.not_repaired[0]
    file.write_text(text)
    assert mend(path).is_sound


def test_not_while_somebody_writes(path):
    with (
        FeatureStore.open(path, writable=True).claim([2]),
        pytest.raises(StoreError, match=r"cannot repair .* while process"),
    ):
        mend(path)


def test_a_signal_ends_it_between_shards(path):
    stop, seen = StopFlag(), []

    def progress(done, total):
        seen.append((done, total))
        stop.signum = 15

    with pytest.raises(Interrupted, match="rsmtdf cache repair"):
        repair(path, stop=stop, progress=progress)
    assert seen[-1] == (4, 18)
