"""Stage 1's pipeline: its parts go on at the same time, in bounded memory, and change no bit; what ends it is told."""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from rsmtdf.errors import DatasetError, StoreCorrupt, StoreError, TeacherError
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.specs import DatasetSpec, FeatureSpec, Tile, ViewRecipe
from rsmtdf.stages import cache
from rsmtdf.stages.cache.supply import Finished, made_views
from rsmtdf.stages.cache.teach import Harvest
from rsmtdf.stages.cache.trace import PARTS, Trace
from rsmtdf.stages.cache.transfer import Lane, Sent
from rsmtdf.stages.cache.work import plan_work, read_states
from rsmtdf.stages.cache.write import ShardWriter
from rsmtdf.store.codecs import CODECS
from rsmtdf.store.segments import NewSegment
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.verify import verify
from rsmtdf.views.params import PARAM_DTYPE, draw_table

TILES = tuple(f"scene/{k:02d}_0" for k in range(8))
SEEDS = 6
VIEWS = len(TILES) * SEEDS
PER_SHARD = 4
SPEC = DatasetSpec(name="toy", classes=("a", "b"), palette=((0, 0, 0), (255, 255, 255)), tile_px=32)
RECIPE = ViewRecipe(crop_px=28)
LIMIT_S = 60.0
"""After which something that must happen is said not to; nothing is expected to take that long."""


class Images:
    """Reads tiles whose pixels are a function of their id, and counts how often."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self._changed = threading.Condition()
        self.reads = 0

    def read_image(self, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        with self._changed:
            self.reads += 1
            self._changed.notify_all()
        if tile.id in self.gone:
            raise DatasetError(f"tile {tile.id}: the file is gone")
        pixels = np.random.default_rng(TILES.index(tile.id)).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        return pixels, np.ones((32, 32), np.bool_)

    def read_label(self, tile: Tile) -> np.ndarray:
        raise DatasetError(f"tile {tile.id} has no label")

    def wait_for(self, reads: int) -> bool:
        """Whether so many images have been read before the limit."""
        with self._changed:
            return self._changed.wait_for(lambda: self.reads >= reads, LIMIT_S)


class Means:
    """A teacher: the mean colour of each quarter, spread over channels. `before` sees each batch first."""

    def __init__(self, name: str = "t", *, before: Callable[[torch.Tensor], object] = lambda pixels: None) -> None:
        self.spec = FeatureSpec(
            name=name, library="fake", model="means", weights_sha256="00", input_px=(28, 28), grid=(2, 2), dim=16
        )
        self.sizes: list[int] = []
        self._before = before
        self._weights = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self._before(pixels)
        self.sizes.append(len(pixels))
        x = pixels.float().reshape(-1, 2, 14, 2, 14, 3).mean(dim=(2, 4)).reshape(-1, 4, 3)
        return (x / 255 - 0.5) @ self._weights


class World:
    """An empty store of 48 views in 12 shards of 4, and the images that they are made from."""

    def __init__(self, folder: Path, *, teachers: tuple[str, ...] = ("t", "u")) -> None:
        self.images = Images()
        self.store = FeatureStore.create(
            folder / "feats.zarr",
            recipe=RECIPE,
            dataset=SPEC,
            data_root=str(folder),
            experiment={},
            shard_views=PER_SHARD,
        )
        table = np.concatenate(
            [draw_table(RECIPE, tile_ids=TILES, tile_px=32, stream="weak", seed=seed) for seed in range(SEEDS)]
        )
        new = NewSegment(
            stream="weak",
            seed_start=0,
            seeds=SEEDS,
            generation=0,
            tile_ids=TILES,
            columns={name: table[name] for name in PARAM_DTYPE.names or ()},
            partner=np.arange(VIEWS),
        )
        self.store.extend([new])
        tiles = {t: Tile(id=t, image=f"{t}.png", mask=None, x0=0, y0=0, width=32, height=32) for t in TILES}
        self.maker = cache.view_maker(self.store, reader=self.images, tiles=tiles)
        cache.add_teachers(
            self.store,
            teachers={name: Means(name) for name in teachers},
            maker=self.maker,
            codec="int8",
            batch=8,
            stop=StopFlag(),
        )
        self.images.reads = 0

    def fill(self, *teachers: Means, shards: range | None = None, **given: object) -> cache.CacheReport:
        arguments = {"batch": 4, "workers": 2, "stop": StopFlag(), **given}
        return cache.fill_shards(
            self.store,
            teachers={t.spec.name: t for t in teachers or (Means("t"), Means("u"))},
            maker=self.maker,
            shards=range(self.store.n_shards) if shards is None else shards,
            **arguments,
        )

    def bytes_of(self, teacher: str = "t") -> dict[str, bytes]:
        folder = self.store.path / "teachers" / teacher
        return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("c.*"))}

    def is_complete(self) -> bool:
        return verify(self.store.path, stop=StopFlag()).is_complete


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(scope="module")
def plainly(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Filled shard by shard, each by a call of its own: nothing is ahead of anything."""
    world = World(tmp_path_factory.mktemp("plainly"))
    for shard in range(world.store.n_shards):
        world.fill(shards=range(shard, shard + 1), workers=1)
    return world


