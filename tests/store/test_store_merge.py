"""Merging: one store gets what the other has, nothing twice, and nothing at all where they do not fit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import zlib

import numpy as np
import pytest
import torch

from rsmtdf.errors import StoreError, StoreMismatch
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.specs import STREAMS, ViewRecipe
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.merge import merge
from rsmtdf.store.recode import recode
from rsmtdf.store.remove import remove
from rsmtdf.store.statistics import ChannelStatistics
from rsmtdf.store.status import DONE, SKIPPED, crc_of, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.verify import verify


class Killed(Exception):
    """Stands for a kill between two steps."""


@pytest.fixture
def other(tmp_path):
    return tmp_path / "other.zarr"


def run(path, other, **changes):
    return merge(path, other, **({"stop": StopFlag()} | changes))


def view(store, row: int) -> str:
    """What a view is, in whatever store: tile, stream, seed and the partner's tile."""
    tile, partner = store.column("tile"), store.column("partner")
    ids = store.tile_ids
    stream, seed = STREAMS[store.column("stream")[row]], int(store.column("seed")[row])
    return f"{ids[tile[row]]} {stream} {seed} with {ids[tile[partner[row]]]}"


def content(teacher: str, view: str, spec) -> torch.Tensor:
    """float32 [tokens, dim]: a function of the view, not of its row."""
    x = np.random.default_rng(list(f"{teacher} {view}".encode())).standard_normal((spec.tokens, spec.dim))
    return torch.from_numpy(x.astype(np.float16).astype(np.float32))


def crc(view: str) -> int:
    return sum(view.encode()) * 2654435761 & 0xFFFFFFFF


def fill(store, teachers=("t",), *, shards=None, skipped=()) -> None:
    """Writes what is missing (of `shards`); views named in `skipped` cannot be read."""
    for name in teachers:
        for shard in store.missing_shards([name]) if shards is None else shards:
            rows = store.rows_of_shard(shard).tolist()
            good = [r for r in rows if view(store, r) not in skipped]
            spec = store.teacher(name).spec
            parts = [content(name, view(store, r), spec) for r in good]
            store.write_shard(
                shard,
                view_crcs={r: crc(view(store, r)) for r in good},
                skipped={r: "cut" for r in rows if r not in good},
                features={name: torch.stack(parts) if parts else torch.empty(0, spec.tokens, spec.dim)},
                provenance={},
            )


def keyed(segment):
    """With parameters that are a function of the view, as real ones are."""
    ids = segment.tile_ids * segment.seeds
    seeds = np.repeat(np.arange(segment.seed_start, segment.seed_start + segment.seeds), len(segment.tile_ids))
    scale = np.array([zlib.crc32(f"{t} {s}".encode()) % 97 for t, s in zip(ids, seeds, strict=True)], np.float64)
    return dataclasses.replace(segment, columns={**segment.columns, "scale": scale, "flip": scale % 2 == 0})


def make(kit, path, segments, *, teachers=("t",), codec="fp16", filled=True, how=keyed) -> FeatureStore:
    store = kit.create(path)
    store.extend([how(s) for s in segments])
    for name in teachers:
        kit.add_teacher(store, name, codec=codec)
    if filled:
        fill(store, teachers)
    return store


def check(kit, path) -> FeatureStore:
    """Each done view is what it says it is, and none is there twice."""
    store = FeatureStore.open(path)
    rows = kit.rows(store)
    for name, teacher in store.teachers.items():
        done = rows[state_of(store.status(name))[rows] == DONE]
        with CachedFeatures(store, [name], device="cpu") as source:
            found = source.fetch(done)[name]
        for k, row in enumerate(done.tolist()):
            expected = content(name, view(store, row), teacher.spec)[None]
            for came in teacher.statistics.get("recoded_from", []):
                assert came == "fp16"
            assert found[k].equal(teacher.roundtrip(expected)[0])
    made = rows[state_of(store.view_status())[rows] == DONE]
    assert crc_of(store.view_status()[made]).tolist() == [crc(view(store, r)) for r in made.tolist()]
    keys = [view(store, r).partition(" with")[0] for r in rows.tolist()]
    assert len(set(keys)) == len(keys)
    assert verify(path, stop=StopFlag()).is_sound
    return store


