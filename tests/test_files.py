"""A file is whole or absent: errors, kills and concurrent writers never leave a torn one."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from rsmtdf import files
from rsmtdf.files import PARTIAL, fsync_dir, whole_file, write_whole

OLD = b"old content"


@pytest.fixture
def target(tmp_path) -> Path:
    path = tmp_path / "run.json"
    path.write_bytes(OLD)
    return path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_write_whole_makes_and_replaces(tmp_path):
    path = tmp_path / "a.bin"
    for data in (b"one", b"", b"three" * 1000):
        write_whole(path, data)
        assert path.read_bytes() == data
        assert names(tmp_path) == ["a.bin"]


def test_target_changes_only_on_leaving(target):
    with whole_file(target) as temporary:
        temporary.write_bytes(b"new content")
        assert target.read_bytes() == OLD
        assert temporary.parent == target.parent, "a rename across file systems would not be atomic"
        assert temporary.name.endswith(PARTIAL)
    assert target.read_bytes() == b"new content"
    assert names(target.parent) == ["run.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_keeps_the_old_file_and_leaves_no_litter(target, error):
    with pytest.raises(error), whole_file(target) as temporary:
        temporary.write_bytes(b"half of it")
        raise error
    assert target.read_bytes() == OLD
    assert names(target.parent) == ["run.json"]


def test_an_error_before_anything_was_written(tmp_path):
    with pytest.raises(ValueError), whole_file(tmp_path / "new"):
        raise ValueError
    assert names(tmp_path) == []


def test_forgetting_to_write_is_an_error_and_keeps_the_old_file(target):
    with pytest.raises(FileNotFoundError), whole_file(target):
        pass
    assert target.read_bytes() == OLD


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_whole(tmp_path / "nowhere" / "a", b"x")


def test_data_is_on_disk_before_the_rename_and_the_rename_before_returning(target, monkeypatch):
    """The order that survives a power cut: fsync the file, rename it, fsync the folder."""
    done: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").resolve().name if Path("/proc/self/fd").exists() else ""
        done.append("fsync folder" if name == target.parent.name else "fsync file")
        real_fsync(fd)

    def replace(a: Path, b: Path) -> None:
        done.append("rename")
        real_replace(a, b)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    write_whole(target, b"new")
    if not Path("/proc/self/fd").exists():
        pytest.skip("the names of file descriptors are only known on Linux")
    assert done == ["fsync file", "rename", "fsync folder"]


def test_windows_flushes_only_what_may_be_written_to(target, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    flushed: list[int] = []

    def fsync(fd: int) -> None:
        flushed.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)
        if flushed[-1] == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    windows = SimpleNamespace(**{**vars(os), "name": "nt", "fsync": fsync})
    monkeypatch.setattr(files, "os", windows)
    write_whole(target, b"new")
    assert target.read_bytes() == b"new"
    assert flushed == [os.O_RDWR]


def test_fsync_dir_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        fsync_dir(tmp_path / "nowhere")


def test_concurrent_writers_leave_one_whole_version(tmp_path):
    path = tmp_path / "shared"
    versions = [bytes([i]) * 200_000 for i in range(6)]
    threads = [threading.Thread(target=write_whole, args=(path, v)) for v in versions]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert path.read_bytes() in versions
    assert names(tmp_path) == ["shared"]


WRITER = """
import sys, time
from pathlib import Path
from rsmtdf.files import whole_file
with whole_file(Path(sys.argv[1])) as temporary, temporary.open("wb") as f:
    f.write(b"x" * 100_000)
    f.flush()
    print("half", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_kill_9_in_mid_write_keeps_the_old_file_whole(target, repo):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repo)},
    )
    with process:
        assert process.stdout.readline() == "half\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert target.read_bytes() == OLD
    left = [n for n in names(target.parent) if n != "run.json"]
    assert all(n.startswith("run.json.") and n.endswith(PARTIAL) for n in left), "litter can be told from results"
    write_whole(target, b"after the crash")
    assert target.read_bytes() == b"after the crash"