# What goes on at the same time


def test_views_of_later_shards_are_made_while_the_teacher_is_at_work(world: World) -> None:
    """Its first batch is all of the first shard; it does not answer before views of the third are being made."""
    seen: list[bool] = []
    first = Means("t", before=lambda pixels: seen or seen.append(world.images.wait_for(2 * PER_SHARD + 1)))
    world.fill(first)
    assert seen == [True]


def test_the_teacher_goes_on_while_shards_are_written(world: World) -> None:
    """Whoever writes the first shard does not end before the teacher has seen views of the third."""
    third, told = threading.Event(), []

    def progress(views: int, size: int) -> None:
        told.append(third.wait(LIMIT_S) if not told else True)

    teacher = Means("t", before=lambda pixels: len(teacher.sizes) == 2 and third.set())
    world.fill(teacher, progress=progress)
    assert told == [True] * world.store.n_shards


class Turn:
    """A lock that knows how many held it at most."""

    def __init__(self) -> None:
        self._lock, self._now, self.most = threading.Lock(), 0, 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._now += 1
        self.most = max(self.most, self._now)

    def __exit__(self, *exception: object) -> None:
        self._now -= 1
        self._lock.release()


def test_a_call_makes_its_views_while_another_has_its_turn(world: World) -> None:
    """Two calls share a device, and never compute at the same time. The first holds it until views of both are made."""
    made: list[bool] = []
    turn, half = Turn(), world.store.n_shards // 2
    # One call alone makes at most 2 * (batch + workers) views ahead, and three batches more.
    alone = 2 * (4 + 1) + 3 * 4
    holding = Means("t", before=lambda pixels: made or made.append(world.images.wait_for(alone + 1)))
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(world.fill, teacher, shards=shards, turn=turn, workers=1)
            for teacher, shards in ((holding, range(half)), (holding, range(half, 2 * half)))
        ]
        reports = [call.result() for call in calls]
    assert made == [True]
    assert turn.most == 1
    assert sorted(row.shard for r in reports for row in r.ledger) == list(range(2 * half))


def test_what_is_made_ahead_is_bounded(world: World) -> None:
    states = read_states(world.store, ["t"], range(world.store.n_shards))
    pool = ThreadPoolExecutor(2)
    views = made_views(plan_work(states, ()), world.maker, pool, ahead=10, trace=Trace({}))
    taken = list(itertools.islice(views, 3))
    pool.shutdown(wait=True)  # everything that was begun has come to its end
    assert [row for _, row, _ in taken] == [0, 1, 2]
    assert world.images.reads == 10 + 2, "ten views ahead of the third, which came as the two before were taken"


