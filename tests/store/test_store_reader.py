from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from rsmtdf.errors import StoreCorrupt, StoreError, StoreIncomplete
from rsmtdf.signals import StopFlag
from rsmtdf.specs import FeatureSource
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.remove import remove
from rsmtdf.store.store import FeatureStore


def expected(kit, rows) -> torch.Tensor:
    return torch.stack([kit.feature("t", int(r)) for r in rows])


@pytest.fixture
def store(kit, path):
    return kit.full(path)


@pytest.mark.parametrize("options", [{}, {"threads": 3}, {"force_zarr": True}, {"verify": False}])
def test_rows_come_in_the_order_asked_for(kit, store, options):
    rows = np.array([22, 0, 13, 0, 9, 5, 16])
    with CachedFeatures(store, ["t"], device="cpu", **options) as source:
        for _ in range(3):
            assert torch.equal(source.fetch(rows)["t"], expected(kit, rows))
        assert torch.equal(source.fetch(rows[:2], None)["t"], expected(kit, rows[:2]))


def test_it_is_a_feature_source(kit, store):
    with CachedFeatures(store, ["t"], device="cpu") as found:
        source: FeatureSource = found
        assert source.specs == {"t": kit.spec()}
        assert source.needs_pixels is False


def test_targets_are_the_callers(kit, store):
    with CachedFeatures(store, ["t"], device="cpu") as source:
        first = source.fetch(np.array([0, 1]))["t"]
        kept = first.clone()
        source.fetch(np.array([2, 3]))
        assert torch.equal(first, kept)


def test_from_many_threads(kit, store):
    rows = kit.rows(store)
    wrong: list[int] = []
    with CachedFeatures(store, ["t"], device="cpu", threads=2) as source:

        def work(seed: int) -> None:
            for _ in range(10):
                batch = np.random.default_rng(seed).choice(rows, 5)
                if not torch.equal(source.fetch(batch)["t"], expected(kit, batch)):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong


def test_unfinished_features_are_counted(kit, path):
    store = kit.create(path)
    store.extend([kit.weak(), kit.strong()])
    kit.add_teacher(store)
    kit.write(store, 0)
    kit.write(store, 1, skipped=(5,))
    rows = kit.rows(store)
    message = f"features for 't' in {path} cover 7 of 15 views; finish them with the "
    message += "rsmtdf cache-features command that the store was made by"
    with pytest.raises(StoreIncomplete, match=message):
        CachedFeatures(store, ["t"], device="cpu", rows=rows)
    with CachedFeatures(store, ["t"], device="cpu", rows=rows[:5]) as source:
        for row in (5, 9, 10):  # skipped, not done, a hole
            with pytest.raises(StoreIncomplete, match=f"lack view {row} "):
                source.fetch(np.array([row]))
    with pytest.raises(StoreIncomplete, match="no teacher 'u'; it has: t"):
        CachedFeatures(store, ["u"], device="cpu")


def test_stored_values(kit, store):
    with FeatureReader(store, "t") as reader:
        found = reader.get_many([4, 2])
    assert list(found) == ["features"]
    assert found["features"].dtype == np.float16
    np.testing.assert_array_equal(found["features"], expected(kit, [4, 2]).numpy())


def test_a_compressed_archive_is_read_through_zarr(kit, store, path):
    node = path / "teachers" / "t" / "features"
    values = zarr.open_array(node, mode="r")[:]
    archive = zarr.create_array(
        node, shape=values.shape, chunks=(1, 6, 8), dtype="float16", fill_value=float("nan"), overwrite=True
    )
    archive[:] = values
    with CachedFeatures(store, ["t"], device="cpu") as source:
        rows = kit.rows(store)
        assert torch.equal(source.fetch(rows)["t"], expected(kit, rows))


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_the_fallback_reads_the_same_bytes_and_finds_the_same_errors(kit, path, codec):
    store = kit.full(path, codec=codec)
    name = store.teacher("t").arrays[-1].name
    rows = kit.rows(store)[::-1]
    shard = path / "teachers" / "t" / name / ("c.3.0.0" if codec == "fp16" else "c.3.0")
    with FeatureReader(store, "t", threads=2) as fast, FeatureReader(store, "t", threads=2, force_zarr=True) as slow:
        one, other = fast.get_many(rows), slow.get_many(rows)
        assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in other.items()}
    shutil.copy(shard.with_name(shard.name.replace("3", "0", 1)), shard)
    for force_zarr in (False, True):
        with FeatureReader(store, "t", force_zarr=force_zarr) as reader:
            with pytest.raises(
                StoreCorrupt, match=rf"view 12 .* file {path}/teachers/t/.*/c\.3\..*the status word says"
            ):
                reader.get_many([0, 12])
            with pytest.raises(StoreIncomplete, match="lack view 10 "):
                reader.get_many([0, 10])


@pytest.mark.parametrize("verify", [False, True])
def test_status_words_cover_every_array(kit, path, verify):
    """Exchanged scales have sound checksums of their own; the status word sums codes and scales together."""
    store = kit.full(path, codec="int8")
    scales = path / "teachers" / "t" / "token_scale"
    shutil.copy(scales / "c.0.0", scales / "c.1.0")
    with FeatureReader(store, "t", verify=verify) as reader:
        with pytest.raises(
            StoreCorrupt, match=r"view 4 .*checksum is .* the status word says .*/teachers/t/status/c\.1"
        ):
            reader.get_many([0, 4])
        reader.get_many([0, 12])


