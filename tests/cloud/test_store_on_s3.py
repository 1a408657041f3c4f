"""A store that lies on S3: made, grown, read, trained from, broken off and gone on with, while requests fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rsmtdf.errors import StoreCorrupt, StoreError, StoreNotFound
from rsmtdf.objects import ObjectPath, store_path
from rsmtdf.signals import StopFlag
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.shards import shard_name
from rsmtdf.store.status import DONE, state_of
from rsmtdf.store.store import FeatureStore


def check(store: FeatureStore, kit) -> None:
    """Every view is there, and is what the kit wrote."""
    rows = kit.rows(store)
    assert store.missing_shards(["t"]) == []
    with CachedFeatures(store, ["t"], device="cpu") as cached:
        found = cached.fetch(rows)["t"]
    for row, values in zip(rows, found, strict=True):
        torch.testing.assert_close(values.float(), kit.feature("t", int(row)), rtol=1e-3, atol=2e-3)


def flip(path: ObjectPath, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


class TestStore:
    def test_made_grown_filled_and_read(self, place, kit):
        check(kit.full(place), kit)
        store = FeatureStore.open(str(place))
        check(store, kit)
        assert store.info()["path"] == str(place)
        assert (store.n_views, store.n_shards) == (18, 6)

    def test_with_every_fifth_request_going_wrong(self, place, kit, faults):
        faults.at_random(share=0.2, seed=1)
        kit.full(place)
        store = FeatureStore.open(place)
        check(store, kit)
        store = FeatureStore.open(place, writable=True)
        store.seal()
        check(store, kit)
        assert faults.met.total() > 20

    def test_plain_zarr_reads_it(self, place, kit):
        import zarr

        store = kit.full(place)
        group = zarr.open_group(place.zarr_store(), mode="r", use_consolidated=False)
        features = group["teachers/t/features"][:]
        for row in kit.rows(store):
            torch.testing.assert_close(torch.from_numpy(features[row]).float(), kit.feature("t", int(row)))

    def test_nothing_there(self, place):
        with pytest.raises(StoreNotFound, match=str(place)):
            FeatureStore.open(place)

    def test_something_there(self, place, kit):
        kit.full(place)
        with pytest.raises(StoreError, match="something is there already"):
            kit.create(place)
        check(FeatureStore.open(place), kit)

    def test_a_server_out_of_reach_is_not_taken_for_damage(self, place, kit, faults):
        store = kit.full(store_path(str(place), retry_s=1))
        rows = kit.rows(store)
        with CachedFeatures(store, ["t"], device="cpu") as cached:
            faults.answer(503, times=10_000)
            with pytest.raises(StoreError, match="503") as caught:
                cached.fetch(rows)
            assert not isinstance(caught.value, StoreCorrupt)
            with pytest.raises(StoreError) as caught:
                FeatureStore.open(store.path)
            assert not isinstance(caught.value, StoreCorrupt | StoreNotFound)
            faults.clear()
            cached.fetch(rows)


class TestWeb:
    def test_a_store_behind_a_plain_web_server_is_read(self, kit, tmp_path, serve):
        kit.full(tmp_path / "feats.zarr").seal()
        store = FeatureStore.open(serve(tmp_path) / "feats.zarr")
        check(store, kit)
        assert store.usable(["t"]).sum() == store.n_views

    def test_nothing_there(self, tmp_path, serve):
        with pytest.raises(StoreNotFound, match="http://"):
            FeatureStore.open(serve(tmp_path) / "feats.zarr")

    def test_it_is_not_written(self, kit, tmp_path, serve):
        store = kit.full(tmp_path / "feats.zarr")
        web = FeatureStore.open(serve(tmp_path) / "feats.zarr", writable=True)
        with pytest.raises(StoreError, match="for reading only"):
            kit.write(web, 0)
        check(store, kit)


class TestDamage:
    @pytest.mark.parametrize("where", ["payload", "index", "status", "view status"])
    def test_a_flipped_bit_is_found_and_named(self, place, kit, where):
        store = kit.full(place)
        teacher = place / "teachers" / "t"
        shard = teacher / "features" / shard_name(1, 3)
        file, at = {
            "payload": (shard, 10),
            "index": (shard, shard.size() - 9),
            "status": (store.teacher("t").status.chunk_file(1), 3),
            "view status": (store.view_status_array.chunk_file(1), 3),
        }[where]
        flip(file, at)
        with pytest.raises(StoreCorrupt, match="repair") as caught:
            with CachedFeatures(FeatureStore.open(place), ["t"], device="cpu") as cached:
                cached.fetch(kit.rows(store))
            FeatureStore.open(place).usable(["t"])
        assert str(place) in str(caught.value)

    @pytest.mark.parametrize("how", ["removed", "cut short"])
    def test_a_shard_that_is_gone(self, place, kit, how):
        store = kit.full(place)
        shard = place / "teachers" / "t" / "features" / shard_name(1, 3)
        shard.unlink() if how == "removed" else shard.write_bytes(shard.read_bytes()[:-200])
        with (
            CachedFeatures(store, ["t"], device="cpu") as cached,
            pytest.raises(StoreCorrupt, match="repair") as caught,
        ):
            cached.fetch(kit.rows(store))
        assert str(shard) in str(caught.value)


class TestWriters:
    def test_exclude_each_other(self, place, kit):
        one = kit.create(place)
        one.extend([kit.weak()])
        kit.add_teacher(one)
        other = FeatureStore.open(place, writable=True)
        with one.claim([0, 1]):
            with pytest.raises(StoreError, match=r"shard 1 of .* already claimed by process"), other.claim([1]):
                pass
            with pytest.raises(StoreError, match="cannot extend"):
                other.extend([kit.strong()])
            kit.write(other, 2)
            kit.write(one, 0)
        kit.fill(other)
        other.extend([kit.strong()])
        one.refresh()
        kit.fill(one)
        check(one, kit)

    def test_a_writer_that_was_taken_over_commits_nothing(self, place, kit):
        store = kit.create(place)
        store.extend([kit.weak()])
        kit.add_teacher(store)
        kit.write(store, 0)
        with pytest.raises(StoreError, match="could not renew its locks"), store.claim([1]):
            (name,) = (place / "provenance" / "claims").names()
            (place / "provenance" / "claims" / name).write_bytes(b"{}")
            kit.write(store, 1)
        assert (state_of(store.status("t"))[store.rows_of_shard(1)] != DONE).all()
        assert (state_of(store.status("t"))[store.rows_of_shard(0)] == DONE).all()

    @pytest.mark.slow
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="the writers are forked")
    def test_killed_writers_are_followed_by_others(self, place, kit, repo):
        """kill -9 of two at work; three others go on after the dead ones' leases: all is there once, and right."""
        script = repo / "tests" / "store" / "writer_process.py"
        spec = importlib.util.spec_from_file_location("writer_process", script)
        content = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(content)
        tokens, dim = 64, 256
        store = kit.create(place)
        store.extend([kit.weak(40)])
        kit.add_teacher(store, grid=(8, 8), input_px=(112, 112), dim=dim)

        server = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(repo)},
        )

        def start(part: int, of: int) -> None:
            job = {"do": "fill", "store": str(place), "part": part, "of": of, "limit": None}
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()

        def words(wanted: str, n: int) -> list[list[str]]:
            found = []
            while len(found) < n:
                word = server.stdout.readline().split(maxsplit=2)
                assert word, "the writers are gone"
                assert word[0] != "failed", word
                found += [word] * (word[0] == wanted)
            return found

        with server:
            start(0, 2)
            start(1, 2)
            pids = [int(word[1]) for word in words("ready", 2)]
            deadline = time.monotonic() + 60
            while (done := int((state_of(store.status("t")) == DONE).sum())) < 12 and time.monotonic() < deadline:
                time.sleep(0.05)
            for pid in pids:
                os.kill(pid, 9)
            assert 12 <= done < store.n_views, "to be killed in the middle of it"
            for part in range(3):
                start(part, 3)
            words("finished", 3)
            server.stdin.close()
        store.refresh()
        assert store.missing_shards(["t"]) == []
        with CachedFeatures(store, ["t"], device="cpu") as cached:
            for row in kit.rows(store):
                values = torch.from_numpy(content.content(int(row), tokens, dim))
                torch.testing.assert_close(cached.fetch(np.array([row]))["t"][0].float(), values, rtol=1e-3, atol=2e-3)
        with store.claims.all_shards(purpose="extend"):
            pass


