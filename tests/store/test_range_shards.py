"""Shards in object storage, over a dictionary that answers as a server does."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr.storage

from rsmtdf.errors import StoreCorrupt, StoreError, StoreIncomplete
from rsmtdf.signals import StopFlag
from rsmtdf.store.range_shards import RangeShards
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.remove import remove
from rsmtdf.store.shards import ShardDamage, ShardUnreachable, shard_name, write_shard_file

SHAPE = (3, 4)
BYTES = 24


@dataclass
class Server:
    """Objects by key, what was asked for, and the trouble to come."""

    objects: dict[str, bytes]
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    trouble: OSError | None = None

    def get(self, kind: str, key: str, n: int) -> bytes:
        self.asked.append((kind, key, n))
        if self.trouble is not None:
            raise self.trouble
        if key not in self.objects:
            raise FileNotFoundError(2, "no such object", key)
        return self.objects[key]


@dataclass(frozen=True)
class FakeObject:
    server: Server
    key: str = ""

    def __truediv__(self, name: str) -> FakeObject:
        return FakeObject(self.server, f"{self.key}/{name}".strip("/"))

    def __str__(self) -> str:
        return f"s3://bucket/{self.key}"

    def read_bytes(self) -> bytes:
        return self.server.get("all", self.key, 1)

    def zarr_store(self) -> zarr.storage.MemoryStore:
        found = zarr.storage.MemoryStore()
        for key, data in self.server.objects.items():
            if key.startswith(f"{self.key}/"):
                found._store_dict[key.removeprefix(f"{self.key}/")] = zarr.core.buffer.cpu.Buffer.from_bytes(data)
        return found

    def read_tail(self, length: int) -> tuple[bytes, int]:
        data = self.server.get("tail", self.key, length)
        return data[-length:], len(data)

    def read_ranges(self, starts: Sequence[int], lengths: Sequence[int]) -> list[memoryview]:
        data = memoryview(self.server.get("ranges", self.key, len(starts)))
        if any(s + n > len(data) for s, n in zip(starts, lengths, strict=True)):
            raise OSError(errno.EIO, "range beyond the end", self.key)
        return [data[s : s + n] for s, n in zip(starts, lengths, strict=True)]


def view(row: int) -> np.ndarray:
    return np.random.default_rng(row).standard_normal(SHAPE).astype(np.float16)


@pytest.fixture
def server(tmp_path) -> Server:
    """12 views in shards of 4; 2 and 7 are absent, shard 2 is missing."""
    write_shard_file(tmp_path / shard_name(0, 3), [view(0), view(1), None, view(3)])
    write_shard_file(tmp_path / shard_name(1, 3), [view(4), view(5), view(6), None])
    return Server({f"a/{f.name}": f.read_bytes() for f in tmp_path.iterdir()})


def reader(server: Server) -> RangeShards:
    return RangeShards(node=FakeObject(server, "a"), dims=3, view_bytes=BYTES, shard_views=4)


def read(source: RangeShards, *rows: int) -> np.ndarray:
    out = np.empty((len(rows), *SHAPE), np.float16)
    source.read(rows, list(out.view(np.uint8).reshape(len(rows), -1)), verify=True)
    return out


def test_views_of_a_shard_are_one_request_and_its_index_is_read_once(server) -> None:
    source = reader(server)
    np.testing.assert_array_equal(read(source, 3, 0, 1, 0), np.stack([view(k) for k in (3, 0, 1, 0)]))
    np.testing.assert_array_equal(read(source, 1), view(1)[None])
    assert server.asked == [("tail", "a/c.0.0.0", 68), ("ranges", "a/c.0.0.0", 4), ("ranges", "a/c.0.0.0", 1)]
    assert source.file(5) == "s3://bucket/a/c.1.0.0"


def test_damage_names_the_place_among_the_views_asked_for(server) -> None:
    with pytest.raises(ShardDamage, match="absent") as caught:
        read(reader(server), 0, 2)
    assert caught.value.place == 1
    with pytest.raises(ShardDamage, match="missing"):
        read(reader(server), 9)
    good = server.objects["a/c.0.0.0"]
    for size in (len(good) - 1, 40, 0):
        server.objects["a/c.0.0.0"] = good[:size]
        with pytest.raises(ShardDamage, match="cut short"):
            read(reader(server), 0)


def test_every_flipped_bit_is_found(server) -> None:
    good = server.objects["a/c.1.0.0"]
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        server.objects["a/c.1.0.0"] = bytes(bad)
        with pytest.raises(ShardDamage):
            read(reader(server), 4, 5, 6)


def test_trouble_on_the_way_is_no_damage(server) -> None:
    source = reader(server)
    for error in (ConnectionError(104, "connection reset"), TimeoutError(110, "timed out"), PermissionError(13, "no")):
        server.trouble = error
        with pytest.raises(ShardUnreachable, match=f"reading its index failed: {error.strerror}"):
            read(reader(server), 0)
        server.trouble = None
        read(source, 0)
        server.trouble = error
        with pytest.raises(ShardUnreachable, match=rf"reading 1 view\(s\) of 28 bytes failed: {error.strerror}"):
            read(source, 0)
    server.trouble = None
    np.testing.assert_array_equal(read(source, 0), view(0)[None])


def test_an_object_that_was_replaced_is_read_by_its_new_index_once_the_old_is_forgotten(server, tmp_path) -> None:
    source = reader(server)
    read(source, 0)
    write_shard_file(tmp_path / "new", [view(0), view(1), view(2), view(3)])
    server.objects["a/c.0.0.0"] = (tmp_path / "new").read_bytes()
    source.forget(3)
    np.testing.assert_array_equal(read(source, 3, 2), np.stack([view(3), view(2)]))


def test_from_many_threads(server) -> None:
    source = reader(server)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for row in np.random.default_rng(seed).choice([0, 1, 3, 4, 5, 6], 100).tolist():
            wrong.extend([] if np.array_equal(read(source, row)[0], view(row)) else [row])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


class RemoteStore:
    """A store whose features are on a server."""

    def __init__(self, store: Any, server: Server) -> None:
        self._store, self._server = store, server

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def teacher(self, name: str) -> Any:
        return replace(self._store.teacher(name), path=FakeObject(self._server, f"teachers/{name}"))


@pytest.fixture
def remote(kit, path) -> Any:
    store = kit.full(path, codec="int8")
    files = [f for f in path.rglob("*") if f.is_file()]
    return RemoteStore(store, Server({str(f.relative_to(path)): f.read_bytes() for f in files}))


ROWS = [22, 0, 13, 0, 9, 5, 16, 12]


@pytest.mark.parametrize("threads", [1, 4])
def test_a_reader_takes_the_views_of_a_shard_together(remote, threads) -> None:
    with FeatureReader(remote._store, "t") as local:
        expected = local.get_many(ROWS)
    with FeatureReader(remote, "t", threads=threads) as reader:
        remote._server.asked.clear()
        found = reader.get_many(ROWS)
        asked = [key for kind, key, _ in remote._server.asked if kind == "ranges" and "codes" in key]
    assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in expected.items()}
    assert sorted(asked) == [f"teachers/t/codes/c.{k}.0.0" for k in (0, 1, 2, 3, 4, 5)]


def test_the_fallback_reads_the_same_from_a_server(remote) -> None:
    with FeatureReader(remote, "t") as reader, FeatureReader(remote, "t", force_zarr=True) as fallback:
        one, other = reader.get_many(ROWS), fallback.get_many(ROWS)
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in other.items()}


def test_damage_and_trouble_are_told_apart(remote) -> None:
    server = remote._server
    key = "teachers/t/codes/c.3.0.0"
    good = server.objects[key]
    server.objects[key] = good[:60] + bytes([good[60] ^ 4]) + good[61:]
    with FeatureReader(remote, "t") as reader:
        message = rf"teacher 't', view 13 \(tile .*\), file s3://bucket/{key}: payload checksum .* rsmtdf cache repair"
        with pytest.raises(StoreCorrupt, match=message):
            reader.get_many([0, 12, 13])
        server.objects[key] = good
        server.trouble = ConnectionError(104, "connection reset, tried for 60 s")
        message = (
            rf"view 13 .*, file s3://bucket/{key}: reading 1 view\(s\) of 52 bytes failed: connection reset, tried "
        )
        message += "for 60 s. Nothing is known to be wrong .* run the same command again"
        with pytest.raises(StoreError, match=message) as caught:
            reader.get_many([13])
        assert not isinstance(caught.value, StoreCorrupt)
        server.trouble = None
        reader.get_many([13])


def upload(path: Path, server: Server) -> None:
    """Makes the server's objects those of the store at `path`."""
    server.objects = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_a_shard_that_lost_a_view_while_it_was_read(kit, path) -> None:
    """The index kept from before points at the next view's bytes, and beyond the end: no damage."""
    store = kit.full(path)
    server = Server({})
    upload(path, server)
    teacher = store.teacher("t")
    with FeatureReader(RemoteStore(store, server), "t", verify=False) as reader:
        reader.get_many([5])
        remove(path, stream="weak", seed=0, stop=StopFlag())  # rows 0 to 4; row 4 shares the shard of 5 to 7
        upload(path, server)
        for row in (5, 6, 7):
            found = teacher.decode(
                {k: torch.from_numpy(v) for k, v in reader.get_many([row]).items()}, device=torch.device("cpu")
            )
            assert found[0].equal(teacher.roundtrip(kit.feature("t", row)[None])[0])
        with pytest.raises(StoreIncomplete, match=r"view 4 \(tile .*, weak, seed 0\) was removed .* cache rm"):
            reader.get_many([4])


