"""Everything small that nothing can recompute lies in a store twice, and either copy puts the other right."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from rsmtdf.errors import StoreCorrupt, StoreError
from rsmtdf.signals import StopFlag
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.manifest import load
from rsmtdf.store.repair import repair
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.twins import TWINS, damaged_files, keep_twins, restore_twins
from rsmtdf.store.verify import verify


def flip(file: Path, at: int, bit: int = 3) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def twins(path: Path) -> list[str]:
    return sorted(p.relative_to(path / TWINS).as_posix() for p in (path / TWINS).rglob("*") if p.is_file())


def test_every_twin_is_its_file(kit, path):
    kit.full(path)
    found = twins(path)
    assert "zarr.json" in found
    assert "teachers/t/channel_std/c.0" in found
    assert "views/partner/c.0" in found
    for name in found:
        assert (path / TWINS / name).read_bytes() == (path / name).read_bytes(), name
    assert damaged_files(path) == []


def test_each_file_is_restored_from_its_twin(kit, path, tmp_path):
    kit.full(path)
    before = {name: (path / name).read_bytes() for name in twins(path)}
    for k, (name, data) in enumerate(before.items()):
        copy = shutil.copytree(path, tmp_path / f"copy{k}")
        if k % 3 == 2:
            (copy / name).unlink()
        else:
            # The digest of a zarr.json covers our attributes, which are most of it but not its last lines.
            flip(copy / name, len(data) // 2)
        assert damaged_files(copy) == [name]
        assert restore_twins(copy) == [name]
        assert (copy / name).read_bytes() == data
        store = FeatureStore.open(copy)
        with CachedFeatures(store, ["t"], device="cpu", rows=kit.rows(store)) as source:
            source.fetch(kit.rows(store))
        assert len(store.tile_ids) == 8
        assert all(len(store.column(c)) == store.n_rows for c in store.column_names)


def test_a_damaged_file_never_replaces_its_good_twin(kit, path):
    store = kit.full(path)
    good = (path / "views" / "scale" / "c.0").read_bytes()
    flip(path / "views" / "scale" / "c.0", 40)
    store.amend(experiment={"n": 2})
    assert (path / TWINS / "views" / "scale" / "c.0").read_bytes() == good
    assert json.loads((path / TWINS / "zarr.json").read_bytes())["attributes"]["rsmtdf"]["experiment"] == {"n": 2}
    assert restore_twins(path) == ["views/scale/c.0"]
    np.testing.assert_array_equal(FeatureStore.open(path).column("scale"), store.column("scale"))


def test_a_damaged_twin_is_not_used(kit, path):
    kit.full(path)
    for file in (path / "zarr.json", path / TWINS / "zarr.json"):
        flip(file, 200)
    with pytest.raises(StoreCorrupt, match="metadata"):
        restore_twins(path)


def test_twins_that_cannot_be_written_do_not_undo_the_change(kit, path, caplog):
    store = kit.full(path)
    shutil.rmtree(path / TWINS)
    (path / TWINS).write_bytes(b"in the way")
    store.amend(experiment={"n": 3})
    assert FeatureStore.open(path).experiment == {"n": 3}
    assert "second copy" in caplog.text


def test_the_message_about_damage_points_to_repair(kit, path):
    kit.full(path)
    flip(path / "zarr.json", 300)
    with pytest.raises(StoreCorrupt, match="rsmtdf cache repair"):
        FeatureStore.open(path)


def test_reserved_teacher_names(kit, path):
    store = kit.full(path)
    with pytest.raises(StoreError, match="teacher name 'twins' cannot be a folder"):
        kit.add_teacher(store, "twins")


def test_words_of_a_lost_change_are_not_taken_for_those_of_the_next(kit, path, monkeypatch):
    """The twins are one change behind, and then the manifest is lost: what is added next must be computed."""
    store = kit.create(path)
    store.extend([kit.weak()])
    kit.add_teacher(store)
    kit.fill(store)
    with monkeypatch.context() as patch:
        patch.setattr("rsmtdf.store.store.keep_twins", lambda *_: None)  # as a kill right after the commit
        store.extend([kit.strong(5, seed=0)])
    kit.fill(store)
    store.seal()
    flip(path / "zarr.json", 300)
    report = repair(path, stop=StopFlag())
    assert any("may have to be added again" in line for line in report.repaired)
    store = FeatureStore.open(path, writable=True)
    assert store.n_views == 10
    store.extend([kit.strong(5, seed=7, first_tile=20)])
    new = store.rows(stream="strong", seed=7)
    assert not store.usable(["t"])[new].any()
    assert store.pending_rows(["t"]).tolist() == new.tolist()
    kit.fill(store)
    assert verify(path, stop=StopFlag()).is_sound


def test_the_next_writer_brings_twins_up_to_date(kit, path, monkeypatch):
    store = kit.full(path)
    with monkeypatch.context() as patch:
        patch.setattr("rsmtdf.store.store.keep_twins", lambda *_: None)
        store.amend(experiment={"n": 9})
    assert verify(path, stop=StopFlag()).remarks == [
        "1 second copies of small files are missing or behind; the next change or repair writes them"
    ]
    FeatureStore.open(path, writable=True)
    assert (path / TWINS / "zarr.json").read_bytes() == (path / "zarr.json").read_bytes()
    shutil.rmtree(path / TWINS)
    assert "missing or behind" in verify(path, stop=StopFlag()).remarks[0]


def test_a_whole_table_that_is_not_the_manifests(kit, path, tmp_path):
    """Another store's tile ids, each chunk sound: only their digest tells, and the good twin survives writers."""
    kit.full(path)
    other = kit.create(tmp_path / "other")
    other.extend([kit.weak(5, first_tile=3), kit.strong(), kit.strong(3, generation=1, first_tile=5)])
    good = (path / "tiles" / "id_bytes" / "c.0").read_bytes()
    shutil.copy(other.path / "tiles" / "id_bytes" / "c.0", path / "tiles" / "id_bytes" / "c.0")
    FeatureStore.open(path, writable=True)
    assert not verify(path, stop=StopFlag()).is_sound
    report = repair(path, stop=StopFlag())
    assert report.not_repaired == []
    assert (path / "tiles" / "id_bytes" / "c.0").read_bytes() == good
    assert verify(path, stop=StopFlag()).is_sound


