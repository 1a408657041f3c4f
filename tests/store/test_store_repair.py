"""Repair: damaged views are withdrawn, what follows from the manifest is written again, the rest is left alone."""

from __future__ import annotations

import os

import numpy as np
import pytest

from rsmtdf.errors import StoreCorrupt, StoreError, StoreNotFound
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.repair import repair
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.twins import TWINS
from rsmtdf.store.verify import verify


@pytest.fixture
def path(kit, tmp_path):
    kit.full(tmp_path / "feats.zarr")
    return tmp_path / "feats.zarr"


def mend(path):
    return repair(path, stop=StopFlag())


def is_sound(path) -> bool:
    return verify(path, stop=StopFlag()).is_sound


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
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing", "another shard's"])
def test_damaged_views_are_withdrawn_and_can_be_filled(kit, path, damage, sealed):
    if sealed:
        FeatureStore.open(path, writable=True).seal()
    file = path / "teachers/t/features/c.3.0.0"
    if damage == "flipped":
        flip(file)
    elif damage == "missing":
        file.unlink()
    else:
        other = path / "teachers/t/features/c.0.0.0"
        size = 0 if damage == "empty" else file.stat().st_size - 7
        file.write_bytes(other.read_bytes() if damage == "another shard's" else file.read_bytes()[:size])
    report = mend(path)
    rows = [12] if damage == "flipped" else [12, 13, 14, 15]
    assert report.withdrawn == {"t": rows}
    assert report.not_repaired == []
    assert is_sound(path)
    store = FeatureStore.open(path, writable=True)
    assert store.pending_rows(["t"]).tolist() == rows
    assert kit.fill(store) == [3]
    assert is_whole(kit, path)
    assert verify(path, stop=StopFlag()).is_complete


def test_damaged_status_words_of_a_teacher(kit, path):
    flip(path / "teachers/t/status/c.3")
    with pytest.raises(StoreCorrupt, match="rsmtdf cache repair"):
        FeatureStore.open(path).status("t")
    report = mend(path)
    assert report.withdrawn == {"t": [12, 13, 14, 15]}
    assert report.repaired == [f"{path / 'teachers/t/status/c.3'}: its views are to be computed again"]
    assert kit.fill(FeatureStore.open(path, writable=True)) == [3]
    assert is_sound(path)
    assert is_whole(kit, path)


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damaged_status_words_of_the_views_withdraw_every_teacher(kit, path, damage):
    """Features of pixels that nobody can vouch for any more are no targets."""
    store = FeatureStore.open(path, writable=True)
    kit.add_teacher(store, "u")
    kit.fill(store, ["u"])
    file = path / "views/status/c.1"
    flip(file) if damage == "flipped" else file.unlink()
    report = mend(path)
    assert report.withdrawn == {"t": [4, 5, 6, 7], "u": [4, 5, 6, 7]}
    store = FeatureStore.open(path, writable=True)
    assert store.missing_shards(["t"]) == store.missing_shards(["u"]) == [1]
    kit.fill(store, ["t", "u"])
    assert is_sound(path)
    assert is_whole(kit, path)