def test_what_it_fills_must_fit(store):
    with FeatureReader(store, "t") as reader:
        out = reader.empty(3)
        assert reader.get_many([4, 2, 4], out=out) is out
        np.testing.assert_array_equal(out["features"][0], out["features"][2])
        wide = np.empty((3, 6, 16), np.float16)
        for bad in (out["features"][:2], out["features"].astype(np.float32), wide[:, :, ::2]):
            with pytest.raises(ValueError, match=r"out\['features'\] is .*expected float16 \(3, 6, 8\), C-contiguous"):
                reader.get_many([4, 2, 4], out={"features": bad})
        assert reader.get_many([])["features"].shape == (0, 6, 8)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors through /proc")
def test_no_descriptors_left_is_no_damage(store):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with FeatureReader(store, "t") as reader:
        used = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(used, 3), hard))
        try:
            with pytest.raises(StoreError, match=r"Too many open files.*run the same command again") as caught:
                reader.get_many([0])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not isinstance(caught.value, StoreCorrupt)
        reader.get_many([0])


def test_a_system_without_preadv(kit, store, monkeypatch):
    rows = kit.rows(store)
    monkeypatch.delattr(os, "preadv")
    with CachedFeatures(store, ["t"], device="cpu") as source:
        assert torch.equal(source.fetch(rows)["t"], expected(kit, rows))
        assert torch.equal(torch.cat([f["t"] for f in source.stream(np.split(rows, 6))]), expected(kit, rows))


def test_a_file_that_is_replaced_while_it_is_open_goes_on_as_it_was(kit, store, path):
    with FeatureReader(store, "t") as reader:
        reader.get_many([5])
        remove(path, stream="weak", seed=0, stop=StopFlag())  # rows 0 to 4; row 4 shares the shard of 5 to 7
        found = reader.get_many([4, 5, 6, 7])["features"]
    np.testing.assert_array_equal(found, expected(kit, [4, 5, 6, 7]).numpy())


def test_a_damaged_file_that_was_mended_is_opened_again(kit, store, path):
    file = path / "teachers" / "t" / "features" / "c.1.0.0"
    good = file.read_bytes()
    with FeatureReader(store, "t") as reader:
        file.write_bytes(good[:10] + bytes([good[10] ^ 1]) + good[11:])
        with pytest.raises(StoreCorrupt, match="cache repair"):
            reader.get_many([4])
        file.with_name("mended").write_bytes(good)
        file.with_name("mended").replace(file)
        np.testing.assert_array_equal(reader.get_many([4])["features"], expected(kit, [4]).numpy())


def test_a_file_that_a_network_disk_no_longer_knows_is_opened_again(kit, store, monkeypatch):
    real, stale = os.preadv, [True]

    def preadv(*arguments):
        if stale and stale.pop(0):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(*arguments)

    with FeatureReader(store, "t") as reader:
        reader.get_many([4])
        monkeypatch.setattr(os, "preadv", preadv)
        np.testing.assert_array_equal(reader.get_many([4])["features"], expected(kit, [4]).numpy())
        stale[:] = [True, True]
        with pytest.raises(StoreError, match=r"Stale file handle.* run the same command again") as caught:
            reader.get_many([4])
    assert not isinstance(caught.value, StoreCorrupt)


@pytest.mark.parametrize("force_zarr", [False, True])
def test_what_was_removed_meanwhile_is_called_so(store, path, force_zarr):
    with FeatureReader(store, "t", force_zarr=force_zarr) as reader:
        remove(path, stream="weak", seed=0, stop=StopFlag())
        for row in (4, 0):  # absent from its shard; its shard is deleted
            message = rf"view {row} \(tile scène/{row}_0, weak, seed 0\) was removed from .*{path} by rsmtdf cache rm"
            with pytest.raises(StoreIncomplete, match=message):
                reader.get_many([row])
        # Only what is gone is called so: other damage keeps its advice.
        (path / "teachers" / "t" / "features" / "c.2.0.0").unlink()
        with pytest.raises(StoreCorrupt, match=r"view 8 .* cache repair"):
            reader.get_many([8])
    with pytest.raises(StoreIncomplete, match=r"view 0 .* was removed"):
        CachedFeatures(store, ["t"], device="cpu", rows=np.arange(10))
    with (
        FeatureReader(store, "t", force_zarr=force_zarr) as reader,
        pytest.raises(StoreIncomplete, match=r"view 3 .* was removed"),
    ):
        reader.get_many([5, 3])
    opened = FeatureStore.open(path)
    with FeatureReader(opened, "t", force_zarr=force_zarr) as reader:
        remove(path, teacher="t", stop=StopFlag())
        with pytest.raises(StoreIncomplete, match=r"teacher 't' was removed from"):
            reader.get_many([12])


@pytest.mark.parametrize("force_zarr", [False, True])
def test_ids_that_are_no_rows_of_the_store(store, force_zarr):
    n = store.n_rows
    with FeatureReader(store, "t", force_zarr=force_zarr) as reader:
        for bad in ([-1], [n], [0, n + 7]):
            with pytest.raises(StoreIncomplete, match=rf"has rows 0 to {n - 1}, not "):
                reader.get_many(bad)
        for odd in (np.arange(n) == 5, [5.9], ["5"], [[1, 2]]):
            with pytest.raises(ValueError, match="view_ids are"):
                reader.get_many(odd)
        assert reader.get_many([])["features"].shape == (0, 6, 8)
        fixed = reader.empty(1)
        fixed["features"].flags.writeable = False
        with pytest.raises(ValueError, match="writeable"):
            reader.get_many([1], out=fixed)
    with pytest.raises(ValueError, match="threads is 0"):
        FeatureReader(store, "t", threads=0)
