"""Reading ahead: the same targets in the same order, errors at their batch, bounded memory, no thread left behind."""

from __future__ import annotations

import gc
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rsmtdf.errors import StoreCorrupt, StoreIncomplete
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.store import FeatureStore

TEACHERS = ["t", "u"]


@pytest.fixture(scope="module")
def original(kit, tmp_path_factory) -> Path:
    """128 views in 32 shards, two teachers of two arrays each: 128 files."""
    path = tmp_path_factory.mktemp("cached") / "feats.zarr"
    store = kit.create(path)
    store.extend([kit.weak(tiles=32, seeds=4)])
    for name in TEACHERS:
        kit.add_teacher(store, name, codec="int8", dim=8 if name == "t" else 16)
    kit.fill(store, TEACHERS)
    return path


@pytest.fixture
def store(original) -> FeatureStore:
    return FeatureStore.open(original)


def draw(n: int, *, sizes=(4, 7, 1), seed: int = 0) -> list[np.ndarray]:
    draws = np.random.default_rng(seed)
    return [draws.integers(0, 128, sizes[k % len(sizes)]) for k in range(n)]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def idle(source: CachedFeatures) -> bool:
    """Whether its threads would take a new piece of work at once."""
    free = threading.Barrier(source._threads + 1, timeout=5)
    for _ in range(source._threads):
        source._pool.submit(free.wait)
    free.wait()
    return True


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 3}, {"threads": 2, "force_zarr": True}, {}])
@pytest.mark.parametrize("ahead", [0, 1, 2, 30])
def test_a_stream_is_what_fetch_gives(store, options, ahead):
    batches = draw(9)
    with CachedFeatures(store, TEACHERS, device="cpu", threads=1) as plain:
        expected = [plain.fetch(rows) for rows in batches]
    with CachedFeatures(store, TEACHERS, device="cpu", **options) as source:
        for _ in range(2):
            found = list(source.stream(batches, ahead=ahead))
            assert len(found) == len(expected)
            assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
        assert list(source.stream([], ahead=ahead)) == []
        assert equal(source.fetch(batches[0]), expected[0])


def test_batches_are_asked_for_only_so_far_ahead_and_buffers_are_reused(store):
    taken: list[int] = []

    def batches() -> Iterator[np.ndarray]:
        for k, rows in enumerate(draw(20, sizes=(5, 3))):
            taken.append(k)
            yield rows

    with CachedFeatures(store, TEACHERS, device="cpu", threads=2) as source:
        for k, _ in enumerate(source.stream(batches(), ahead=3)):
            assert taken[-1] == min(k + 3, 19)
        gc.collect()
        held = {name: len(free) for name, free in source._buffers._free.items()}
        assert len(held) == 2
        assert set(held.values()) == {4}, "ahead + 1 of each teacher's"


def test_the_next_batches_are_read_while_nobody_waits(original, tmp_path):
    path = shutil.copytree(original, tmp_path / "feats.zarr")
    with CachedFeatures(FeatureStore.open(path), TEACHERS, device="cpu", threads=1) as source:
        stream = source.stream([np.array([k]) for k in range(0, 128, 4)], ahead=2)
        next(stream)
        assert idle(source)
        for file in path.glob("teachers/*/codes/c.*"):
            file.write_bytes(bytes(file.stat().st_size))
        next(stream)
        next(stream)
        with pytest.raises(StoreCorrupt):
            next(stream)


def flip(file: Path, at: int) -> bytes:
    good = file.read_bytes()
    file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    return good


