"""Recoding: the same rows under another codec; what the source lacks or has damaged stays to be done."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from rsmtdf.errors import StoreError, StoreIncomplete, StoreMismatch, StoreNotFound
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.carry import RECODED_FROM
from rsmtdf.store.codecs import CODECS
from rsmtdf.store.recode import recode
from rsmtdf.store.remove import remove
from rsmtdf.store.status import DONE, SKIPPED, TODO, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.verify import verify


@pytest.fixture
def other(tmp_path):
    return tmp_path / "other.zarr"


def run(source, path, codec="int8", **changes):
    return recode(source, path, **({"codec": codec, "stop": StopFlag()} | changes))


def files(path) -> dict:
    return {f.relative_to(path): f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != "locks"}


def check(kit, source, path, *, teachers=("t",), todo=()) -> FeatureStore:
    """The rows of `source`, each done view as the codec gives back what the source gives."""
    src, dst = FeatureStore.open(source), FeatureStore.open(path)
    assert (dst.n_rows, dst.segments, dst.identity) == (src.n_rows, src.segments, src.identity)
    assert list(dst.tile_ids) == list(src.tile_ids)
    for name in src.column_names:
        np.testing.assert_array_equal(dst.column(name), src.column(name))
    assert np.array_equal(dst.view_status(), src.view_status())
    rows = kit.rows(dst)
    for name in teachers:
        state = state_of(dst.status(name))
        assert set(rows[state[rows] == TODO].tolist()) == set(todo)
        done = rows[state[rows] == DONE]
        with CachedFeatures(src, [name], device="cpu") as a, CachedFeatures(dst, [name], device="cpu") as b:
            before, after = a.fetch(done)[name], b.fetch(done)[name]
        for k in range(len(done)):
            assert after[k].equal(dst.teacher(name).roundtrip(before[k : k + 1])[0])
        old, new = src.teacher(name), dst.teacher(name)
        assert np.array_equal(old.mean, new.mean)
        assert np.array_equal(old.std, new.std)
        assert new.statistics == {**old.statistics, RECODED_FROM: [old.codec]}
        dst.expect_teacher(old.spec, new.codec, rule=old.statistics["rule"])  # stage 1 can go on with it
    assert verify(path, stop=StopFlag()).is_sound
    return dst


@pytest.mark.parametrize("before", sorted(CODECS))
@pytest.mark.parametrize("after", sorted(CODECS))
def test_every_codec_to_every_other(kit, path, other, before, after):
    kit.full(path, codec=before)
    source = files(path)
    report = run(path, other, after, threads=3)
    assert files(path) == source
    assert report.views == {"t": 18}
    store = check(kit, path, other)
    assert store.teacher("t").status.sealed_ranges()
    assert report.rounded_before == ({} if before in ("fp16", after) else {"t": before})
    assert report.bytes_before == 18 * FeatureStore.open(path).teacher("t").bytes_per_view
    assert report.bytes_after == 18 * store.teacher("t").bytes_per_view
    if before == after:
        assert files(path / "teachers/t/status").items() <= files(other / "teachers/t/status").items()
        assert report.error == {}
    else:
        assert 0 <= report.error["t"] < (0.3 if after == "int4" else 0.02)


def test_the_error_is_that_of_the_standardised_values(kit, path, other):
    store = kit.full(path)
    report = run(path, other)
    teacher = FeatureStore.open(other).teacher("t")
    rows = [int(store.rows_of_shard(k)[0]) for k in range(store.n_shards)]
    values = torch.stack([kit.feature("t", r) for r in rows])
    spread = torch.from_numpy(teacher.std)
    z = (values - torch.from_numpy(teacher.mean)) / spread
    e = (teacher.roundtrip(values) - values) / spread
    assert report.error["t"] == pytest.approx(float(e.norm() / z.norm()), rel=1e-5)


def test_some_of_the_teachers_and_another_record(kit, path, other):
    store = kit.full(path)
    kit.add_teacher(store, "u")
    kit.fill(store, ["u"])
    run(path, other, teachers=["u"], experiment={"n": 2})
    dst = check(kit, path, other, teachers=["u"])
    assert list(dst.teachers) == ["u"]
    assert dst.experiment == {"n": 2}
    assert dst.versions == store.versions


def test_what_is_missing_or_skipped_stays_so(kit, path, other):
    store = kit.create(path)
    store.extend([kit.weak(), kit.strong()])
    kit.add_teacher(store)
    kit.write(store, 0, skipped=[2])
    kit.write(store, 4)
    report = run(path, other)
    todo = [r for r in kit.rows(store).tolist() if r // 4 not in (0, 4)]
    dst = check(kit, path, other, todo=todo)
    assert state_of(dst.status("t"))[2] == SKIPPED
    assert (report.views, report.skipped, report.lacking) == ({"t": 4}, {"t": 1}, {"t": len(todo)})
    kit.fill(FeatureStore.open(other, writable=True))
    assert FeatureStore.open(other).info()["complete"]


def test_the_source_goes_on_and_so_does_the_recoding(kit, path, other):
    store = kit.create(path)
    store.extend([kit.weak(), kit.strong()])
    kit.add_teacher(store)
    kit.write(store, 0)
    run(path, other)
    before = files(other / "teachers/t/codes")
    kit.fill(store)
    assert run(path, other).views == {"t": 11}
    check(kit, path, other)
    assert before.items() <= files(other / "teachers/t/codes").items()
    assert run(path, other).views == {}


def part(kit, store, done) -> None:
    """Commits shard 0 with just these rows."""
    rows = store.rows_of_shard(0).tolist()
    features = {"t": torch.stack([kit.feature("t", r) for r in done])}
    crcs = {r: kit.crc(r) for r in done}
    kit.write(store, 0, view_crcs=crcs, features=features, left=set(rows) - set(done))


def test_what_the_source_has_lost_meanwhile_stays(kit, path, other):
    store = kit.create(path)
    store.extend([kit.weak()])
    kit.add_teacher(store)
    part(kit, store, [0, 1])
    run(path, other)
    before = FeatureStore.open(other).status("t")
    part(kit, store, [1, 2])  # row 0 was withdrawn, row 2 made
    assert run(path, other).views == {"t": 1}
    dst = FeatureStore.open(other)
    assert dst.pending_rows(["t"]).tolist() == [3, 4, 5, 6, 7, 8, 9]
    np.testing.assert_array_equal(dst.status("t")[:2], before[:2])
    with CachedFeatures(dst, ["t"], device="cpu") as found:
        for row, features in enumerate(found.fetch(np.arange(3))["t"]):
            assert features.equal(dst.teacher("t").roundtrip(kit.feature("t", row)[None])[0])
    assert verify(other, stop=StopFlag()).is_sound


def test_what_is_damaged_in_the_new_store_comes_from_the_source_or_is_named(kit, path, other):
    store = kit.create(path)
    store.extend([kit.weak()])
    kit.add_teacher(store)
    part(kit, store, [0, 1])
    run(path, other)
    file = other / "teachers/t/codes/c.0.0.0"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    data[48 + 4 + 3] ^= 1
    file.write_bytes(data)
    part(kit, store, [1, 2])
    report = run(path, other)
    assert report.views == {"t": 2}
    ((words, why),) = report.damaged["t"].items()
    assert words == store.describe(0)
    assert why.startswith(f"in {other}: ")
    assert FeatureStore.open(other).pending_rows(["t"]).tolist() == [0, 3, 4, 5, 6, 7, 8, 9]
    assert verify(other, stop=StopFlag()).is_sound


def test_what_a_writer_commits_to_the_new_store_before_its_shards_are_claimed_stays(kit, path, other):
    store = kit.create(path)
    store.extend([kit.weak()])
    kit.add_teacher(store)
    run(path, other)
    part(kit, store, [3])

    def on_step(step):
        part(kit, FeatureStore.open(other, writable=True), [0, 1])

    assert run(path, other, on_step=on_step).views == {"t": 1}
    assert FeatureStore.open(other).pending_rows(["t"]).tolist() == [2, 4, 5, 6, 7, 8, 9]


def test_status_words_are_copied_as_they_are_read(kit, path, other):
    """A damaged chunk is read from the sealed words, and must not be copied as it lies."""
    kit.full(path).seal()
    file = path / "views/status/c.1"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    assert run(path, other).views == {"t": 18}
    check(kit, path, other)


def test_a_store_that_lost_seeds(kit, path, other):
    """Its segments cannot be made by growing: rows must keep their numbers all the same."""
    store = kit.create(path)
    store.extend([kit.weak(3, seeds=4), kit.strong(), kit.strong(seed=1)])
    kit.add_teacher(store)
    kit.fill(store)
    remove(path, seed=1, stream="weak", stop=StopFlag())
    remove(path, seed=0, stop=StopFlag())
    run(path, other)
    check(kit, path, other)


def test_damaged_views_are_named_and_the_rest_is_done(kit, path, other):
    kit.full(path)
    file = path / "teachers/t/features/c.1.0.0"
    data = bytearray(file.read_bytes())
    data[2 * (96 + 4) + 5] ^= 1
    file.write_bytes(data)
    (path / "teachers/t/features/c.3.0.0").unlink()
    source = files(path)
    report = run(path, other)
    assert sorted(int(v.split()[0]) for v in report.damaged["t"]) == [6, 12, 13, 14, 15]
    assert "payload checksum" in report.damaged["t"][FeatureStore.open(path).describe(6)]
    assert report.lacking == {}
    assert files(path) == source
    todo = [6, 12, 13, 14, 15]
    dst = FeatureStore.open(other)
    assert dst.pending_rows(["t"]).tolist() == todo
    assert (state_of(dst.view_status())[todo] == DONE).all()  # pixels made again must be the same ones
    assert verify(other, stop=StopFlag()).is_sound
    kit.fill(FeatureStore.open(other, writable=True))
    assert FeatureStore.open(other).info()["complete"]


def test_a_value_that_the_codec_cannot_hold(kit, path, other):
    """int8 takes what half precision cannot."""
    store = kit.create(path)
    store.extend([kit.weak()])
    kit.add_teacher(store, codec="int8")
    for shard in range(store.n_shards):
        rows = store.rows_of_shard(shard).tolist()
        features = torch.stack([kit.feature("t", r) for r in rows])
        if 5 in rows:
            features[rows.index(5), 3, 7] = 1e5
        kit.write(store, shard, features={"t": features})
    with pytest.raises(StoreError, match=r"teacher 't', view 5: .* at token 3, channel 7 cannot be stored"):
        run(path, other, "fp16", threads=1)
    assert verify(other, stop=StopFlag()).is_sound
    assert FeatureStore.open(other).pending_rows(["t"]).tolist() == [4, 5, 6, 7, 8, 9]


def test_a_signal_ends_it_and_the_same_call_goes_on(kit, path, other):
    kit.full(path)
    stop, seen = StopFlag(), []

    def progress(done, total):
        seen.append((done, total))
        stop.signum = 15

    with pytest.raises(Interrupted, match="run the same command again"):
        run(path, other, stop=stop, progress=progress, threads=1)
    left = FeatureStore.open(other).pending_views(["t"])
    assert 0 < left < 18
    assert seen[0] == (4, 18)
    assert run(path, other).views == {"t": left}
    check(kit, path, other)


def test_other_things_are_not_written_over(kit, path, other, tmp_path):
    store = kit.full(path)
    with pytest.raises(StoreMismatch, match="into itself"):
        run(path, path)
    other.mkdir()
    (other / "mine.txt").touch()
    with pytest.raises(StoreMismatch, match="not a feature store"):
        run(path, other)
    made = tmp_path / "made.zarr"
    kit.full(made, codec="int8")
    with pytest.raises(StoreMismatch, match=r"teacher t, recoded from: expected \['fp16'\], found None"):
        run(path, made)
    done = tmp_path / "done.zarr"
    run(path, done)
    with pytest.raises(StoreMismatch, match="codec: expected 'fp16', found 'int8'"):
        run(path, done, "fp16")
    store.extend([kit.strong(seed=1)])
    with pytest.raises(StoreMismatch, match="n_rows: expected 32, found 24"):
        run(path, done)


def test_bad_arguments(kit, path, other):
    with pytest.raises(StoreNotFound):
        run(path, other)
    store = kit.create(path)
    with pytest.raises(StoreError, match="no teachers"):
        run(path, other)
    store.extend([kit.weak()])
    kit.add_teacher(store)
    with pytest.raises(StoreIncomplete, match="no teacher 'x'"):
        run(path, other, teachers=["x"])
    with pytest.raises(StoreError, match="no codec 'int7'"):
        run(path, other, "int7")
    assert not other.exists()


def test_no_room(kit, path, other, monkeypatch):
    kit.full(path)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda where: usage)
    with pytest.raises(StoreError, match=r"only 0\.00 GB are free there; nothing was written"):
        run(path, other)
    assert not other.exists()


def test_a_fault_while_it_is_made_leaves_nothing(kit, path, other, monkeypatch):
    kit.full(path)

    def refuse(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(StoreError, match="No space left on device"):
        patched.setattr("os.rename", refuse)
        run(path, other)
    assert [p.name for p in other.parent.iterdir()] == [path.name]