@pytest.mark.slow
class TestTwoStages:
    """The whole sequence as the command line does it."""

    @pytest.fixture
    def on_s3(self, tiny, place) -> ObjectPath:
        """The tiny experiment's features, computed and written to S3 while requests fail."""
        from rsmtdf.cli.caching import run_cache
        from rsmtdf.cli.planning import plan_cache
        from rsmtdf.cli.workspace import data_root

        source = tiny.source()
        job = plan_cache(source, root=data_root(source, root=None), out=place)
        run_cache(job, device="cpu", stop=StopFlag(), say=lambda line: None)
        return place

    @pytest.fixture
    def failing(self, place, faults) -> None:
        faults.at_random(share=0.1, seed=3)

    def train(self, cache: ObjectPath | Path, out: Path) -> list[float]:
        from rsmtdf.cli.training import TrainOptions, train_run
        from rsmtdf.learning.run import RunFolder

        train_run(TrainOptions(cache=cache, out=out, device="cpu"), stop=StopFlag(), say=lambda line: None)
        return [r["loss"] for r in RunFolder.open(out).records() if r["kind"] == "train"]

    def test_training_from_it_is_training_from_a_disk(self, failing, on_s3, tiny, tmp_path, faults):
        there = self.train(on_s3, tmp_path / "s3")
        assert faults.met.total() > 10
        faults.clear()
        here = self.train(tiny.store, tmp_path / "disk")
        assert len(here) == 12
        assert there == here
