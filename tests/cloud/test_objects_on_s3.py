from __future__ import annotations

import errno
import http.client
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rsmtdf.buckets import Bucket
from rsmtdf.objects import GAP_BYTES, PART_BYTES, ObjectPath, Version, store_path

BIG = 5 * PART_BYTES + 12345
"""Large enough for an upload in parts."""


@pytest.fixture(scope="module")
def big() -> bytes:
    return np.random.default_rng(0).integers(0, 256, BIG, np.uint8).tobytes()


def hold(error: OSError, place: ObjectPath) -> None:
    """An OSError that existing code can explain."""
    assert error.errno
    assert error.strerror
    assert "\n" not in error.strerror
    assert error.filename.startswith(str(place))
    assert "not-a-secret" not in str(error)
    assert "AKIA" not in str(error)


class TestReadingAndWriting:
    def test_write_replace_read(self, place):
        path = place / "a" / "b"
        for data in (b"one", b"", b"three" * 1000):
            path.write_bytes(data)
            assert path.read_bytes() == data
            assert path.size() == len(data)

    def test_any_buffer_is_written(self, place):
        values = np.arange(12, dtype="<u8").reshape(3, 4)
        for data in (bytearray(b"abc"), memoryview(b"abc"), memoryview(values)):
            (place / "x").write_bytes(data)
            assert (place / "x").read_bytes() == bytes(data)

    def test_large_objects_go_up_in_parts(self, place, big, faults):
        (place / "x").write_bytes(memoryview(big))
        assert sum("partNumber" in path for _, path in faults.requests) == 6
        assert (place / "x").read_bytes() == big

    def test_missing(self, place):
        path = place / "missing"
        for use in (
            path.read_bytes,
            path.size,
            path.unlink,
            lambda: path.read_tail(4),
            lambda: path.read_ranges([0], [1]),
        ):
            with pytest.raises(FileNotFoundError) as caught:
                use()
            assert caught.value.errno == errno.ENOENT
            hold(caught.value, place)
        assert not path.exists()
        assert not path.is_file()
        assert not path.is_dir()
        assert path.names() == []
        assert path.walk() == []
        path.unlink(missing_ok=True)
        path.remove_tree()

    def test_tail(self, place):
        path = place / "x"
        path.write_bytes(b"0123456789")
        assert path.read_tail(3) == (b"789", 10)
        assert path.read_tail(10) == (b"0123456789", 10)
        assert path.read_tail(99) == (b"0123456789", 10)
        path.write_bytes(b"")
        assert path.read_tail(3) == (b"", 0)

    def test_ranges(self, place, big, faults):
        path = place / "x"
        path.write_bytes(big)
        starts = [3 * GAP_BYTES, 0, 100, 7, BIG - 5, 50]
        lengths = [1000, 10, 1, 0, 5, 60]
        faults.clear()
        found = path.read_ranges(starts, lengths)
        assert [bytes(data) for data in found] == [big[s : s + n] for s, n in zip(starts, lengths, strict=True)]
        assert len(faults.requests) == 3, "those near each other by one request"
        assert path.read_ranges([], []) == []

    @pytest.mark.parametrize(("start", "length"), [(8, 3), (10, 1), (1000, 5)])
    def test_a_range_past_the_end_is_an_error_and_never_short(self, place, start, length):
        path = place / "x"
        path.write_bytes(b"0123456789")
        with pytest.raises(OSError) as caught:
            path.read_ranges([0, start], [1, length])
        hold(caught.value, place)
        with pytest.raises(OSError) as caught:
            path.read_ranges([start], [length])
        hold(caught.value, place)

    def test_children(self, place):
        for name in ("zarr.json", "views/status/zarr.json", "views/status/c/0", "views2/x"):
            (place / name).write_bytes(name.encode())
        assert place.names() == ["views", "views2", "zarr.json"]
        assert (place / "views").names() == ["status"]
        assert place.is_dir()
        assert not place.is_file()
        assert (place / "views").exists()
        assert not (place / "view").exists(), "a prefix of a name is no folder"
        assert (place / "zarr.json").is_file()
        assert not (place / "zarr.json").is_dir()
        assert sorted((place / "views").walk()) == [("status/c/0", 16), ("status/zarr.json", 22)]
        assert place.parent.names() == ["feats.zarr"]
        (place / "views").remove_tree()
        assert place.names() == ["views2", "zarr.json"]

    def test_folders_made_by_a_web_console_are_no_objects(self, place, proxy):
        (place / "x").write_bytes(b"1")
        connection = http.client.HTTPConnection("127.0.0.1", proxy.server_port)
        connection.request("PUT", f"/{place.bucket.authority}/{place.key}/", b"")
        assert connection.getresponse().status == 200
        connection.close()
        assert place.names() == ["x"]
        assert place.walk() == [("x", 1)]

    def test_thousands_of_children(self, place):
        """More than one page of a list, and more than one request of a removal."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda k: (place / f"c/{k}").write_bytes(b"1"), range(1100)))
        assert len((place / "c").names()) == 1100
        assert len(place.walk()) == 1100
        place.remove_tree()
        assert not place.exists()

    def test_a_bucket_that_is_not_there(self, bucket):
        path = store_path("s3://no-such-bucket-here/x", retry_s=3)
        for use in (path.read_bytes, lambda: path.write_bytes(b""), path.names, lambda: path.create(b"")):
            with pytest.raises(FileNotFoundError, match="NoSuchBucket"):
                use()

    def test_zarr_python_reads_and_writes(self, place):
        import zarr

        values = np.arange(10, dtype=np.int32)
        zarr.create_array(place.zarr_store(read_only=False), name="a", data=values, chunks=(4,))
        assert (place / "a" / "c" / "0").is_file()
        np.testing.assert_array_equal(zarr.open_array(place.zarr_store(), path="a", mode="r")[:], values)


class TestConditions:
    def test_create_makes_and_never_replaces(self, place):
        path = place / "x"
        version = path.create(b"one")
        assert version is not None
        assert path.create(b"two") is None
        assert path.read_tagged() == (b"one", version)

    def test_replace_if_replaces_only_that_version(self, place):
        path = place / "x"
        first = path.create(b"one")
        second = path.replace_if(b"two", first)
        assert second not in (None, first)
        assert path.replace_if(b"three", first) is None
        assert path.read_tagged() == (b"two", second)
        path.unlink()
        assert path.replace_if(b"four", second) is None
        assert not path.exists()
        assert path.replace_if(b"five", Version('"nothing"', None)) is None

    def test_one_of_many_threads_creates(self, place):
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda k: (place / "x").create(str(k).encode()), range(16)))
        (winner,) = [k for k, version in enumerate(made) if version is not None]
        assert (place / "x").read_bytes() == str(winner).encode()

    def test_every_increment_counts(self, place):
        """Sixteen times read, add one, replace if unchanged: none is lost."""
        path = place / "n"
        path.write_bytes(b"0")

        def add(_: int) -> None:
            while True:
                data, version = path.read_tagged()
                if path.replace_if(str(int(data) + 1).encode(), version) is not None:
                    return

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(add, range(16)))
        assert path.read_bytes() == b"16"


class TestFaults:
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    @pytest.mark.parametrize("kind", ["500", "503", "cut", "lose"])
    def test_reads_survive(self, place, faults, big, method, kind):
        path = place / "x"
        path.write_bytes(big)
        plan = {"cut": faults.cut, "lose": faults.lose}.get(kind, lambda **k: faults.answer(int(kind), **k))
        plan(times=3, method=method)
        if method == "HEAD":
            assert path.size() == BIG
        else:
            assert path.read_bytes() == big
        assert faults.met.total() == 3
        plan(times=3, method=method)
        assert [bytes(data) for data in path.read_ranges([5, BIG - 9], [3_000_000, 9])] == [big[5:3_000_005], big[-9:]]
        assert path.read_tail(20) == (big[-20:], BIG)
        plan(times=2, method=method)
        assert place.names() == ["x"]

    @pytest.mark.parametrize("kind", ["500", "503", "cut", "lose"])
    @pytest.mark.parametrize(("method", "part"), [("PUT", "partNumber"), ("POST", "uploads"), ("POST", "uploadId")])
    def test_uploads_in_parts_survive(self, place, faults, big, kind, method, part):
        path = place / "x"
        plan = {"cut": faults.cut, "lose": faults.lose}.get(kind, lambda **k: faults.answer(int(kind), **k))
        plan(times=2, method=method, part=part)
        path.write_bytes(big)
        assert faults.met.total() == 2
        assert path.read_bytes() == big

    def test_an_upload_that_fails_leaves_the_old_object(self, place, faults, big):
        path = place / "x"
        path.write_bytes(b"old")
        faults.answer(503, times=10_000, part="partNumber=3")
        start = time.monotonic()
        with pytest.raises(OSError) as caught:
            path.write_bytes(big)
        assert time.monotonic() - start < 20
        hold(caught.value, place)
        assert "503" in caught.value.strerror
        faults.clear()
        assert path.read_bytes() == b"old"
        assert place.names() == ["x"]

    def test_a_stalled_read_is_tried_again(self, place, faults):
        path = store_path(str(place / "x"), retry_s=4)
        path.write_bytes(b"data")
        faults.stall(20, times=1, method="GET")
        start = time.monotonic()
        assert path.read_bytes() == b"data"
        assert 1.5 < time.monotonic() - start < 10

    def test_a_slow_answer_is_told_of_while_it_is_awaited(self, place, faults, caplog):
        bucket = Bucket("s3", place.bucket.authority, 20, said_after_s=0.2)
        path = ObjectPath(bucket, place.key + "/x")
        path.write_bytes(b"data")
        assert not caplog.text
        faults.stall(1, times=1, method="GET")
        assert path.read_bytes() == b"data"
        assert f"{path}: not finished after 0.2 s" in caplog.text

    def test_a_server_that_only_stalls_is_an_error(self, place, faults):
        path = store_path(str(place / "x"), retry_s=2)
        faults.stall(20, times=100)
        start = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            path.read_bytes()
        assert time.monotonic() - start < 10
        hold(caught.value, place)

    def test_a_server_that_fails_for_ever_is_an_error_after_the_time_given(self, place, faults):
        faults.answer(503, times=10_000)
        place = store_path(str(place), retry_s=1)
        for use in (place.read_bytes, lambda: place.write_bytes(b"1"), place.names, lambda: place.create(b"1")):
            start = time.monotonic()
            with pytest.raises(OSError, match="503") as caught:
                use()
            assert 0.5 < time.monotonic() - start < 10
            hold(caught.value, place)

    def test_no_server(self, place, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        path = store_path(str(place), retry_s=1)
        with pytest.raises(ConnectionError, match="refused") as caught:
            path.read_bytes()
        hold(caught.value, place)

    def test_forbidden(self, place, faults):
        faults.answer(403, times=100)
        for use in (place.read_bytes, lambda: place.write_bytes(b"1"), place.names, lambda: place.create(b"1")):
            with pytest.raises(PermissionError) as caught:
                use()
            hold(caught.value, place)

    def test_a_lost_answer_of_a_conditional_put_never_claims_success_wrongly(self, place, faults):
        """It may say no, or that it does not know, but never yes to two."""
        for k, plan in enumerate((faults.lose, faults.cut)):
            path = place / f"x{k}"
            plan(times=1, method="PUT")
            try:
                made = path.create(b"mine")
            except ConnectionError:
                made = None
            assert path.read_bytes() == b"mine"
            assert made is None
            assert path.create(b"other") is None

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(2))
    def test_right_bytes_or_an_error_whatever_happens(self, place, faults, big, seed):
        """A third of all requests goes wrong: what is read is what was written, or an OSError says why not."""
        versions = [big, big[: BIG // 2], big[::-1][: 3 * PART_BYTES], b"small"]
        rng = np.random.default_rng(seed)
        paths = [place / str(k) for k in range(3)]
        maybe: dict[ObjectPath, list[bytes]] = {path: [] for path in paths}
        failed = 0
        faults.at_random(share=0.33, seed=seed)
        for _ in range(12):
            path, data = paths[rng.integers(3)], versions[rng.integers(4)]
            try:
                path.write_bytes(data)
                maybe[path] = [data]
            except OSError as error:
                hold(error, place)
                maybe[path].append(data)
                failed += 1
            try:
                found = path.read_bytes()
                assert found in maybe[path]
                part = bytes(path.read_ranges([len(found) - 4, 0], [4, len(found) - 8])[1])
                assert part == found[: len(found) - 8]
            except FileNotFoundError:
                assert len(maybe[path]) == 1, "only a first write that failed leaves nothing"
            except OSError as error:
                hold(error, place)
                failed += 1
        assert faults.met.total() > 20
        assert failed < 12, "most of it gets through by trying again"


class TestProcesses:
    def test_threads_share_a_path(self, place, big):
        path = place / "x"
        path.write_bytes(big)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda k: bytes(path.read_ranges([k * 1000, k], [1000, 1])[0]), range(64)))
        assert found == [big[k * 1000 : k * 1000 + 1000] for k in range(64)]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_fork_is_refused_instead_of_hanging(self, bucket, repo, run_python):
        """obstore's threads are lost in it; in a fork of a process that has not used them all is well."""
        code = """
import os, signal, sys
from rsmtdf.objects import store_path
path = store_path(sys.argv[1])
def forked():
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            path.write_bytes(b"child")
            print("written", flush=True)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
forked()
path.read_bytes()
forked()
"""
        first, second = run_python(code, f"{bucket}/x").splitlines()
        assert first == "written"
        assert second.startswith("StoreError")
        assert "start processes by 'forkserver' or 'spawn'" in second

    def test_a_killed_upload_leaves_the_old_object(self, bucket, big, repo):
        import subprocess
        import sys

        path = store_path(f"{bucket}/x")
        path.write_bytes(b"old")
        code = """
import sys
from rsmtdf.objects import store_path
data = bytes(100_000_000)
print("go", flush=True)
store_path(sys.argv[1]).write_bytes(data)
print("done", flush=True)
"""
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(repo)},
        )
        with process:
            assert process.stdout.readline() == "go\n"
            time.sleep(0.15)
            process.kill()
            assert process.stdout.read() == "", "it had finished before it was killed"
        assert process.returncode == -signal.SIGKILL
        assert path.read_bytes() == b"old"