@pytest.fixture
def damaged(original, tmp_path) -> FeatureStore:
    """View 40 of teacher u is damaged: shard 10, slot 0."""
    path = shutil.copytree(original, tmp_path / "feats.zarr")
    flip(path / "teachers/u/codes/c.10.0.0", 5)
    return FeatureStore.open(path)


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 3}, {"threads": 3, "force_zarr": True}])
def test_an_error_is_raised_at_its_batch_and_ends_the_stream(damaged, options):
    batches = [np.array([0, 1]), np.array([5]), np.array([41, 40, 3]), np.array([6])]
    with CachedFeatures(damaged, TEACHERS, device="cpu", **options) as source:
        stream = source.stream(batches, ahead=3)
        next(stream)
        next(stream)
        with pytest.raises(StoreCorrupt, match=r"teacher 'u', view 40 .* file .*/teachers/u/codes/c\.10\.0\.0: "):
            next(stream)
        assert idle(source)
        with pytest.raises(StopIteration):
            next(stream)
        assert source.fetch(np.array([6]))["u"].shape == (1, 6, 16)


def test_the_first_error_of_a_batch_is_the_same_for_any_number_of_threads(original, tmp_path):
    path = shutil.copytree(original, tmp_path / "feats.zarr")
    for shard in (3, 9, 20):
        flip(path / f"teachers/t/codes/c.{shard}.0.0", 5)
    store = FeatureStore.open(path)
    rows = np.array([1, 2, 36, 12, 80, 5])
    for threads in (1, 2, 4):
        with CachedFeatures(store, TEACHERS, device="cpu", threads=threads) as source:
            for _ in range(20):
                with pytest.raises(StoreCorrupt, match="view 36 "):
                    source.fetch(rows)


def test_a_view_that_is_not_done_is_an_error_at_its_batch(kit, path):
    store = kit.create(path)
    store.extend([kit.weak(tiles=8, seeds=1)])
    kit.add_teacher(store)
    kit.write(store, 0)
    with CachedFeatures(store, ["t"], device="cpu") as source:
        stream = source.stream([np.array([0]), np.array([1, 5])], ahead=2)
        next(stream)
        with pytest.raises(StoreIncomplete, match="lack view 5 "):
            next(stream)


def test_closing_early_leaves_no_thread_at_work(store):
    with CachedFeatures(store, TEACHERS, device="cpu", threads=2) as source:
        for taken in (0, 1, 4):
            stream = source.stream(draw(50), ahead=10)
            for _ in range(taken):
                next(stream)
            stream.close()
            assert idle(source)
        with pytest.raises(ZeroDivisionError):
            for _ in source.stream(draw(50), ahead=10):
                raise ZeroDivisionError
        gc.collect()
        assert idle(source)
    before = threading.active_count()
    with CachedFeatures(store, TEACHERS, device="cpu", threads=3) as source:
        abandoned = source.stream(draw(50), ahead=10)
        next(abandoned)
    assert threading.active_count() == before


def test_an_error_where_the_rows_come_from_ends_the_stream(store):
    def batches() -> Iterator[np.ndarray]:
        yield np.array([1])
        raise ValueError("no more rows")

    with CachedFeatures(store, TEACHERS, device="cpu", threads=2) as source:
        with pytest.raises(ValueError, match="no more rows"):
            list(source.stream(batches(), ahead=2))
        assert idle(source)


def test_more_shards_than_descriptors(original):
    """All readers of a process share one budget, whatever the number of arrays and teachers."""
    used = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 30
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    store = FeatureStore.open(original)
    everything = np.random.default_rng(1).permutation(128)
    with CachedFeatures(store, TEACHERS, device="cpu", threads=1) as source:
        expected = source.fetch(everything)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
    try:
        with CachedFeatures(store, TEACHERS, device="cpu", threads=6) as source:
            for _ in range(3):
                assert equal(source.fetch(everything), expected)
            found = list(source.stream(np.split(everything, 16), ahead=4))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert torch.equal(torch.cat([f["u"] for f in found]), expected["u"])


def test_reading_whole_shards_ahead_changes_nothing(store):
    rows = np.arange(128)
    with (
        CachedFeatures(store, TEACHERS, device="cpu", whole=rows[:64]) as ahead,
        CachedFeatures(store, TEACHERS, device="cpu") as plain,
    ):
        assert equal(ahead.fetch(rows), plain.fetch(rows))
