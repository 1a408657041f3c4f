from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from rsmtdf.errors import StoreError
from rsmtdf.store.locks import StoreLocks
from rsmtdf.store.store import FeatureStore

NO_RANGES = """
import fcntl
del fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK
"""
OTHER = """
import sys
from pathlib import Path
from rsmtdf.store.locks import StoreLocks
locks = StoreLocks(store=Path("s"), file=Path(sys.argv[1]))
with locks.claim(range(3, 6)), locks.mutex(timeout_s=0):
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def locks(tmp_path) -> StoreLocks:
    return StoreLocks(store=tmp_path, file=tmp_path / "locks")


@pytest.fixture
def other(tmp_path, repo):
    """A process that holds shards 3, 4, 5 and the mutex."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path / "locks")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repo)},
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_another_processs_claim_is_refused_with_its_name(locks, other):
    with (
        pytest.raises(StoreError, match=f"shard 3 of .* is already claimed by process {other.pid} on "),
        locks.claim(range(5)),
    ):
        pass
    with locks.claim([0, 1, 2, 6, 9]):
        pass
    with (
        pytest.raises(StoreError, match=f"cannot extend .* while process {other.pid} on .* is writing"),
        locks.all_shards(purpose="extend"),
    ):
        pass
    with pytest.raises(StoreError, match=f"changed by process {other.pid}"), locks.mutex(timeout_s=0.1):
        pass


def test_kill_9_releases(locks, other):
    other.kill()
    other.wait()
    with locks.claim([4]), locks.mutex(timeout_s=0):
        pass
    with locks.all_shards(purpose="extend"):
        pass


def test_a_process_excludes_itself(locks):
    with locks.claim([1, 2, 7]):
        with pytest.raises(StoreError, match="shard 7 of"), locks.claim([0, 7]):
            pass
        with locks.claim([0]):  # what the refused claim had taken is free again
            pass
        with pytest.raises(StoreError, match="while process"), locks.all_shards(purpose="extend"):
            pass
    with locks.claim([7]):
        pass


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "provenance").write_text("a file in the way")
    locks = StoreLocks(store=tmp_path, file=tmp_path / "provenance" / "locks")
    with pytest.raises(StoreError, match="cannot write to feature store"), locks.claim([0]):
        pass


@pytest.fixture(params=["none", "those of macOS"])
def no_ranges(request, monkeypatch):
    """A platform without open-file-description locks, or with some of another layout."""
    if request.param == "none":
        for name in ("F_OFD_SETLK", "F_OFD_GETLK"):
            monkeypatch.delattr(fcntl, name)
    else:
        monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "fcntl", None)


def test_one_flock_is_shared_by_what_a_process_owns(no_ranges, tmp_path):
    locks = StoreLocks(store=tmp_path, file=tmp_path / "locks")
    stranger = StoreLocks(store=tmp_path, file=tmp_path / "locks")  # another open file, as another process has

    def refused() -> None:
        with pytest.raises(StoreError, match=f"claimed by process {os.getpid()} on "), stranger.claim([30]):
            pass

    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(locks.mutex(timeout_s=0))
        second.enter_context(locks.claim([1, 2, 7]))
        with locks.claim([0, 5]):
            refused()
        first.close()  # whoever came first need not be the last to go
        refused()
    with stranger.claim([30]), pytest.raises(StoreError, match="claimed by"), locks.claim([0]):
        pass


def test_what_one_process_owns_excludes_itself_without_ranges(no_ranges, tmp_path):
    test_a_process_excludes_itself(StoreLocks(store=tmp_path, file=tmp_path / "locks"))
    locks = StoreLocks(store=tmp_path, file=tmp_path / "locks")
    with locks.mutex(timeout_s=0):
        with pytest.raises(StoreError, match="is being changed"), locks.mutex(timeout_s=0.1):
            pass
        with locks.all_shards(purpose="extend"), pytest.raises(StoreError, match="already claimed"), locks.claim([99]):
            pass


def test_one_writer_per_store_without_ranges(no_ranges, tmp_path, repo):
    locks = StoreLocks(store=tmp_path, file=tmp_path / "locks")
    process = subprocess.Popen(
        [sys.executable, "-c", NO_RANGES + OTHER, str(tmp_path / "locks")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repo)},
    )
    try:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(StoreError, match=f"shard 0 of .* claimed by process {process.pid} on "), locks.claim([0]):
            pass
        with pytest.raises(StoreError, match=f"changed by process {process.pid}"), locks.mutex(timeout_s=0.1):
            pass
    finally:
        process.kill()
        process.communicate()
    with locks.claim([4]), locks.mutex(timeout_s=0):
        pass


def test_threads_share_the_flock(no_ranges, tmp_path):
    locks = StoreLocks(store=tmp_path, file=tmp_path / "locks")
    refused: list[StoreError] = []

    def work(shard: int) -> None:
        for _ in range(200):
            try:
                with locks.claim([shard]):
                    pass
            except StoreError as error:
                refused.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert refused == []


def test_a_store_is_written_without_ranges(no_ranges, kit, path):
    store = kit.full(path)
    store.seal()
    with store.claim([0, 1]):
        kit.write(store, 0)
        assert store.clean_partials() == 0
    store = FeatureStore.open(path, writable=True)
    store.extend([kit.strong(seed=5)])
    kit.fill(store)
    store.seal()
    assert store.missing_shards(["t"]) == []