@pytest.mark.parametrize("array", ["views/status", "teachers/t/status"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_sealed_words_bring_a_chunk_back(kit, path, array, damage):
    FeatureStore.open(path, writable=True).seal()
    file = path / array / "c.2"
    good = file.read_bytes()
    flip(file) if damage == "flipped" else file.unlink()
    report = mend(path)
    assert report.repaired == [f"{file}: written again from the sealed copy"]
    assert report.withdrawn == {}
    assert file.read_bytes() == good
    assert is_sound(path)


def test_a_damaged_seal_is_dropped_for_the_chunks(kit, path):
    FeatureStore.open(path, writable=True).seal()
    sealed = path / "teachers/t/status/sealed"
    flip(sealed, 40)
    assert mend(path).repaired == [f"{sealed}: dropped, the chunk files beside it hold the same"]
    assert sealed.exists(), "and made anew"
    assert is_sound(path)
    assert is_whole(kit, path)


def test_a_damaged_seal_and_a_damaged_chunk(kit, path):
    FeatureStore.open(path, writable=True).seal()
    flip(path / "teachers/t/status/sealed", 40)
    flip(path / "teachers/t/status/c.2")
    assert mend(path).withdrawn == {"t": [8, 9]}
    kit.fill(FeatureStore.open(path, writable=True))
    assert is_sound(path)
    assert is_whole(kit, path)


def test_metadata_of_every_array_and_group_are_written_again(kit, path):
    """All but the two that hold attributes; feature files are read by their layout, whatever the metadata say."""
    good = {f: f.read_bytes() for f in path.rglob("zarr.json") if f.parent not in (path, path / "teachers/t")}
    assert len(good) >= 14
    for k, file in enumerate(good):
        if k % 3:
            flip(file, len(good[file]) // 2)
        else:
            file.unlink()
    report = mend(path)
    assert len(report.repaired) == len(good)
    assert report.withdrawn == {}
    assert report.not_repaired == []
    assert {f: f.read_bytes() for f in good} == good
    assert is_sound(path)
    assert is_whole(kit, path)


def test_a_damaged_note_is_removed(path):
    note = path / "provenance/t/3.json"
    flip(note, 20)
    assert "removed, for nothing reads it back" in mend(path).repaired[0]
    assert not note.exists()
    assert is_sound(path)


@pytest.mark.parametrize(
    "name", ["views/tile/c.0", "tiles/id_bytes/c.0", "teachers/t/zarr.json", "teachers/t/channel_std/c.0", "zarr.json"]
)
def test_what_nothing_can_recompute_comes_from_its_second_copy(kit, path, name):
    good = (path / name).read_bytes()
    flip(path / name, 200 if name.endswith("json") else 0)
    flip(path / "provenance/t/3.json", 20)
    report = mend(path)
    assert report.not_repaired == []
    assert report.withdrawn == {}
    assert any(line.startswith(f"{path / name}: restored from its second copy") for line in report.repaired)
    assert (path / name).read_bytes() == good
    assert is_sound(path)
    assert is_whole(kit, path)


@pytest.mark.parametrize(
    "name", ["views/tile/c.0", "tiles/id_bytes/c.0", "teachers/t/zarr.json", "teachers/t/channel_std/c.0", "zarr.json"]
)
def test_what_cannot_be_repaired_is_named_and_the_rest_is_put_in_order(path, name):
    for file in (path / name, path / TWINS / name):
        flip(file, 200 if name.endswith("json") else 0)
    flip(path / "provenance/t/3.json", 20)
    report = mend(path)
    # With its manifest, nobody can tell what else should be there.
    assert [d.file for d in report.not_repaired] == [
        path / name,
        *([path / TWINS / name] if name != "zarr.json" else []),
    ]
    assert report.withdrawn == {}
    assert any("3.json" in line for line in report.repaired) == (name != "zarr.json")
    assert next(d.file for d in verify(path, stop=StopFlag()).damage if d.kind != "twin") == path / name


def test_a_damaged_second_copy_is_written_again(path):
    for name in ("zarr.json", "views/tile/c.0"):
        flip(path / TWINS / name, 100)
    report = mend(path)
    assert len(report.repaired) == 2
    assert is_sound(path)
    assert (path / TWINS / "zarr.json").read_bytes() == (path / "zarr.json").read_bytes()


def test_two_teachers_two_kinds_of_damage(kit, path):
    store = FeatureStore.open(path, writable=True)
    kit.add_teacher(store, "u", codec="int8")
    kit.fill(store, ["u"])
    flip(path / "teachers/t/zarr.json", 200)
    flip(path / TWINS / "teachers/t/zarr.json", 200)
    flip(path / "teachers/u/token_scale/c.0.0")
    report = mend(path)
    assert [d.teacher for d in report.not_repaired] == ["t", None]
    assert report.withdrawn == {"u": [0]}


def test_a_sound_store_is_not_written_to(path):
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in path.rglob("*") if f.is_file() and f.name != "locks"}
    report = mend(path)
    assert report.found.is_sound
    assert (report.withdrawn, report.repaired, report.not_repaired) == ({}, [], [])
    after = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in path.rglob("*") if f.is_file() and f.name != "locks"}
    assert after == before


def test_times_of_files_mean_nothing(kit, path):
    for k, file in enumerate(sorted(f for f in path.rglob("*") if f.is_file())):
        os.utime(file, (0, 0) if k % 2 else (2**33, 2**33))
    flip(path / "teachers/t/features/c.3.0.0")
    assert mend(path).withdrawn == {"t": [12]}
    kit.fill(FeatureStore.open(path, writable=True))
    assert is_whole(kit, path)


def test_not_while_somebody_writes(path):
    with (
        FeatureStore.open(path, writable=True).claim([2]),
        pytest.raises(StoreError, match=r"cannot repair .* while process"),
    ):
        mend(path)


def test_a_signal_ends_it_before_anything_is_changed(path):
    stop = StopFlag()
    flip(path / "teachers/t/features/c.0.0.0")
    before = (path / "teachers/t/status/c.0").read_bytes()

    def progress(done, total):
        stop.signum = 15

    with pytest.raises(Interrupted, match="rsmtdf cache verify"):
        repair(path, stop=stop, progress=progress)
    assert (path / "teachers/t/status/c.0").read_bytes() == before


def test_no_store(tmp_path):
    with pytest.raises(StoreNotFound):
        mend(tmp_path / "none")