def files(path) -> dict:
    return {f.relative_to(path): f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != "locks"}


def test_other_seeds_and_tiles(kit, path, other):
    make(kit, path, [kit.weak(3, seeds=2), kit.strong(seed=0)])
    make(kit, other, [kit.strong(seed=1), kit.weak(4, seeds=3), kit.strong(3, first_tile=5), kit.strong(2, seed=7)])
    source = files(other)
    report = run(path, other)
    assert files(other) == source
    store = check(kit, path)
    assert store.info()["complete"]
    assert report.new_views == {"strong": 5 + 3 + 2, "weak": 2 * 1 + 1 * 4}
    assert report.views == {"t": 16}
    assert report.bytes == 16 * 96
    assert (report.left, report.damaged, report.lacking) == ({}, {}, {})
    # Seed 0 of other tiles is a generation of its own.
    strong = [(s.seed_start, s.generation, s.tiles) for s in store.segments if s.stream == "strong"]
    assert strong == [(0, 0, 5), (1, 0, 5), (0, 1, 3), (7, 0, 2)]
    weak = [(list(s.all_seeds), s.tiles) for s in store.segments if s.stream == "weak"]
    assert weak == [([0, 1], 3), ([0, 1], 1), ([2], 4)]
    again = run(path, other)
    assert (again.new_views, again.views, again.bytes) == ({}, {}, 0)
    assert store.teacher("t").status.sealed_ranges()


def test_generations_are_renumbered(kit, path, other):
    make(kit, path, [kit.strong(2), kit.strong(2, generation=1, first_tile=2)])
    make(kit, other, [kit.strong(2, first_tile=4), kit.strong(3, generation=1, first_tile=6)])
    run(path, other)
    store = check(kit, path)
    assert [(s.generation, s.tiles) for s in store.segments] == [(0, 2), (1, 2), (2, 2), (3, 3)]


def test_unfinished_shards_are_finished(kit, path, other):
    segments = [kit.weak(5), kit.strong()]
    store = make(kit, path, segments, filled=False)
    fill(store, shards=[0, 3])
    kept = files(path / "teachers/t/features")
    theirs = make(kit, other, segments, filled=False)
    fill(theirs, shards=[1, 3, 4])
    report = run(path, other)
    store = check(kit, path)
    assert report.new_views == {}
    assert report.views == {"t": 5}
    assert store.pending_rows(["t"]).tolist() == [8, 9]
    assert report.lacking == {"t": 2}
    assert kept.items() <= files(path / "teachers/t/features").items()


def test_a_shard_of_which_both_have_a_part(kit, path, other, withdraw):
    """A's own views stay, B's come in, what neither has stays to be done, what neither could read stays skipped."""
    segments = [kit.weak(2, seeds=4)]
    store = make(kit, path, segments, filled=False)
    names = [view(store, r) for r in range(8)]
    fill(store, skipped=[names[1], names[2]], shards=[0])
    theirs = make(kit, other, [kit.weak(2, seeds=2)], filled=False)
    fill(theirs, skipped=[names[2], names[3]])
    withdraw(store, 1, "t")
    report = run(path, other)
    store = check(kit, path)
    assert report.views == {"t": 1}
    assert (state_of(store.status("t"))[:4] == [DONE, DONE, SKIPPED, DONE]).all()
    assert store.pending_rows(["t"]).tolist() == [4, 5, 6, 7]


def test_what_a_writer_commits_before_its_shards_are_claimed_stays(kit, path, other):
    make(kit, path, [kit.weak(2, seeds=2)], filled=False)
    theirs = make(kit, other, [kit.weak(2, seeds=2)], filled=False)

    def write(store, done):
        rows = store.rows_of_shard(0).tolist()
        store.write_shard(
            0,
            view_crcs={r: crc(view(store, r)) for r in done},
            skipped={},
            features={"t": torch.stack([content("t", view(store, r), store.teacher("t").spec) for r in done])},
            provenance={},
            left=set(rows) - set(done),
        )

    def on_step(step):
        if step == "shards":
            write(FeatureStore.open(path, writable=True), [0, 1])

    write(theirs, [3])
    report = run(path, other, on_step=on_step)
    assert (report.views, report.lacking) == ({"t": 1}, {"t": 1})
    assert check(kit, path).pending_rows(["t"]).tolist() == [2]


