"""Removal: disk comes back, rows keep their numbers, and no moment of it loses a view that stays."""

from __future__ import annotations

import itertools
import os
import shutil

import numpy as np
import pytest
import zarr

from rsmtdf.errors import StoreError, StoreIncomplete
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.remove import has_remains, plan_removal, reclaim, remove
from rsmtdf.store.segments import Segment, shard_runs
from rsmtdf.store.status import DONE, HOLE, state_of, word
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.verify import verify


class Killed(Exception):
    """Stands for a kill between two steps."""


@pytest.fixture(params=["fp16", "int8"])
def codec(request):
    return request.param


def two_teachers(kit, path, *, codec="fp16", sealed=True) -> FeatureStore:
    """Weak: 3 tiles x 4 seeds in rows 0..11 (seeds share shards); strong seeds 0, 1 of 5 tiles, seed 0 again of 3."""
    store = kit.create(path)
    store.extend([kit.weak(3, seeds=4), kit.strong(), kit.strong(seed=1), kit.strong(3, generation=1, first_tile=5)])
    kit.add_teacher(store, "t", codec=codec)
    kit.add_teacher(store, "u", codec=codec)
    kit.fill(store, ["t", "u"])
    if sealed:
        store.seal()
    return store


def rm(path, **what):
    return remove(path, stop=StopFlag(), **what)


def check(kit, path, *, teachers=("t", "u"), todo=()) -> FeatureStore:
    """What every store must be: each done view reads back as what was written there, and all but `todo` are done."""
    store = FeatureStore.open(path)
    rows = kit.rows(store)
    for name in teachers:
        teacher = store.teacher(name)
        done = rows[state_of(store.status(name))[rows] == DONE]
        assert set(rows.tolist()) - set(done.tolist()) == set(todo)
        with CachedFeatures(store, [name], device="cpu") as source:
            found = source.fetch(done)[name]
        for k, row in enumerate(done.tolist()):
            assert found[k].equal(teacher.roundtrip(kit.feature(name, row)[None])[0])
    assert np.array_equal(state_of(store.view_status())[rows] == DONE, np.isin(rows, todo, invert=True))
    assert (state_of(store.view_status()) == HOLE).sum() == store.n_rows - len(rows)
    return store


def disk(path) -> int:
    """Bytes of features."""
    return sum(f.stat().st_size for f in path.glob("teachers/*/*/c.*.0"))


def litter(path) -> list[str]:
    """Files and views on disk that nothing in the manifest vouches for."""
    store = FeatureStore.open(path)
    found = [f.name for f in (path / "teachers").iterdir() if f.is_dir() and f.name not in store.teachers]
    for name, teacher in store.teachers.items():
        for array in teacher.arrays:
            fill = np.array(array.fill, array.dtype)
            values = zarr.open_array(teacher.path / array.name, mode="r")[:]
            for row in store.removed_rows().tolist():
                if not np.array_equal(values[row], np.full(array.shape, fill), equal_nan=fill.dtype.kind == "f"):
                    found.append(f"{name} {array.name} {row}")
    return found


def test_a_teacher(kit, path, codec):
    before = disk(two_teachers(kit, path, codec=codec).path)
    report = rm(path, teacher="u", experiment={"n": 2})
    store = check(kit, path, teachers=["t"])
    assert list(store.teachers) == ["t"]
    assert store.experiment == {"n": 2}
    assert not (path / "teachers" / "u").exists()
    assert not (path / "provenance" / "u").exists()
    assert report.views == 25
    assert report.bytes > before - disk(path)  # its status words, metadata and notes go too
    assert report.remaining == "teachers left: t"


def test_the_last_teacher(kit, path):
    kit.full(path)
    assert "none" in rm(path, teacher="t").remaining
    store = FeatureStore.open(path)
    assert not store.teachers
    assert not store.info()["complete"]
    assert (state_of(store.view_status())[kit.rows(store)] == DONE).all()