def test_an_object_cut_short_is_no_trouble_on_the_way_once_it_is_whole_again(kit, path) -> None:
    server = Server({})
    store = kit.full(path)
    upload(path, server)
    with FeatureReader(RemoteStore(store, server), "t") as reader:
        expected = reader.get_many([7])["features"].copy()
        remove(path, stream="weak", seed=0, stop=StopFlag())
        upload(path, server)
        server.asked.clear()
        np.testing.assert_array_equal(reader.get_many([7])["features"], expected)
    assert [kind for kind, _, _ in server.asked] == ["ranges", "tail", "ranges"]


def test_a_shard_that_gained_a_view_while_it_was_read(kit, path) -> None:
    def write(rows: list[int], left: list[int]) -> None:
        features = {"t": torch.stack([kit.feature("t", r) for r in rows])}
        kit.write(store, 0, view_crcs={r: kit.crc(r) for r in rows}, left=left, features=features)
        upload(path, server)

    server = Server({})
    store = kit.create(path)
    store.extend([kit.weak(4, seeds=1)])
    kit.add_teacher(store)
    write([1, 2, 3], [0])
    with FeatureReader(RemoteStore(store, server), "t") as reader:
        expected = reader.get_many([1, 2, 3])["features"].copy()
        write([0, 1, 2, 3], [])
        np.testing.assert_array_equal(reader.get_many([1, 2, 3])["features"], expected)
