"""Everything small that nothing can recompute lies in a store twice, and either copy puts the other right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rsmtdf.errors import StoreCorrupt, StoreError
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.twins import TWINS, damaged_files, restore_twins


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
