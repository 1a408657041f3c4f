"""What a disk does to a writer: input/output errors at every step, no space, no permission. Nothing is half-told."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsmtdf.errors import StoreError
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.store import FeatureStore

NOBODY = 65534


class FailingCall:
    """A call of the operating system that fails once, at its n-th use, as a bad disk does."""

    def __init__(self, real, at: int, error: int) -> None:
        self._real, self._at, self._error, self.used = real, at, error, 0

    def __call__(self, *arguments, **named):
        self.used += 1
        if self.used == self._at:
            raise OSError(self._error, os.strerror(self._error), str(arguments[0]))
        return self._real(*arguments, **named)


def write_error(kit, store) -> str | None:
    try:
        kit.write(store, 1)
    except StoreError as error:
        return str(error)
    return None


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_shard_whose_write_fails_at_any_step_stays_undone(kit, tmp_path, monkeypatch, call, code):
    original = tmp_path / "original"
    store = kit.create(original)
    store.extend([kit.weak(4, seeds=2)])
    kit.add_teacher(store)
    kit.write(store, 0)
    failed = 0
    for at in range(1, 30):
        path = shutil.copytree(original, tmp_path / f"{at}")
        store = FeatureStore.open(path, writable=True)
        with monkeypatch.context() as patch:
            broken = FailingCall(getattr(os, call), at, code)
            patch.setattr(os, call, broken)
            message = write_error(kit, store)
        if message is None:
            assert broken.used < at, "every failure must be told"
            break
        failed += 1
        assert message.startswith(f"shard 1 of feature store {path} could not be written: {os.strerror(code)}")
        assert not list(path.rglob("*.partial"))
        if store.missing_shards(["t"]):
            kit.write(store, 1)
        else:
            assert call == "fsync", "only the very last sync fails after everything is in place"
        with CachedFeatures(store, ["t"], device="cpu", rows=kit.rows(store)) as source:
            assert source.fetch(kit.rows(store))["t"].shape[0] == 8
    else:
        pytest.fail("the steps of a commit never end")
    assert failed >= 4, "data, note and two status words each take a step"


def test_a_read_that_fails_is_an_error_that_names_the_view(kit, path, monkeypatch):
    kit.full(path)
    store = FeatureStore.open(path)
    with CachedFeatures(store, ["t"], device="cpu") as source:
        real = os.preadv
        monkeypatch.setattr(os, "preadv", FailingCall(real, 2, errno.EIO))
        assert source.fetch(kit.rows(store)[3:4])["t"][0].equal(kit.feature("t", 3)), "once is not damage"
        again = FailingCall(real, 1, errno.EIO)
        monkeypatch.setattr(os, "preadv", FailingCall(again, 2, errno.EIO))
        with pytest.raises(
            StoreError, match=r"teacher 't', view 3 \(tile scène/3_0, weak, seed 0\).*Input/output error"
        ):
            source.fetch(kit.rows(store)[3:4])


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that other users can reach, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="rsmtdf-faults-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become somebody without rights"
)
def test_a_store_that_may_only_be_read(kit, public, repo):
    path = public / "feats.zarr"
    store = kit.create(path)
    store.extend([kit.weak(4, seeds=2)])
    kit.add_teacher(store)
    kit.write(store, 0)
    code = """
import json, os, sys
import numpy as np
from rsmtdf.errors import StoreError
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.store import FeatureStore
os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
found = {}
store = FeatureStore.open(sys.argv[1])
with CachedFeatures(store, ["t"], device="cpu") as source:
    found["read"] = list(source.fetch(np.arange(4))["t"].shape)
try:
    writable = FeatureStore.open(sys.argv[1], writable=True)
    writable.write_shard(1, view_crcs={r: r for r in range(4, 8)}, skipped={}, provenance={},
                         features={"t": np.zeros((4, 6, 8), np.float32)})
except StoreError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(NOBODY)],
        env={**os.environ, "PYTHONPATH": str(repo)},
        cwd=public,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["read"] == [4, 6, 8]
    assert found["error"].startswith(f"cannot write to feature store {path}: Permission denied")


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_full(kit, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        store = kit.create(disk / "feats.zarr")
        store.extend([kit.weak(40, seeds=2)])
        kit.add_teacher(store, grid=(16, 16), dim=8)
        with pytest.raises(StoreError, match="could not be written: No space left on device"):
            for shard in store.missing_shards(["t"]):
                kit.write(store, shard)
        done = store.n_shards - len(store.missing_shards(["t"]))
        assert 0 < done < store.n_shards
        assert not list(disk.rglob("*.partial"))
        assert FeatureStore.open(disk / "feats.zarr", writable=True).missing_shards(["t"]) == store.missing_shards(
            ["t"]
        )
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True, capture_output=True)
        assert len(kit.fill(store)) == store.n_shards - done
        assert store.missing_shards(["t"]) == []
    finally:
        subprocess.run(["umount", disk], check=False, capture_output=True)


@pytest.mark.parametrize("age_s", [-4e8, 4e8])
def test_clocks_of_other_machines_change_nothing(kit, path, age_s):
    """Files from the past or the future, as a machine with a wrong clock leaves them."""
    store = kit.create(path)
    store.extend([kit.weak(4, seeds=2)])
    kit.add_teacher(store)
    kit.write(store, 0)
    litter = path / "teachers" / "t" / "features" / "c.1.0.0.0123.partial"
    litter.write_bytes(b"half")
    then = time.time() + age_s
    for file in path.rglob("*"):
        os.utime(file, (then, then))
    store = FeatureStore.open(path, writable=True)
    assert store.missing_shards(["t"]) == [1]
    assert store.clean_partials() == 1
    assert kit.fill(store) == [1]
    store.seal()
    again = FeatureStore.open(path)
    with CachedFeatures(again, ["t"], device="cpu", rows=kit.rows(again)) as source:
        assert source.fetch(kit.rows(again))["t"].shape[0] == 8