def test_a_strong_seed_deletes_its_shards(kit, path, codec):
    store = two_teachers(kit, path, codec=codec)
    rows = store.rows(stream="strong", seed=1)
    files = {f.name for f in (path / "teachers/t").glob("*/c.*")}
    report = rm(path, seed=1)
    store = check(kit, path)
    assert (report.views, report.shards_deleted, report.shards_rewritten) == (5, 2, 0)
    assert store.removed_rows().tolist() == rows.tolist()
    assert store.rows(stream="strong", seed=1).size == 0
    gone = {f"c.{k}" for k in np.unique(rows // kit.per)}
    left = {f.name for f in (path / "teachers/t").glob("*/c.*")}
    assert {".".join(f.split(".")[:2]) for f in files - left} == gone
    assert not [f for f in path.rglob("c.*") if f.parent.name == "status" and f.name in gone]
    assert litter(path) == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sealed", [False, True])
def test_a_weak_seed_is_cut_out_of_shards_that_it_shares(kit, path, codec, seed, sealed):
    store = two_teachers(kit, path, codec=codec, sealed=sealed)
    n_rows, before = store.n_rows, disk(path)
    report = rm(path, seed=seed, stream="weak")
    store = check(kit, path)
    assert store.n_rows == n_rows
    assert sorted({s for seg in store.segments if seg.stream == "weak" for s in seg.all_seeds}) == sorted(
        {0, 1, 2, 3} - {seed}
    )
    assert store.removed_rows().tolist() == list(range(3 * seed, 3 * seed + 3))
    assert report.views == 3
    assert report.shards_rewritten >= 1
    assert report.bytes == before - disk(path)
    assert litter(path) == []
    with pytest.raises(StoreIncomplete), FeatureReader(store, "t") as reader:
        reader.get_many([3 * seed])


def test_seeds_one_after_another_until_none_is_left(kit, path, codec):
    store = two_teachers(kit, path, codec=codec)
    for seed in (1, 3, 0, 2):
        rm(path, seed=seed, stream="weak")
        store = check(kit, path)
        assert verify(path, stop=StopFlag()).is_sound
        # Sealed again, each part that is left.
        for status in (store.view_status_array, store.teacher("t").status):
            assert status.sealed_ranges() == shard_runs(store.segments, kit.per)
    assert store.rows(stream="weak").size == 0
    assert not any((path / "teachers/t").glob("*/c.[012].*"))


def test_one_generation_of_a_seed(kit, path):
    two_teachers(kit, path)
    assert rm(path, seed=0, generation=1).views == 3
    store = check(kit, path)
    assert store.rows(stream="strong", seed=0).tolist() == list(range(12, 17))


def test_a_seed_in_all_its_generations(kit, path):
    two_teachers(kit, path)
    assert rm(path, seed=0).views == 8
    assert check(kit, path).rows(stream="strong", seed=0).size == 0


def test_the_seed_can_be_cached_again(kit, path):
    store = two_teachers(kit, path)
    n_rows = store.n_rows
    rm(path, seed=1)
    rm(path, seed=2, stream="weak")
    store = FeatureStore.open(path, writable=True)
    new = store.extend([kit.strong(seed=1), kit.weak(3, seeds=1, start=2)])
    assert [s.row_start for s in new] == [n_rows, n_rows + 8]
    kit.fill(store, ["t", "u"])
    store.seal()
    check(kit, path)


def test_a_shard_in_which_a_seed_was_removed_can_be_filled(kit, path, withdraw):
    two_teachers(kit, path)
    rm(path, seed=1, stream="weak")
    store = FeatureStore.open(path, writable=True)
    withdraw(store, 0, "t")
    withdraw(store, 1, "t")
    assert store.pending_rows(["t"]).tolist() == [0, 1, 2, 6, 7]
    kit.fill(store, ["t"])
    check(kit, path)
    assert litter(path) == []


def test_an_unfinished_store(kit, path):
    store = kit.create(path)
    store.extend([kit.weak(3, seeds=4), kit.strong()])
    kit.add_teacher(store)
    kit.write(store, 1)
    rm(path, seed=1, stream="weak")
    check(kit, path, teachers=["t"], todo=[0, 1, 2, *range(8, 12), *range(12, 17)])
    assert litter(path) == []


def test_damage_in_a_shared_shard_stays_visible(kit, path):
    two_teachers(kit, path)
    file = path / "teachers/t/features/c.1.0.0"
    data = bytearray(file.read_bytes())
    data[2 * (96 + 4) + 5] ^= 1  # row 6, which stays
    file.write_bytes(data)
    assert rm(path, seed=1, stream="weak").left == []
    assert [d.row for d in verify(path, stop=StopFlag()).damage] == [6]


def test_a_shard_that_cannot_be_cut_down_is_named(kit, path):
    two_teachers(kit, path)
    file = path / "teachers/t/features/c.1.0.0"
    file.write_bytes(file.read_bytes()[:-1])
    (left,) = rm(path, seed=1, stream="weak").left
    assert str(file) in left
    assert "rsmtdf cache repair" in left
    store = FeatureStore.open(path)
    assert store.rows(stream="weak", seed=1).size == 0


def test_what_is_not_there(kit, path):
    kit.full(path)
    with pytest.raises(StoreIncomplete, match=r"no strong views of seed 3; it has seeds: 0, 0 \(generation 1\)"):
        rm(path, seed=3)
    with pytest.raises(StoreIncomplete, match="generation 2"):
        rm(path, seed=0, generation=2)
    with pytest.raises(StoreIncomplete, match="no teacher 'x'"):
        rm(path, teacher="x")
    with pytest.raises(StoreError, match="either a teacher or a seed"):
        rm(path)
    check(kit, path, teachers=["t"])


def test_not_while_somebody_writes(kit, path):
    with (
        kit.full(path).claim([0]),
        pytest.raises(StoreError, match=r"cannot remove from feature store .* while process"),
    ):
        rm(path, seed=0)


def test_a_plan_changes_nothing(kit, path):
    store = two_teachers(kit, path)
    files = {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
    plan = plan_removal(store, seed=1)
    assert (plan.what, plan.views, plan.remaining) == ("strong seed 1", 5, "strong seeds left: 1")
    assert plan.bytes == 2 * 5 * 96
    assert plan_removal(store, teacher="u").views == 25
    assert {f: f.read_bytes() for f in files} == files


def test_a_signal_ends_the_clearing_and_the_next_one_goes_on(kit, path):
    two_teachers(kit, path)
    stop = StopFlag()

    def progress(done, total):
        stop.signum = 15

    with pytest.raises(Interrupted, match="removed is gone"):
        remove(path, seed=1, stop=stop, progress=progress)
    check(kit, path)
    report = reclaim(FeatureStore.open(path, writable=True), stop=StopFlag())
    assert report is not None
    assert report.shards_deleted == 1
    assert litter(path) == []


@pytest.mark.parametrize(
    "what", [{"teacher": "u"}, {"seed": 1}, {"seed": 1, "stream": "weak"}, {"seed": 2, "stream": "weak"}], ids=str
)
def test_a_kill_at_any_step(kit, tmp_path, codec, what):
    """The store is right after each, and the next removal, or stage 1, clears the rest."""
    base = tmp_path / "base.zarr"
    two_teachers(kit, base, codec=codec)
    teachers = ["t"] if "teacher" in what else ["t", "u"]
    for last in itertools.count():
        path = tmp_path / f"{last}.zarr"
        shutil.copytree(base, path)
        steps = itertools.count()

        def on_step(name, steps=steps, last=last):
            if next(steps) == last:
                raise Killed(name)

        try:
            remove(path, stop=StopFlag(), on_step=on_step, **what)
        except Killed:
            check(kit, path, teachers=teachers)
            store = FeatureStore.open(path, writable=True)
            assert reclaim(store, stop=StopFlag()) is not None
            check(kit, path, teachers=teachers)
            assert litter(path) == []
        else:
            break
    assert last >= 2


def test_a_fault_before_the_manifest_changes_nothing(kit, path, monkeypatch):
    two_teachers(kit, path)

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patched, pytest.raises(StoreError, match="nothing was removed"):
        patched.setattr(os, "replace", refuse)
        rm(path, seed=1)
    assert check(kit, path).rows(stream="strong", seed=1).size == 5


@pytest.mark.parametrize("what", [{"teacher": "u"}, {"seed": 1}, {"seed": 1, "stream": "weak"}], ids=str)
def test_the_same_removal_again_clears_what_a_kill_left(kit, path, what):
    two_teachers(kit, path)

    def on_step(name):
        raise Killed(name)

    with pytest.raises(Killed, match="manifest"):
        remove(path, stop=StopFlag(), on_step=on_step, **what)
    assert litter(path)
    assert rm(path, **what).bytes > 0
    assert litter(path) == []
    check(kit, path, teachers=["t"] if "teacher" in what else ["t", "u"])
    with pytest.raises(StoreIncomplete):
        rm(path, **what)


def test_only_what_was_asked_for_again_is_cleared(kit, path):
    """Two removals were cut short: naming one of them, or a thing that never was, leaves the other's remains alone."""
    two_teachers(kit, path)

    def on_step(name):
        raise Killed(name)

    for what in ({"seed": 1}, {"seed": 1, "stream": "weak"}, {"teacher": "u"}):
        with pytest.raises(Killed, match="manifest"):
            remove(path, stop=StopFlag(), on_step=on_step, **what)
    (path / "teachers/v").mkdir()
    (path / "teachers/v/x").write_bytes(b"12345")
    store, before = FeatureStore.open(path), disk(path)
    for what in ({"teacher": "x"}, {"seed": 3}, {"seed": 1, "generation": 1}):
        assert not has_remains(store, **what)
        with pytest.raises(StoreIncomplete):
            rm(path, **what)
        assert disk(path) == before
    assert has_remains(store, seed=1)
    assert rm(path, seed=1).shards_deleted == 2
    assert {f.name for f in (path / "teachers").iterdir()} == {"zarr.json", "t", "u", "v"}
    weak = path / "teachers/t/features/c.0.0.0"
    size = weak.stat().st_size
    assert rm(path, teacher="v").bytes == 5
    assert rm(path, teacher="u").bytes > 0
    assert {f.name for f in (path / "teachers").iterdir()} == {"zarr.json", "t"}
    assert weak.stat().st_size == size
    assert rm(path, seed=1, stream="weak").bytes > 0
    assert litter(path) == []
    check(kit, path, teachers=["t"])


def test_the_nearest_teachers_are_named(kit, path):
    store = kit.full(path)
    kit.add_teacher(store, "dinov2-base")
    with pytest.raises(StoreIncomplete, match=r"no teacher 'dinov2-bsae'; did you mean dinov2-base\?"):
        rm(path, teacher="dinov2-bsae")
    with pytest.raises(StoreIncomplete, match=r"no teacher 'x'; it has: t, dinov2-base"):
        rm(path, teacher="x")


@pytest.mark.parametrize("calls", range(1, 9))
def test_a_disk_that_fails_after_any_number_of_writes(kit, path, monkeypatch, calls):
    """Replacing files fails from the nth time on: what stays is right, and said."""
    two_teachers(kit, path)
    replace, count = os.replace, itertools.count()

    def failing(*args, **kwargs):
        if next(count) >= calls:
            raise OSError(28, "No space left on device")
        return replace(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(StoreError, match="is removed, but its disk is not all free"):
        patched.setattr(os, "replace", failing)
        rm(path, seed=1, stream="weak")
    check(kit, path)
    reclaim(FeatureStore.open(path, writable=True), stop=StopFlag())
    check(kit, path)
    assert litter(path) == []


def test_a_teacher_added_again_never_meets_the_old_ones_shards(kit, path):
    """Killed right after the manifest: the folder is still there, with status words that say done."""
    two_teachers(kit, path)

    def on_step(name):
        raise Killed(name)

    with pytest.raises(Killed, match="manifest"):
        remove(path, teacher="u", stop=StopFlag(), on_step=on_step)
    assert (path / "teachers/u/status/c.0").exists()
    store = FeatureStore.open(path, writable=True)
    kit.add_teacher(store, "u", codec="int8")
    assert len(store.pending_rows(["u"])) == store.n_views
    kit.fill(store, ["u"])
    check(kit, path)


def test_reclaim_leaves_a_store_alone_that_somebody_writes_to(kit, path):
    store = two_teachers(kit, path)
    with store.claim([0]):
        assert reclaim(FeatureStore.open(path, writable=True), stop=StopFlag()) is None


def test_reclaim_finds_nothing_in_a_sound_store(kit, path):
    store = two_teachers(kit, path)
    rm(path, seed=1, stream="weak")
    files = {f: f.stat().st_mtime_ns for f in path.rglob("*") if f.is_file() and f.name != "locks"}
    report = reclaim(store, stop=StopFlag())
    assert report is not None
    assert (report.bytes, report.left) == (0, [])
    assert {f: f.stat().st_mtime_ns for f in files} == files


def test_an_empty_store(kit, path):
    store = kit.create(path)
    assert store.removed_rows().size == 0
    assert reclaim(store, stop=StopFlag()) is not None


def test_the_ends_of_a_segment_that_lost_a_seed():
    fields = {"stream": "weak", "generation": 0, "tiles": 3, "tiles_sha256": ""}
    s = Segment(seed_start=5, seeds=4, row_start=8, **fields)
    assert s.without(5) == (Segment(seed_start=6, seeds=3, row_start=11, **fields),)
    assert s.without(8) == (Segment(seed_start=5, seeds=3, row_start=8, **fields),)
    assert s.without(6) == (
        Segment(seed_start=5, seeds=1, row_start=8, **fields),
        Segment(seed_start=7, seeds=2, row_start=14, **fields),
    )
    assert s.without(6)[0].without(5) == ()
    assert shard_runs(s.without(6), 8) == [(8, 24)]
    assert shard_runs(s.without(6), 2) == [(8, 12), (14, 20)]
    assert word(HOLE) == 3 << 32
