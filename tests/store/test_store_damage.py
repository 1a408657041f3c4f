"""Every kind of damage is found, named, and never trained on."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from rsmtdf.errors import StoreCorrupt
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.store import FeatureStore

ROW = 13
"""A strong view: shard 3, slot 1."""


@pytest.fixture(scope="module")
def original(kit, tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "feats.zarr"
    kit.full(path)
    return path


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "feats.zarr")


def read_everything(path, kit, **options) -> None:
    """What training reads: metadata, columns, tile ids, statistics, status, features."""
    store = FeatureStore.open(path)
    for name in store.column_names:
        store.column(name)
    assert len(list(store.tile_ids)) == 8
    store.view_status()
    with CachedFeatures(store, ["t"], device="cpu", **options) as source:
        rows = kit.rows(store)
        found = source.fetch(rows)["t"]
        for row, features in zip(rows.tolist(), found, strict=True):
            assert np.array_equal(features.numpy(), kit.feature("t", row).numpy()), f"row {row} is wrong"


def flip(file, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


FILES = [
    "zarr.json",
    "tiles/id_bytes/c.0",
    "tiles/id_offsets/c.0",
    "views/tile/c.0",
    "views/scale/c.0",
    "views/status/c.3",
    "teachers/t/zarr.json",
    "teachers/t/channel_mean/c.0",
    "teachers/t/channel_std/c.0",
    "teachers/t/status/c.3",
    "teachers/t/features/c.3.0.0",
]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_names_its_file(copy, kit, name):
    read_everything(copy, kit)
    file = copy / name
    good = file.read_bytes()
    # A view that is absent from its shard has index entries too, and padding of columns is summed: all bytes count.
    for bit in np.random.default_rng(3).integers(0, 8 * len(good), 25).tolist():
        flip(file, bit)
        with pytest.raises(StoreCorrupt) as caught:
            read_everything(copy, kit)
        text = str(caught.value)
        assert str(copy) in text
        assert file.name in text
        assert "rsmtdf cache" in text
        file.write_bytes(good)


@pytest.mark.parametrize("name", ["views/tile", "tiles/id_bytes", "teachers/t/channel_std", "teachers/t/features"])
def test_a_flipped_bit_in_array_metadata_never_gives_other_values(copy, kit, name):
    """Some bits change nothing that is read (a dimension's name); none may change a value."""
    file = copy / name / "zarr.json"
    good = file.read_bytes()
    found = 0
    for bit in np.random.default_rng(4).integers(0, 8 * len(good), 40).tolist():
        flip(file, bit)
        try:
            read_everything(copy, kit)
        except StoreCorrupt as error:
            assert str(copy) in str(error)  # noqa: PT017 - raising is one of two good outcomes
            found += 1
        file.write_bytes(good)
    assert found > 10


def test_features_name_teacher_view_and_repair(copy, kit):
    file = copy / "teachers/t/features/c.3.0.0"
    flip(file, 8 * 150)
    expected = (
        rf"store {copy}, teacher 't', view 13 \(tile scène/3_0, strong, seed 0\), file {file}: payload checksum is "
        rf".* Nothing was trained on it; .* rsmtdf cache repair {copy}"
    )
    with pytest.raises(StoreCorrupt, match=expected):
        read_everything(copy, kit)
    with pytest.raises(StoreCorrupt, match=r"view 13 .*c.*zarr-python cannot read it"):
        read_everything(copy, kit, force_zarr=True)


@pytest.mark.parametrize("force_zarr", [False, True])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "another shard's"])
def test_a_bad_shard_is_never_fill_values(copy, kit, damage, force_zarr):
    file = copy / "teachers/t/features/c.3.0.0"
    if damage == "missing":
        file.unlink()
    elif damage == "another shard's":
        shutil.copy(copy / "teachers/t/features/c.0.0.0", file)
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else -7])
    with pytest.raises(StoreCorrupt, match=r"teacher 't', view 12 \(tile scène/4_0, strong, seed 0\)"):
        read_everything(copy, kit, force_zarr=force_zarr)
    store = FeatureStore.open(copy)
    with CachedFeatures(store, ["t"], device="cpu", force_zarr=force_zarr) as source:
        source.fetch(np.arange(10))  # the other shards are as good as ever


def test_unverified_reading_still_finds_missing_and_exchanged_shards(copy, kit):
    shutil.copy(copy / "teachers/t/features/c.0.0.0", copy / "teachers/t/features/c.3.0.0")
    with pytest.raises(StoreCorrupt, match="the status word says"):
        read_everything(copy, kit, verify=False)


def test_a_view_absent_from_a_shard_that_should_have_it(copy, kit):
    shutil.copy(copy / "teachers/t/features/c.4.0.0", copy / "teachers/t/features/c.3.0.0")
    with pytest.raises(StoreCorrupt):
        read_everything(copy, kit)
    store = FeatureStore.open(copy)
    with CachedFeatures(store, ["t"], device="cpu") as source, pytest.raises(StoreCorrupt, match="absent"):
        source.fetch(np.array([ROW]))


def test_exchanged_status_chunks(copy, kit):
    status = copy / "teachers/t/status"
    shutil.copy(status / "c.0", status / "c.3")
    with pytest.raises(StoreCorrupt, match=r"view 12 .*the status word says"):
        read_everything(copy, kit)


def test_an_exchanged_teacher_is_found_by_the_manifest(copy, kit, tmp_path):
    other = kit.create(tmp_path / "other")
    kit.add_teacher(other, layer=3)
    shutil.copy(tmp_path / "other/teachers/t/zarr.json", copy / "teachers/t/zarr.json")
    with pytest.raises(StoreCorrupt, match="the store's manifest says"):
        FeatureStore.open(copy)


def test_an_exchanged_column_is_found_by_its_digest(copy, kit):
    shutil.copy(copy / "views/partner/c.0", copy / "views/seed/c.0")
    store = FeatureStore.open(copy)  # columns are checked when they are read
    store.column("partner")
    with pytest.raises(StoreCorrupt, match="digest of column 'seed'"):
        store.column("seed")


def test_a_sealed_file_is_summed(copy, kit):
    FeatureStore.open(copy, writable=True).seal()
    file = copy / "teachers/t/status/sealed"
    good = file.read_bytes()
    for bit in np.random.default_rng(5).integers(0, 8 * len(good), 40).tolist():
        flip(file, bit)
        with pytest.raises(StoreCorrupt, match=r"sealed: .*the chunks beside it hold the same words"):
            read_everything(copy, kit)
        file.write_bytes(good)
    file.unlink()
    read_everything(copy, kit)