def test_what_b_skipped_is_skipped_in_new_segments(kit, path, other):
    make(kit, path, [kit.weak(2)])
    theirs = make(kit, other, [kit.weak(2, start=2)], filled=False)
    fill(theirs, skipped=[view(theirs, 1)])
    run(path, other)
    store = check(kit, path)
    assert (state_of(store.status("t"))[4:8] == [DONE, SKIPPED, DONE, DONE]).all()
    assert store.info()["complete"]


def test_seeds_that_b_has_not_begun_are_not_taken(kit, path, other):
    make(kit, path, [kit.weak(4, seeds=1)])
    theirs = make(kit, other, [kit.weak(4, seeds=3), kit.strong()], filled=False)
    fill(theirs, shards=[1])
    assert run(path, other).new_views == {"weak": 4}
    assert check(kit, path).info()["complete"]


def test_a_new_teacher(kit, path, other):
    make(kit, path, [kit.weak(3)])
    theirs = make(kit, other, [kit.weak(3), kit.strong()], teachers=["u"], codec="int8")
    report = run(path, other, experiment={"n": 2})
    store = check(kit, path)
    assert (report.new_teachers, report.views, report.lacking) == (["u"], {"u": 11}, {"t": 5})
    assert store.teacher("u").codec == "int8"
    assert store.teacher("u").statistics == theirs.teacher("u").statistics
    assert store.experiment == {"n": 2}
    assert not len(store.pending_rows(["u"]))
    run(path, other)  # now they are equal
    assert list(check(kit, path).teachers) == ["t", "u"]


def test_a_recoded_sibling_needs_recode(kit, path, other, tmp_path):
    make(kit, path, [kit.weak(3)], codec="int8")
    make(kit, other, [kit.weak(3, start=2), kit.strong()], codec="fp16")
    before = files(path)
    with pytest.raises(StoreMismatch, match=r"codec: expected 'int8', found 'fp16' \(--recode"):
        run(path, other)
    assert files(path) == before
    report = run(path, other, recode=True)
    assert report.recoded == ["t"]
    assert report.bytes == 11 * FeatureStore.open(path).teacher("t").bytes_per_view
    assert check(kit, path).info()["complete"]
    notes = {f.stem: json.loads(f.read_text()) for f in path.glob("provenance/t/*.json")}
    assert {shard for shard, note in notes.items() if note.get("recoded_from") == "fp16"} == {
        shard for shard, note in notes.items() if note.get("merged")
    }
    assert any(note.get("merged") for note in notes.values())
    # Recoding first is the same as recoding on the way.
    recode(other, tmp_path / "r.zarr", codec="int8", stop=StopFlag())
    assert run(path, tmp_path / "r.zarr").views == {}


def test_other_statistics_need_recode(kit, path, other):
    make(kit, path, [kit.weak(3)], codec="int8")
    theirs = kit.create(other)
    theirs.extend([keyed(kit.weak(3, start=2))])
    statistics = ChannelStatistics(8)
    statistics.update(torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0)))
    theirs.add_teacher(kit.spec(), codec="int8", statistics=statistics, rule={"views": 3})
    with pytest.raises(StoreMismatch) as error:
        run(path, other)
    for text in ("statistics rule.views: expected 4, found 3", "channel_mean: expected the same", "channel_std"):
        assert text in str(error.value)
    for shard in range(theirs.n_shards):
        rows = theirs.rows_of_shard(shard).tolist()
        spec = theirs.teacher("t").spec
        theirs.write_shard(
            shard, view_crcs={r: crc(view(theirs, r)) for r in rows}, skipped={}, provenance={},
            features={"t": torch.stack([content("t", view(theirs, r), spec) for r in rows])},
        )  # fmt: skip
    run(path, other, recode=True)
    store = FeatureStore.open(path)
    rows = kit.rows(store)[-6:]
    with CachedFeatures(store, ["t"], device="cpu") as source:
        found = source.fetch(rows)["t"]
    expected = torch.stack([content("t", view(store, r), store.teacher("t").spec) for r in rows.tolist()])
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_every_conflict_is_listed_and_nothing_written(kit, path, other):
    make(kit, path, [kit.weak(3)])
    theirs = kit.create(other, recipe=dataclasses.replace(ViewRecipe(), crop_px=56, hflip_p=0.25))
    theirs.extend([kit.weak(3)])
    theirs.add_teacher(kit.spec(layer=3, dim=4), codec="fp16", statistics=kit.statistics(4), rule={"views": 4})
    before = files(path)
    with pytest.raises(StoreMismatch) as error:
        run(path, other, recode=True)
    for text in (
        "views: recipe.crop_px: expected 518, found 56",
        "views: recipe.hflip_p: expected 0.5, found 0.25",
        "teacher t: dim: expected 8, found 4",
        "teacher t: layer: expected -1, found 3",
        "nothing was written",
    ):
        assert text in str(error.value)
    assert files(path) == before