# What it must not change


@pytest.mark.parametrize(("workers", "batch"), [(1, 4), (3, 4), (2, 64), (2, 3)])
def test_the_bits_do_not_depend_on_what_is_ahead(world: World, plainly: World, workers: int, batch: int) -> None:
    report = world.fill(workers=workers, batch=batch)
    for name in ("t", "u"):
        assert world.bytes_of(name) == plainly.bytes_of(name)
    assert np.array_equal(world.store.view_status(), plainly.store.view_status())
    assert report.features == {"t": VIEWS, "u": VIEWS}


def test_a_shard_is_shown_in_the_same_batches_whatever_is_missing(world: World) -> None:
    world.images.gone = {TILES[1]}
    teacher = Means("t")
    report = world.fill(teacher, batch=2)
    # Each seed is two shards, and the first of the two lacks a view.
    assert teacher.sizes == [2, 1, 2, 2] * SEEDS
    assert list(report.unreadable) == [TILES[1]]
    assert report.views == sum(row.views for row in report.ledger) == VIEWS - SEEDS


def test_only_the_status_of_its_own_shards_is_read(world: World) -> None:
    world.fill(Means("t"))
    for array in (world.store.view_status_array, world.store.teacher("t").status):
        array.chunk_file(0).write_bytes(b"damaged")
    report = world.fill(Means("u"), shards=range(5, 7))
    assert [row.shard for row in sorted(report.ledger, key=lambda r: r.shard)] == [5, 6]
    with pytest.raises(StoreCorrupt):
        world.fill(Means("u"), shards=range(2))


# What it tells


def test_every_part_is_measured_and_every_commit_is_in_the_ledger(world: World) -> None:
    told: list[tuple[int, int]] = []
    report = world.fill(progress=lambda views, size: told.append((views, size)))
    assert set(report.busy) == set(PARTS)
    assert all(report.busy[part] > 0 for part in ("decode", "view", "teacher", "encode", "copy", "write"))
    assert 0 < report.device_share <= 1
    assert sorted(row.shard for row in report.ledger) == list(range(world.store.n_shards))
    assert sum(row.bytes_written for row in report.ledger) == report.bytes_written == told[-1][1]
    assert sum(views for views, _ in told) == sum(row.views for row in report.ledger) == report.views == VIEWS
    assert report.batch == 4


def report_of(seconds: float, **busy: float) -> cache.CacheReport:
    report = cache.CacheReport(seconds=seconds)
    report.busy |= busy
    return report


def test_what_limited_a_run_is_what_the_device_waited_for() -> None:
    assert report_of(10, teacher=9.2, encode=0.3, wait=0.4).limited_by == "teachers"
    assert report_of(10, teacher=5, wait=4.5, held=0.5, view=2).limited_by == "views"
    assert report_of(10, teacher=5, wait=1.5, held=3.5, view=30).limited_by == "writing"
    two = report_of(10, teacher=19, wait=0.5)
    two.devices = 2
    assert (two.limited_by, two.device_share) == ("teachers", 0.95)


# Memory


def only_so_many(views: int, error: Exception) -> Callable[[torch.Tensor], None]:
    def before(pixels: torch.Tensor) -> None:
        if len(pixels) > views:
            raise error

    return before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_when_memory_runs_out_the_batch_is_halved(world: World, plainly: World, error: Exception) -> None:
    teacher = Means("t", before=only_so_many(1, error))
    report = world.fill(teacher)
    assert set(teacher.sizes) == {1}
    assert report.batch == 1
    assert world.bytes_of() == plainly.bytes_of()