class TestWeb:
    @pytest.fixture
    def web(self, tmp_path, serve) -> ObjectPath:
        (tmp_path / "my data").mkdir()
        (tmp_path / "my data" / "x").write_bytes(b"0123456789")
        return serve(tmp_path) / "my data"

    def test_reading(self, web):
        assert (web / "x").read_bytes() == b"0123456789"
        assert (web / "x").read_tail(3) == (b"789", 10)
        assert [bytes(d) for d in (web / "x").read_ranges([2, 7], [3, 1])] == [b"234", b"7"]
        assert (web / "x").exists()
        assert not (web / "y").exists()
        with pytest.raises(FileNotFoundError):
            (web / "y").read_bytes()

    def test_listing_says_that_it_cannot(self, web):
        assert not web.is_dir()
        for use in (web.names, web.walk):
            with pytest.raises(OSError, match="does not list its files") as caught:
                use()
            assert caught.value.errno == errno.ENOTSUP
            hold(caught.value, web)

    def test_writing_is_refused_before_anything_is_sent(self, web):
        for use in (lambda: web.write_bytes(b""), lambda: web.create(b""), lambda: (web / "x").unlink()):
            with pytest.raises(OSError, match="for reading only") as caught:
                use()
            assert caught.value.errno == errno.EROFS