def test_common_views_must_have_the_same_pixels_and_parameters(kit, path, other):
    make(kit, path, [kit.weak(3)])
    theirs = make(kit, other, [kit.weak(3)], filled=False)
    kit.write(theirs, 0)  # other sums
    with pytest.raises(StoreMismatch, match=r"checksum of the pixels differs for 4 views .* view 0 \(tile scène/0_0"):
        run(path, other)
    shutil.rmtree(other)

    def rescaled(segment):
        scale = keyed(segment).columns["scale"].copy()
        scale[4] = 3
        return dataclasses.replace(keyed(segment), columns={**keyed(segment).columns, "scale": scale})

    make(kit, other, [kit.weak(3)], how=rescaled)
    with pytest.raises(StoreMismatch, match=r"parameter scale differs for 1 views .* seed 1\): expected .*, found 3"):
        run(path, other)
    shutil.rmtree(other)

    def retyped(segment):
        return dataclasses.replace(segment, columns={**segment.columns, "flip": np.zeros(6, np.int16)})

    make(kit, other, [kit.weak(3, start=5)], how=retyped)
    with pytest.raises(StoreMismatch, match="column flip: expected bool, found int16"):
        run(path, other)


def test_a_strong_segment_that_partly_overlaps_is_left(kit, path, other):
    make(kit, path, [kit.strong(4)])
    make(kit, other, [kit.strong(4, first_tile=1), kit.strong(2, seed=1)])
    report = run(path, other)
    assert report.left == {"strong seed 0, generation 0": 4}
    store = check(kit, path)
    assert [(s.seed_start, s.tiles) for s in store.segments] == [(0, 4), (1, 2)]


def test_of_an_overlapping_segment_equal_pairs_still_help(kit, path, other):
    """Tiles 0..3 and 0..5 pair the same way but for what is more; what A has not finished comes from B."""
    store = make(kit, path, [kit.strong(4)], filled=False)
    make(kit, other, [kit.strong(6)])
    report = run(path, other)
    assert report.left == {"strong seed 0, generation 0": 2}
    assert report.views == {"t": 4}
    assert check(kit, path).pending_rows(["t"]).size == 0
    assert store.n_views == 4


def test_stores_with_other_shard_sizes(kit, path, other):
    make(kit, path, [kit.weak(3)])
    theirs = FeatureStore.create(
        other, recipe=kit.recipe, dataset=kit.dataset, data_root="x", experiment={}, shard_views=7
    )
    theirs.extend([keyed(kit.weak(3)), keyed(kit.strong(9))])
    kit.add_teacher(theirs)
    fill(theirs)
    assert run(path, other).views == {"t": 9}
    assert check(kit, path).info()["complete"]


def test_a_store_that_lost_seeds_gets_them_back(kit, path, other):
    segments = [kit.weak(3, seeds=4), kit.strong(), kit.strong(seed=1)]
    make(kit, path, segments)
    shutil.copytree(path, other)
    remove(path, seed=1, stream="weak", stop=StopFlag())
    remove(path, seed=0, stop=StopFlag())
    report = run(path, other)
    assert report.new_views == {"weak": 3, "strong": 5}
    assert check(kit, path).info()["complete"]


