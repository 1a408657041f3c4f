"""Stored pixels in a store: layout, commits, growth, removal, damage. The views here are noise with known checksums."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr

from rsmtdf.errors import StoreCorrupt, StoreError, StoreIncomplete, StoreMismatch
from rsmtdf.signals import StopFlag
from rsmtdf.specs import ViewRecipe
from rsmtdf.store.merge import merge
from rsmtdf.store.pixel_reader import PixelReader
from rsmtdf.store.pixels import bytes_per_view, pack_valid, unpack_valid
from rsmtdf.store.recode import recode
from rsmtdf.store.remove import plan_removal, remove
from rsmtdf.store.repair import repair
from rsmtdf.store.status import DONE, HOLE, SKIPPED, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.verify import verify

CROP = 14


def arrays_of(store, row):
    """`pixels`, `weak` and `valid` of a row, as they are stored."""
    rng = np.random.default_rng(row)
    image = {name: rng.integers(0, 256, (CROP, CROP, 3), dtype=np.uint8) for name in ("pixels", "weak")}
    return image | {"valid": pack_valid(rng.random((CROP, CROP)) < 0.5)}


def store_shard(kit, store, shard, rows=None):
    rows = store.rows_of_shard(shard).tolist() if rows is None else rows
    store.write_pixels(shard, views={r: arrays_of(store, r) for r in rows}, view_crcs={r: kit.crc(r) for r in rows})


def fill_pixels(kit, store):
    store.add_pixels()
    for shard in sorted({r // store.shard_views for r in store.pending_pixels().tolist()}):
        store_shard(kit, store, shard)


@pytest.fixture
def bare(kit, path):
    """18 views in 6 shards, all cached, no pixels."""
    store = kit.create(path, recipe=ViewRecipe(crop_px=CROP))
    store.extend([kit.weak(), kit.strong(), kit.strong(3, generation=1, first_tile=5)])
    kit.add_teacher(store)
    kit.fill(store)
    return store


@pytest.fixture
def stored(kit, bare):
    fill_pixels(kit, bare)
    bare.seal()
    return bare


def strong_row(store):
    return int(store.rows(stream="strong")[0])


def shard_file(store, array, row):
    return store.path / "pixels" / array / f"c.{row // store.shard_views}.0.0{'' if array == 'valid' else '.0'}"


def flip(file, at=5):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_what_was_stored_is_read(kit, stored):
    with PixelReader(stored) as reader:
        rows = kit.rows(stored).tolist()
        assert reader.has(rows)
        strong = set(stored.rows(stream="strong").tolist())
        for row, found in zip(rows, reader.read(rows), strict=True):
            expected = arrays_of(stored, row)
            assert found.keys() == ({"pixels", "weak", "valid"} if row in strong else {"pixels", "valid"})
            assert np.array_equal(found["valid"], unpack_valid(expected["valid"]))
            assert np.array_equal(found["pixels"], expected["pixels"])
            if row in strong:
                assert np.array_equal(found["weak"], expected["weak"])


def test_any_zarr_reader_opens_them(stored):
    row = strong_row(stored)
    group = zarr.open_group(stored.path / "pixels", mode="r")
    expected = arrays_of(stored, row)
    for name in ("pixels", "weak", "valid"):
        assert np.array_equal(group[name][row], expected[name])
        assert group[name].shape[0] == stored.n_rows
    assert group["pixels"].metadata.dimension_names == ("view", "y", "x", "channel")
    assert (group["status"][:] >> np.uint64(32) == DONE).sum() == stored.n_views


def test_the_price_of_a_view_is_what_a_shard_takes(stored):
    weak, strong = int(stored.rows(stream="weak")[0]), strong_row(stored)
    for row, stream, arrays in ((weak, "weak", ("pixels", "valid")), (strong, "strong", ("pixels", "weak", "valid"))):
        views = len(stored.rows_of_shard(row // stored.shard_views))
        overhead = len(arrays) * (stored.shard_views * 16 + 4 + views * 4)
        size = sum(shard_file(stored, a, row).stat().st_size for a in arrays)
        assert size - overhead == views * bytes_per_view(CROP, stream)
    assert not shard_file(stored, "weak", weak).exists()


def test_a_store_without_pixels_is_written_as_before_there_were_any(bare):
    manifest = json.loads((bare.path / "zarr.json").read_text())["attributes"]["rsmtdf"]
    assert "pixels" not in manifest
    assert not (bare.path / "pixels").exists()
    with pytest.raises(StoreIncomplete, match="--store-pixels"):
        PixelReader(bare)


def test_only_what_the_teachers_saw_is_stored(kit, bare):
    bare.add_pixels()
    row = int(bare.rows_of_shard(0)[0])
    with pytest.raises(StoreMismatch, match="other pixels"):
        bare.write_pixels(0, views={row: arrays_of(bare, row)}, view_crcs={row: kit.crc(row) ^ 1})
    assert len(bare.pending_pixels()) == bare.n_views


def test_a_shard_may_be_stored_in_part_and_loses_nothing(kit, bare):
    bare.add_pixels()
    rows = bare.rows_of_shard(0).tolist()
    store_shard(kit, bare, 0, rows[:2])
    assert set(rows) & set(bare.pending_pixels().tolist()) == set(rows[2:])
    with pytest.raises(StoreError, match="would lose view"):
        store_shard(kit, bare, 0, rows[2:])
    store_shard(kit, bare, 0)
    assert not set(rows) & set(bare.pending_pixels().tolist())


def test_views_that_were_skipped_or_are_not_cached_have_no_pixels(kit, path):
    store = kit.create(path, recipe=ViewRecipe(crop_px=CROP))
    store.extend([kit.weak()])
    kit.add_teacher(store)
    rows = store.rows_of_shard(0).tolist()
    kit.write(store, 0, skipped=rows[:1])
    store.add_pixels()
    assert store.pending_pixels().tolist() == rows[1:]
    with pytest.raises(StoreError, match="not cached"):
        store_shard(kit, store, 1)
    store_shard(kit, store, 0, rows[1:])
    assert state_of(store.pixel_status())[rows[0]] == SKIPPED


def test_growing_leaves_the_pixels_of_new_views_to_be_stored(kit, stored):
    before = stored.n_views
    (new,) = stored.extend([kit.strong(seed=1)])
    assert len(stored.pending_pixels()) == 0, "nothing is cached of the new views yet"
    kit.fill(stored)
    assert stored.pending_pixels().tolist() == list(range(new.row_start, new.row_stop))
    fill_pixels(kit, stored)
    again = FeatureStore.open(stored.path)
    with PixelReader(again) as reader:
        assert reader.share(kit.rows(again)) == 1
    assert again.n_views == before + new.rows
    assert verify(stored.path, stop=StopFlag()).is_sound


def test_removing_them_gives_the_disk_back_and_they_can_come_again(kit, stored):
    plan = plan_removal(stored, pixels=True)
    report = remove(stored.path, pixels=True, stop=StopFlag())
    assert report.bytes == plan.bytes > stored.n_views * bytes_per_view(CROP, "weak")
    assert not (stored.path / "pixels").exists()
    again = FeatureStore.open(stored.path, writable=True)
    assert again.pixels is None
    assert verify(stored.path, stop=StopFlag()).remarks == []
    with pytest.raises(StoreIncomplete, match="keeps no pixels"):
        plan_removal(again, pixels=True)
    fill_pixels(kit, again)
    assert not len(again.pending_pixels())


@pytest.mark.parametrize("step", ["manifest", "pixels"])
def test_a_removal_that_is_cut_short_never_shows_pixels_again(kit, stored, step):
    class Killed(Exception):
        pass

    def on_step(name):
        if name == step:
            raise Killed

    with pytest.raises(Killed):
        remove(stored.path, pixels=True, stop=StopFlag(), on_step=on_step)
    again = FeatureStore.open(stored.path, writable=True)
    assert again.pixels is None
    again.add_pixels()
    assert len(again.pending_pixels()) == again.n_views


def test_removing_a_seed_takes_its_pixels_along(kit, stored):
    row = strong_row(stored)
    kept = stored.rows(stream="weak").tolist()
    file = shard_file(stored, "weak", row)
    assert file.exists()
    remove(stored.path, seed=0, stop=StopFlag())
    assert not file.exists()
    again = FeatureStore.open(stored.path)
    assert state_of(again.pixel_status())[row] == HOLE
    with PixelReader(again) as reader:
        assert reader.has(kept)
        assert np.array_equal(reader.read(kept[:1])[0]["pixels"], arrays_of(again, kept[0])["pixels"])
    assert verify(stored.path, stop=StopFlag()).is_sound


@pytest.mark.parametrize("array", ["pixels", "weak", "valid"])
def test_damage_is_refused_found_and_withdrawn(kit, stored, array):
    row = strong_row(stored)
    flip(shard_file(stored, array, row))
    with PixelReader(stored) as reader, pytest.raises(StoreCorrupt, match="cache repair"):
        reader.read([row])
    found = verify(stored.path, stop=StopFlag())
    assert [(d.kind, d.row) for d in found.damage] == [("pixels", row)]
    assert repair(stored.path, stop=StopFlag()).withdrawn_pixels == [row]
    again = FeatureStore.open(stored.path, writable=True)
    assert again.pending_pixels().tolist() == [row]
    assert again.pending_views(["t"]) == 0, "features are not touched"
    fill_pixels(kit, again)
    assert verify(stored.path, stop=StopFlag()).is_sound


def test_lost_status_words_of_pixels_are_mended(kit, stored):
    (stored.path / "pixels" / "status" / "sealed").unlink()
    chunk = stored.path / "pixels" / "status" / "c.0"
    flip(chunk)
    assert {d.kind for d in verify(stored.path, stop=StopFlag()).damage} == {"pixels"}
    rows = stored.rows_of_shard(0).tolist()
    assert repair(stored.path, stop=StopFlag()).withdrawn_pixels == rows
    assert FeatureStore.open(stored.path).pending_pixels().tolist() == rows


def test_sealed_words_mend_those_of_a_shard(stored):
    flip(stored.path / "pixels" / "status" / "c.0")
    report = repair(stored.path, stop=StopFlag())
    assert report.withdrawn_pixels == []
    assert report.repaired
    assert verify(stored.path, stop=StopFlag()).is_sound


def test_pixels_nobody_vouches_for_any_more_are_withdrawn(stored):
    (stored.path / "views" / "status" / "sealed").unlink()
    flip(stored.path / "views" / "status" / "c.0")
    rows = stored.rows_of_shard(0).tolist()
    assert repair(stored.path, stop=StopFlag()).withdrawn_pixels == rows
    assert not (state_of(FeatureStore.open(stored.path).pixel_status())[rows] == DONE).any()


def test_info_tells_how_far_they_are(stored):
    told = stored.info()["pixels"]
    assert told["complete"]
    assert told["done"] == stored.n_views
    assert told["bytes_per_view"] == {s: bytes_per_view(CROP, s) for s in ("strong", "weak")}


def test_a_recoded_store_has_none_and_a_merged_one_keeps_its_own(kit, stored, tmp_path):
    recode(stored.path, tmp_path / "half.zarr", codec="int8", threads=1, stop=StopFlag())
    other = FeatureStore.open(tmp_path / "half.zarr")
    assert other.pixels is None
    assert verify(other.path, stop=StopFlag()).is_sound
    sibling = kit.create(tmp_path / "sibling.zarr", recipe=ViewRecipe(crop_px=CROP))
    sibling.extend([kit.strong(seed=1)])
    kit.add_teacher(sibling)
    kit.fill(sibling)
    merge(stored.path, sibling.path, threads=1, stop=StopFlag())
    grown = FeatureStore.open(stored.path, writable=True)
    assert len(grown.pending_pixels()) == sibling.n_views
    assert verify(grown.path, stop=StopFlag()).is_sound
