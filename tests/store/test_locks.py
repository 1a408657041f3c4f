from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rsmtdf.errors import StoreError
from rsmtdf.store.locks import StoreLocks

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
        pytest.raises(StoreError, match=f"shards 0 to 4 of .* already claimed by process {other.pid} on "),
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
    locks = StoreLocks(store=tmp_path, file=tmp_path / "missing" / "locks")
    with pytest.raises(StoreError, match="cannot write to feature store"), locks.claim([0]):
        pass