def test_damage_in_either_is_named_and_stays_to_be_done(kit, path, other):
    segments = [kit.weak(2, seeds=4)]
    store = make(kit, path, segments, filled=False)
    fill(store, shards=[0], skipped=[view(store, 3)])
    make(kit, other, segments)

    def flip(store, shard, slot):
        file = store / f"teachers/t/features/c.{shard}.0.0"
        data = bytearray(file.read_bytes())
        data[slot * 100 + 5] ^= 1
        file.write_bytes(data)

    flip(path, 0, 1)
    flip(other, 1, 2)
    report = run(path, other)
    assert {(int(v.split()[0]), v.rpartition(" ")[2]) for v in report.damaged["t"]} == {(1, str(path)), (6, str(other))}
    store = check(kit, path)
    assert store.pending_rows(["t"]).tolist() == [1, 6]
    assert report.lacking == {"t": 2}


def test_a_dry_run_says_the_same_and_changes_nothing(kit, path, other):
    make(kit, path, [kit.weak(3)])
    make(kit, other, [kit.weak(3, seeds=3), kit.strong()], teachers=["t", "u"])
    before = files(path)
    plan = run(path, other, dry_run=True)
    assert files(path) == before
    report = run(path, other)
    assert (plan.new_views, plan.views, plan.bytes) == (report.new_views, report.views, report.bytes)
    assert plan.new_teachers == ["u"]
    assert report.views == {"t": 8, "u": 14}


def test_not_while_somebody_writes(kit, path, other):
    make(kit, other, [kit.strong()])
    with (
        make(kit, path, [kit.weak(3)]).claim([0]),
        pytest.raises(StoreError, match=r"cannot merge into feature store .* while process"),
    ):
        run(path, other)
    with pytest.raises(StoreError, match="into itself"):
        run(path, path)


def test_no_room(kit, path, other, monkeypatch):
    make(kit, path, [kit.weak(3)])
    make(kit, other, [kit.strong()])
    before = files(path)
    monkeypatch.setattr(shutil, "disk_usage", lambda where: type("Usage", (), {"free": 100}))
    with pytest.raises(StoreError, match="nothing was written"):
        run(path, other)
    assert files(path) == before


def test_a_signal_ends_it_and_the_same_call_goes_on(kit, path, other):
    make(kit, path, [kit.weak(3)])
    make(kit, other, [kit.strong(), kit.strong(seed=1)])
    stop, seen = StopFlag(), []

    def progress(done, total):
        seen.append((done, total))
        stop.signum = 15

    with pytest.raises(Interrupted, match="run the same command again"):
        run(path, other, stop=stop, progress=progress, threads=1)
    assert seen[0] == (4, 10)
    assert 0 < check(kit, path).pending_rows(["t"]).size < 10
    run(path, other)
    assert check(kit, path).info()["complete"]


@pytest.mark.parametrize("sealed", [False, True])
def test_a_kill_at_any_step(kit, tmp_path, sealed):
    """Whatever is there afterwards is right, and the same call makes it whole."""
    base, other = tmp_path / "base.zarr", tmp_path / "other.zarr"
    store = make(kit, base, [kit.weak(3), kit.strong(4)], codec="int8", filled=False)
    fill(store, shards=[0, 1])
    if sealed:
        store.seal()
    make(kit, other, [kit.weak(4, seeds=3), kit.strong(4), kit.strong(5, seed=1)], teachers=["t", "u"], codec="int8")
    for last in itertools.count():
        path = tmp_path / f"{last}.zarr"
        shutil.copytree(base, path)
        steps = itertools.count()

        def on_step(name, steps=steps, last=last):
            if next(steps) == last:
                raise Killed(name)

        try:
            run(path, other, on_step=on_step, threads=1)
        except Killed:
            check(kit, path)
            run(path, other)
        whole = check(kit, path)
        assert whole.n_views == 12 + 4 + 5
        assert whole.info()["complete"]
        if next(steps) <= last:
            break
    assert last > 10


@pytest.mark.parametrize("calls", [0, 3, 8, 15, 22, 30])
def test_a_disk_that_fails_after_any_number_of_writes(kit, path, other, monkeypatch, calls):
    make(kit, path, [kit.weak(3)])
    make(kit, other, [kit.weak(3), kit.strong(5, seed=1)], teachers=["t", "u"])
    replace, count = os.replace, itertools.count()

    def failing(*args, **kwargs):
        if next(count) >= calls:
            raise OSError(28, "No space left on device")
        return replace(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(StoreError, match="No space left on device"):
        patched.setattr(os, "replace", failing)
        run(path, other)
    check(kit, path)
    run(path, other)
    assert check(kit, path).info()["complete"]