def test_a_whole_teacher_that_is_not_the_manifests(kit, path, tmp_path):
    """Another teacher's metadata are sound in themselves: the good twin survives writers, and puts them right."""
    kit.full(path)
    other = kit.create(tmp_path / "other")
    kit.add_teacher(other, weights_sha256="11")
    file = path / "teachers" / "t" / "zarr.json"
    good = file.read_bytes()
    shutil.copy(other.path / "teachers" / "t" / "zarr.json", file)
    keep_twins(path, load(path))
    assert (path / TWINS / "teachers" / "t" / "zarr.json").read_bytes() == good
    with pytest.raises(StoreCorrupt, match="manifest says"):
        FeatureStore.open(path)
    assert repair(path, stop=StopFlag()).not_repaired == []
    assert file.read_bytes() == good
    assert verify(path, stop=StopFlag()).is_sound


def test_repair_looks_again_once_a_teacher_can_be_read(kit, path):
    kit.full(path)
    flip(path / "teachers" / "t" / "zarr.json", 200)
    flip(path / "teachers" / "t" / "features" / "c.1.0.0", 10)
    report = repair(path, stop=StopFlag())
    assert report.not_repaired == []
    assert report.withdrawn == {"t": [4]}
    assert verify(path, stop=StopFlag()).is_sound


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_disk_that_fails_during_small_changes_is_explained(kit, path, monkeypatch, call):
    store = kit.full(path)

    def fail(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path / "zarr.json"))

    changes = {
        "amend": lambda: store.amend(experiment={"n": 4}),
        "add_teacher": lambda: kit.add_teacher(store, "u"),
        "seal": store.seal,
    }
    for name, change in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(StoreError, match=r"feature store .*No space left on device"):
                change()
        assert verify(path, stop=StopFlag()).is_sound, name