def test_memory_may_run_out_while_encoding(tmp_path: Path, plainly: World, monkeypatch: pytest.MonkeyPatch) -> None:
    int8, sizes = CODECS["int8"], []

    class Greedy:
        arrays, decode = int8.arrays, int8.decode

        def encode(self, features: torch.Tensor, **given: object) -> object:
            only_so_many(2, torch.OutOfMemoryError("CUDA out of memory"))(features)
            sizes.append(len(features))
            return int8.encode(features, **given)

    monkeypatch.setitem(CODECS, "int8", Greedy())
    world = World(tmp_path)
    assert world.fill(Means("t")).batch == 2
    assert set(sizes) == {2}
    assert world.bytes_of() == plainly.bytes_of()


def test_one_view_too_much_for_the_memory_says_what_to_do(world: World) -> None:
    teacher = Means("t", before=only_so_many(0, torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(TeacherError, match=r"not even one view at a time fits into the memory of cpu .*--teacher NAME"):
        world.fill(teacher)


def test_another_runtime_error_is_none_of_memory(world: World) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        world.fill(Means("t", before=only_so_many(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))))


def test_pixels_that_find_no_room_on_the_device_stay_on_the_host(
    world: World, plainly: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are sent by a thread that cannot halve the batch; their teacher takes them in the parts that fit."""

    def full(*given: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Lane, "_begun", full)
    monkeypatch.setattr(Lane, "_pinned", full)
    teacher = Means("t", before=only_so_many(2, torch.OutOfMemoryError("CUDA out of memory")))
    assert world.fill(teacher).batch == 2
    assert world.bytes_of() == plainly.bytes_of()


def test_only_the_part_that_is_asked_for_goes_to_the_device() -> None:
    sent = Sent(torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1, 1), None)
    part = Lane(torch.device("meta")).arrived(sent, slice(2, 5))
    assert (part.device.type, len(part)) == ("meta", 3)


def test_each_shard_says_the_batches_that_it_was_computed_in(world: World) -> None:
    """The first shard is still to be written when memory runs out, in the second of the third shard's batches."""
    ran_out, calls = threading.Event(), itertools.count()

    def before(pixels: torch.Tensor) -> None:
        if next(calls) == 5:
            ran_out.set()
            raise torch.OutOfMemoryError("CUDA out of memory")

    write = ShardWriter.write

    def late(self: ShardWriter, done: Finished, harvest: Harvest) -> None:
        assert ran_out.wait(LIMIT_S)
        write(self, done, harvest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "write", late)
        world.fill(Means("t", before=before), batch=2)
    notes = world.store.path / "provenance" / "t"
    sizes = [json.loads((notes / f"{k}.json").read_text())["batch"] for k in range(world.store.n_shards)]
    assert sizes == [2, 2, [2, 1]] + [1] * 9


# A signal


def test_a_signal_is_heard_where_no_view_can_be_made(world: World) -> None:
    """A share that holds the images is gone, so no teacher sees anything: each look at it may take minutes."""
    world.images.gone, stop = set(TILES), StopFlag()
    read = world.images.read_image

    def offline(tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        stop.signum = 15
        return read(tile)

    world.images.read_image = offline  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="run the same command again"):
        world.fill(Means("t"), stop=stop)
    assert world.images.reads <= 2 + 2, "what two threads had in hand"


def test_a_signal_is_heard_between_shards_without_views(world: World) -> None:
    world.images.gone, stop = set(TILES), StopFlag()

    def progress(views: int, size: int) -> None:
        # All views are looked at before the first shard is done: whoever makes them has no more to hear.
        assert world.images.wait_for(VIEWS)
        stop.signum = 15

    with pytest.raises(Interrupted):
        world.fill(Means("t"), stop=stop, progress=progress, batch=VIEWS)
    assert world.images.reads == VIEWS
    assert len(world.store.missing_shards(["t"])) > 0


# Views that were skipped


def test_a_mended_view_costs_the_status_of_its_own_shard(world: World, plainly: World) -> None:
    world.images.gone = {TILES[1]}
    world.fill()
    world.images.gone = set()
    for name in ("t", "u"):
        world.store.teacher(name).status.chunk_file(5).write_bytes(b"damaged")
    report = world.fill(shards=range(3))
    assert report.features == {"t": 2, "u": 2}
    for name in ("t", "u"):
        mended = {k: v for k, v in world.bytes_of(name).items() if int(k.split("/c.")[1].split(".")[0]) < 3}
        assert mended.items() <= plainly.bytes_of(name).items()


def test_a_whole_store_is_looked_through_for_skipped_views(world: World) -> None:
    world.images.gone = {TILES[1]}
    arguments = {"batch": 4, "workers": 2, "stop": StopFlag(), "teachers": {"t": Means("t")}, "maker": world.maker}
    cache.fill_store(world.store, **arguments)
    world.images.gone = set()
    assert cache.fill_store(world.store, **arguments).features == {"t": SEEDS}
    assert world.store.pending_rows(["t"], retry_skipped=True).size == 0


def test_what_is_known_of_the_shards_is_small(world: World) -> None:
    """A call may be about a million views: a few bytes for each, and no work before it is asked for."""
    states = read_states(world.store, ["t", "u"], range(world.store.n_shards))
    per_view = sum(a.nbytes for of in states.values() for a in (of.rows, of.seen, of.crcs, *of.states.values())) / VIEWS
    assert per_view == 8 + 1 + 4 + 2
    work = plan_work(states, ())
    assert next(work).shard == 0
    del states[7]
    with pytest.raises(RuntimeError, match="changed size"):
        next(work)


# Features that are not finite


class Broken(Means):
    """Its answer to one view of the store is not finite; it may notice that itself, or not."""

    def __init__(self, world: World, row: int, *, notices: bool) -> None:
        super().__init__("t")
        self._victim, self._notices = torch.from_numpy(world.maker.mixed([row])[0].pixels), notices

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        bad = torch.tensor([torch.equal(p, self._victim) for p in pixels])
        if self._notices and bad.any():
            raise TeacherError(f"teacher 't' gave NaN at batch position {int(bad.nonzero()[0])}")
        return super().__call__(pixels).masked_fill(bad[:, None, None], float("nan"))


@pytest.mark.parametrize("notices", [True, False])
def test_features_that_are_not_finite_name_the_view_and_commit_nothing_of_its_shard(
    world: World, plainly: World, notices: bool
) -> None:
    row = 4 * PER_SHARD + 2
    with pytest.raises((TeacherError, StoreError)) as caught:
        world.fill(Broken(world, row, notices=notices))
    message = str(caught.value)
    assert isinstance(caught.value, TeacherError) == notices
    assert f"view {row} (tile {TILES[row % len(TILES)]}, weak, seed {row // len(TILES)})" in message
    assert "teacher 't'" in message
    assert "--precision" in message
    done = set(range(world.store.n_shards)) - set(world.store.missing_shards(["t"]))
    assert done == set(range(4)), "all before it is kept"
    world.fill()
    assert world.bytes_of() == plainly.bytes_of()


# A disk that fills up


def test_a_full_disk_says_how_much_is_missing_and_the_same_call_goes_on(
    world: World, plainly: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, shards = os.replace, 5

    def full(source: str, target: str) -> None:
        """No room from the data of the sixth shard on."""
        part = Path(target)
        if part.parent.name == "codes" and int(part.name.split(".")[1]) >= shards:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StoreError) as caught:
            world.fill(Means("t"))
    left = VIEWS - shards * PER_SHARD
    message = str(caught.value)
    assert "No space left on device" in message
    assert f"This run committed {shards * PER_SHARD} views" in message
    assert f"{left} views are missing" in message
    assert "run the same command again" in message
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("views", "batches", "writer"))]
    assert not list(world.store.path.rglob("*.partial"))
    report = world.fill()
    assert report.features == {"t": left, "u": VIEWS}
    assert world.bytes_of() == plainly.bytes_of()
    assert world.is_complete()
