from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr

from rsmtdf.store.arrays import array_metadata, write_metadata
from rsmtdf.store.scan import ShardScanner
from rsmtdf.store.shards import OpenShards, ShardDamage, ShardReader, ShardUnreachable, shard_name, write_shard_file

SHAPE = (3, 4)
BYTES = 24


def view(row: int) -> np.ndarray:
    return np.random.default_rng(row).standard_normal(SHAPE).astype(np.float16)


@pytest.fixture
def node(tmp_path):
    """An array of 12 views in shards of 4; views 2 and 7..11 are absent."""
    metadata = array_metadata(
        shape=(12, *SHAPE), dtype="float16", chunk=(1, *SHAPE), shard=(4, *SHAPE), dims=("view", "token", "channel")
    )
    write_metadata(tmp_path / "a", metadata)
    write_shard_file(tmp_path / "a" / shard_name(0, 3), [view(0), view(1), None, view(3)])
    write_shard_file(tmp_path / "a" / shard_name(1, 3), [view(4), view(5), view(6), None])
    return tmp_path / "a"


def reader(node, files: OpenShards | None = None) -> ShardReader:
    return ShardReader(node=node, dims=3, view_bytes=BYTES, shard_views=4, files=files or OpenShards())


def read(source: ShardReader, row: int) -> np.ndarray:
    out = np.empty(SHAPE, np.float16)
    source.read_into(row, out.reshape(-1).view(np.uint8), verify=True)
    return out


def test_zarr_python_reads_the_same_and_nan_in_holes(node):
    array = zarr.open_array(node, mode="r")
    for row in (0, 1, 3, 4, 5, 6):
        np.testing.assert_array_equal(array[row], view(row))
        np.testing.assert_array_equal(read(reader(node), row), view(row))
    for row in (2, 7, 8, 11):
        assert np.isnan(array[row]).all()
    np.testing.assert_array_equal(array[0:2], np.stack([view(0), view(1)]))


def test_reads_what_zarr_python_writes(node):
    zarr.open_array(node, mode="r+")[8:12] = np.stack([view(k) for k in range(8, 12)])
    np.testing.assert_array_equal(read(reader(node), 9), view(9))


def test_a_full_shard_is_byte_for_byte_zarr_pythons(node):
    ours = node / shard_name(2, 3)
    write_shard_file(ours, [view(k) for k in range(8, 12)])
    mine = ours.read_bytes()
    ours.unlink()
    zarr.open_array(node, mode="r+")[8:12] = np.stack([view(k) for k in range(8, 12)])
    # zarr-python orders chunks within a shard along a Morton curve, which for one dimension is the same.
    assert ours.read_bytes() == mine


def test_absent_missing_and_cut(node):
    source = reader(node)
    with pytest.raises(ShardDamage, match="absent"):
        read(source, 2)
    with pytest.raises(ShardDamage, match="missing"):
        read(source, 9)
    file = node / shard_name(1, 3)
    whole = file.read_bytes()
    for size in (len(whole) - 1, 30, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(ShardDamage):
            read(reader(node), 4)


def test_every_flipped_bit_is_found(node):
    file = node / shard_name(0, 3)
    good = file.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        source = reader(node)
        found = 0
        for row in (0, 1, 3):
            try:
                np.testing.assert_array_equal(read(source, row), view(row))
            except ShardDamage:
                found += 1
        assert found >= 1, f"bit {bit}"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors through /proc")
def test_descriptors_are_bounded_and_closed(tmp_path):
    for shard in range(20):
        write_shard_file(tmp_path / shard_name(shard, 3), [view(shard)] * 4)
    before = open_files()
    files = OpenShards(max_open=3)
    source = reader(tmp_path, files)
    for row in range(80):
        np.testing.assert_array_equal(read(source, row), view(row // 4))
        assert open_files() <= before + 3
    files.close()
    assert open_files() == before


def test_threads_that_push_each_others_files_out_read_right(tmp_path):
    for shard in range(10):
        write_shard_file(tmp_path / shard_name(shard, 3), [view(4 * shard + k) for k in range(4)])
    source = reader(tmp_path, OpenShards(max_open=2))
    wrong: list[int] = []

    def work(seed: int) -> None:
        for row in np.random.default_rng(seed).integers(0, 40, 150).tolist():
            wrong.extend([] if np.array_equal(read(source, row), view(row)) else [row])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_an_error_while_writing_leaves_the_old_shard(node):
    file = node / shard_name(0, 3)
    before = file.read_bytes()

    class Broken:
        dtype = np.dtype("<f2")

        def __array__(self, *args, **kwargs):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_shard_file(file, [view(9), Broken(), None, None])  # type: ignore[list-item]
    assert file.read_bytes() == before
    assert not list(node.glob("*.partial"))


def test_short_reads_are_gone_on_with(node, monkeypatch):
    """Network file systems may return less at a time."""
    preadv = os.preadv

    def little(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [memoryview(buffers[0])[:5]], offset)

    monkeypatch.setattr(os, "preadv", little)
    np.testing.assert_array_equal(read(reader(node), 3), view(3))


@pytest.mark.parametrize(("code", "damage"), [("EIO", True), ("ESTALE", False), ("ENOTCONN", False), ("EACCES", False)])
def test_what_the_system_says_is_damage_or_not(node, monkeypatch, code, damage):
    source = reader(node)
    read(source, 0)

    def fail(*args: object) -> int:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ShardDamage if damage else ShardUnreachable, match="reading failed"):
        read(source, 0)


def test_a_replaced_file_is_read_by_its_own_index(node):
    files = OpenShards(max_open=1)
    source = reader(node, files)
    read(source, 0)
    read(source, 4)  # closes the first
    write_shard_file(node / shard_name(0, 3), [view(9), view(8), view(7), view(6)])
    np.testing.assert_array_equal(read(source, 2), view(7))


def test_files_are_opened_as_bytes_where_that_must_be_said(node, kit, path, monkeypatch):
    """Windows turns line ends into others, and stops at a Ctrl-Z, without O_BINARY."""
    store = kit.full(path)
    flag, real, opened = 1 << 30, os.open, []

    def opens(file, flags, *more, **named):
        opened.append((Path(file).name, bool(flags & flag)))
        return real(file, flags & ~flag, *more, **named)

    monkeypatch.setattr(os, "O_BINARY", flag, raising=False)
    monkeypatch.setattr(os, "open", opens)
    read(reader(node), 0)
    assert ShardScanner().scan(store.teacher("t"), 1, store.status("t")[4:8])[0] == []
    assert opened == [("c.0.0.0", True), ("c.1.0.0", True)]
