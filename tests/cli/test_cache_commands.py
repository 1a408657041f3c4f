"""`rsmtdf cache recode | merge | rm | info` and `cache-features --stats-from`, as typed, on stores of tiny models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rsmtdf.cli.training import TrainOptions, train_run
from rsmtdf.errors import CheckpointError, StoreIncomplete
from rsmtdf.signals import StopFlag
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.store import FeatureStore

Run = Callable[..., Any]


def train(store: Path, out: Path, *, steps: int = 2, resume: bool = False) -> dict[str, Any]:
    given = {} if resume else {"budget": f"{steps}-steps"}
    options = TrainOptions(cache=store, out=out, device="cpu", train=given, resume=resume)
    return train_run(options, stop=StopFlag(), say=lambda line: None)


def cache(command: Run, tiny: Any, out: Path, *options: str) -> Any:
    return command("cache-features", "--config", tiny.config, "--out", out, "--device", "cpu", *options)


def flip(file: Path, at: int = 100) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_recoded_store_trains_and_stage_one_goes_on_with_it(tiny: Any, tmp_path: Path, command: Run) -> None:
    small = tmp_path / "small.zarr"
    said = command("cache", "recode", tiny.store, small, "--codec", "int4")
    assert said.code == 0, said.err
    views = FeatureStore.open(small).n_views
    assert f"recoded    {2 * views:,} views in" in said.out
    assert re.search(r"^error      dense: \d+\.\d+%", said.out, re.MULTILINE)
    assert "added, after standardising" in said.out
    assert f"next       rsmtdf train --cache {small}" in said.out
    assert train(small, tmp_path / "run")["steps"] == 2
    record = FeatureStore.open(small).experiment["config"]
    assert record["cache"]["codec"] == "int4"
    # A run begun on one goes on with the other: rows and views are the same ones.
    again = command("cache", "recode", tiny.store, small, "--codec", "int4", "--json")
    assert json.loads(again.out)["views"] == {}
    said = cache(command, tiny, small, "--codec", "int4", "--seeds", "3")
    assert said.code == 0, said.err
    assert FeatureStore.open(small).n_views > views
    assert FeatureStore.open(small).info()["complete"]


def test_recode_of_one_teacher(tiny: Any, tmp_path: Path, command: Run) -> None:
    said = command("cache", "recode", tiny.store, "one.zarr", "--codec", "fp16", "--teacher", "coarse", "--json")
    assert said.code == 0, said.err
    store = FeatureStore.open(Path("one.zarr"))
    assert list(store.teachers) == ["coarse"]
    assert [t["name"] for t in store.experiment["config"]["teachers"]] == ["coarse"]
    assert train(Path("one.zarr"), tmp_path / "run")["steps"] == 2


def test_recode_names_damage_and_finishes_the_rest(tiny: Any, command: Run) -> None:
    flip(tiny.store / "teachers/dense/codes/c.0.0.0")
    said = command("cache", "recode", tiny.store, "new.zarr", "--codec", "fp16")
    assert said.code == 1
    assert "DAMAGED    dense: 1 views, which stay to be done" in said.out
    assert "payload checksum is" in said.out
    assert len(FeatureStore.open(Path("new.zarr")).pending_rows(["dense", "coarse"])) == 1


def test_recode_into_something_else(tiny: Any, command: Run) -> None:
    for dst, what in ((tiny.store, "into itself"), (tiny.folder, "not a feature store")):
        said = command("cache", "recode", tiny.store, dst, "--codec", "int8")
        assert said.code == 2
        assert what in said.err
    assert "no codec 'int3'" in command("cache", "recode", tiny.store, "x.zarr", "--codec", "int3").err


def test_siblings_are_cached_apart_and_merged(tiny: Any, tmp_path: Path, command: Run) -> None:
    """One machine makes seeds 0 and 1, another more of them: together they are what one would have made."""
    one, other = tmp_path / "one.zarr", tmp_path / "other.zarr"
    said = cache(command, tiny, one, "--seeds", "1", "--weak-views", "2", "--codec", "int8")
    assert said.code == 0, said.err
    said = cache(command, tiny, other, "--seeds", "3", "--weak-views", "4", "--codec", "int8", "--stats-from", str(one))
    assert said.code == 0, said.err
    a, b = FeatureStore.open(one), FeatureStore.open(other)
    for name, teacher in a.teachers.items():
        assert np.array_equal(teacher.mean, b.teacher(name).mean)
        assert teacher.statistics == b.teacher(name).statistics
    plan = command("cache", "merge", one, other, "--dry-run", "--json")
    assert FeatureStore.open(one).n_views == a.n_views
    said = command("cache", "merge", one, other, "--json")
    assert said.code == 0, said.err
    report, planned = json.loads(said.out), json.loads(plan.out)
    assert report["new_views"] == planned["new_views"]
    assert report["views"] == planned["views"]
    assert (report["left"], report["lacking"]) == ({}, {})
    # As one store that was made in one go.
    whole = tmp_path / "whole.zarr"
    cache(command, tiny, whole, "--seeds", "3", "--weak-views", "4", "--codec", "int8", "--stats-from", str(one))
    assert _views(one, "dense").items() >= _views(whole, "dense").items()
    assert train(one, tmp_path / "run")["steps"] == 2
    said = cache(command, tiny, one, "--seeds", "3", "--weak-views", "4", "--codec", "int8")
    assert "nothing to do" in said.out


def _views(path: Path, teacher: str) -> dict[tuple[str, int, int], bytes]:
    """(tile, stream, seed) -> the stored bytes of the view."""
    store = FeatureStore.open(path)
    rows = np.concatenate([np.arange(s.row_start, s.row_stop) for s in store.segments])
    with FeatureReader(store, teacher) as reader:
        arrays = reader.get_many(rows)
    tile, stream, seed = (store.column(name)[rows].tolist() for name in ("tile", "stream", "seed"))
    return {
        (store.tile_ids[tile[k]], stream[k], seed[k]): b"".join(a[k].tobytes() for a in arrays.values())
        for k in range(len(rows))
    }


def test_stores_that_are_no_siblings(tiny: Any, tmp_path: Path, command: Run) -> None:
    other = tmp_path / "other.zarr"
    cache(command, tiny, other, "--seeds", "3", "--weak-views", "5", "--codec", "fp16")
    said = command("cache", "merge", tiny.store, other)
    assert said.code == 2
    assert "codec: expected 'int8', found 'fp16'" in said.err
    assert "--recode" in said.err
    said = command("cache", "merge", tiny.store, other, "--recode")
    assert said.code == 0, said.err
    assert "features   dense: 20 views, encoded anew" in said.out
    assert "added      20 strong views" in said.out


def test_a_merged_teacher_is_trained_on(tiny: Any, tmp_path: Path, command: Run) -> None:
    one, other = tmp_path / "one.zarr", tmp_path / "other.zarr"
    cache(command, tiny, one, "--teacher", "dense")
    cache(command, tiny, other, "--teacher", "coarse")
    said = command("cache", "merge", one, other)
    assert said.code == 0, said.err
    assert "teacher    coarse is new" in said.out
    store = FeatureStore.open(one)
    assert [t["name"] for t in store.experiment["config"]["teachers"]] == ["dense", "coarse"]
    assert train(one, tmp_path / "run")["steps"] == 2


def test_statistics_from_a_store_of_other_teachers(tiny: Any, tmp_path: Path, command: Run) -> None:
    said = cache(command, tiny, tmp_path / "new.zarr", "--stats-from", "nowhere.zarr")
    assert said.code == 2
    assert "nowhere.zarr" in said.err
    said = cache(command, tiny, tmp_path / "new.zarr", "--stats-from", str(tiny.store), "--set", "teachers.0.seed=7")
    assert said.code == 2
    assert "weights_sha256: expected" in said.err
    assert not (tmp_path / "new.zarr").exists()
    only = tmp_path / "only.zarr"
    cache(command, tiny, only, "--teacher", "dense")
    said = cache(command, tiny, tmp_path / "new.zarr", "--teacher", "coarse", "--stats-from", str(only))
    assert said.code == 2
    assert "none of the teachers coarse" in said.err


def test_rm_asks_and_refuses_where_nobody_is(tiny: Any, command: Run) -> None:
    before = FeatureStore.open(tiny.store).n_views
    said = command("cache", "rm", tiny.store, "--seed", "1")
    assert said.code == 2
    assert "remove     strong seed 1 from" in said.err
    assert "--yes" in said.err
    said = command("cache", "rm", tiny.store, "--seed", "1", "--dry-run", "--json")
    assert json.loads(said.out)["views"] == 20
    assert FeatureStore.open(tiny.store).n_views == before


@pytest.mark.parametrize(("answer", "left"), [("y\n", 1), ("n\n", 2), ("\n", 2)])
def test_rm_on_a_terminal(tiny: Any, command: Run, monkeypatch: pytest.MonkeyPatch, answer: str, left: int) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return answer

    monkeypatch.setattr("sys.stdin", Terminal())
    said = command("cache", "rm", tiny.store, "--seed", "1")
    assert said.code == 0, said.err
    assert "remove it? [y/N]" in said.err
    assert ("nothing was removed" in said.err) == (left == 2)
    assert len({s.seed_start for s in FeatureStore.open(tiny.store).segments if s.stream == "strong"}) == left


def test_a_removed_seed_is_cached_again_and_its_runs_are_told(tiny: Any, tmp_path: Path, command: Run) -> None:
    out = tmp_path / "run"
    train(tiny.store, out, steps=6)
    views = _views(tiny.store, "dense")
    said = command("cache", "rm", tiny.store, "--seed", "0", "--yes")
    assert said.code == 0, said.err
    assert "removed    strong seed 0: 20 views; strong seeds left: 1" in said.out
    assert train(tiny.store, tmp_path / "other")["steps"] == 2
    for seed in (1, 3):
        assert command("cache", "rm", tiny.store, "--stream", "weak", "--seed", seed, "--yes").code == 0
    store = FeatureStore.open(tiny.store)
    assert store.info()["complete"]
    said = cache(command, tiny, tiny.store, "--codec", "int8")
    assert said.code == 0, said.err
    assert _views(tiny.store, "dense") == views
    assert train(tiny.store, tmp_path / "again")["steps"] == 2


def test_an_unfinished_run_on_removed_views_says_so(tiny: Any, tmp_path: Path, command: Run) -> None:
    out = tmp_path / "run"
    options = TrainOptions(cache=tiny.store, out=out, device="cpu", train={"budget": "40-steps"})
    stop = StopFlag()

    def say(line: str) -> None:
        stop.signum = 15  # as soon as the run has begun

    with pytest.raises(BaseException, match="resume"):
        train_run(options, stop=stop, say=say)
    command("cache", "rm", tiny.store, "--seed", "0", "--yes")
    with pytest.raises((CheckpointError, StoreIncomplete), match="views"):
        train(tiny.store, out, resume=True)


def test_a_removed_teacher_is_no_longer_trained_on(tiny: Any, tmp_path: Path, command: Run) -> None:
    said = command("cache", "rm", tiny.store, "--teacher", "coarse", "--yes")
    assert said.code == 0, said.err
    assert "teachers left: dense" in said.out
    assert train(tiny.store, tmp_path / "run")["steps"] == 2
    said = cache(command, tiny, tiny.store, "--codec", "int8")
    assert said.code == 0, said.err
    assert sorted(FeatureStore.open(tiny.store).teachers) == ["coarse", "dense"]


def test_the_last_teacher_and_the_last_seed(tiny: Any, tmp_path: Path, command: Run) -> None:
    for name in ("coarse", "dense"):
        said = command("cache", "rm", tiny.store, "--teacher", name, "--yes")
        assert said.code == 0, said.err
    assert "none; there is nothing to train from" in said.out
    said = command("train", "--cache", tiny.store, "--out", tmp_path / "run")
    assert said.code == 2, said.err
    for seed in (0, 1):
        said = command("cache", "rm", tiny.store, "--seed", seed, "--yes")
    assert "strong seeds left: none" in said.out
    said = cache(command, tiny, tiny.store, "--codec", "int8")
    assert said.code == 0, said.err
    assert FeatureStore.open(tiny.store).info()["complete"]


def test_rm_of_what_is_not_there(tiny: Any, command: Run) -> None:
    assert "no teacher 'x'" in command("cache", "rm", tiny.store, "--teacher", "x", "--yes").err
    assert "no strong views of seed 9" in command("cache", "rm", tiny.store, "--seed", "9", "--yes").err
    assert "either --teacher NAME or --seed N" in command("cache", "rm", tiny.store).err
    assert "--stream odd" in command("cache", "rm", tiny.store, "--seed", "0", "--stream", "odd").err


def test_a_teacher_mistyped_clears_nothing_of_others(tiny: Any, command: Run) -> None:
    remains = tiny.store / "teachers" / "old"
    remains.mkdir()
    (remains / "x").write_bytes(b"1" * 100)
    said = command("cache", "rm", tiny.store, "--teacher", "desne", "--yes")
    assert said.code == 2
    assert "no teacher 'desne'; did you mean dense?" in said.err
    assert remains.exists()
    said = command("cache", "rm", tiny.store, "--teacher", "old", "--yes")
    assert said.code == 0, said.err
    assert "removed    what an earlier removal left" in said.out
    assert not remains.exists()


def test_the_same_rm_again(tiny: Any, command: Run) -> None:
    """It clears what a kill left on disk; where there is nothing, it says that the seed is not there."""
    copy = tiny.folder / "copy.zarr"
    shutil.copytree(tiny.store, copy)
    assert command("cache", "rm", tiny.store, "--seed", "1", "--yes").code == 0
    (gone, *_) = [f for f in copy.rglob("c.*.0") if not (tiny.store / f.relative_to(copy)).exists()]
    shutil.copy(gone, tiny.store / gone.relative_to(copy))
    said = command("cache", "rm", tiny.store, "--seed", "1")
    assert (said.code, "removed    what an earlier removal left" in said.out) == (0, True)
    assert command("cache", "rm", tiny.store, "--seed", "1").code == 2


def test_litter_of_a_removal_that_was_cut_short_is_cleared_by_stage_one(tiny: Any, command: Run) -> None:
    copy = tiny.folder / "copy.zarr"
    shutil.copytree(tiny.store, copy)
    command("cache", "rm", tiny.store, "--seed", "1", "--yes")
    gone = [f.relative_to(copy) for f in copy.rglob("c.*.0") if not (tiny.store / f.relative_to(copy)).exists()]
    assert gone
    for file in gone:
        shutil.copy(copy / file, tiny.store / file)
    said = cache(command, tiny, tiny.store, "--codec", "int8", "--seeds", "1")
    assert said.code == 0, said.err
    assert not any((tiny.store / file).exists() for file in gone)


def test_info_shows_what_is_there_and_what_finishes_it(tiny: Any, command: Run, withdraw: Callable[..., None]) -> None:
    said = command("cache", "info", tiny.store)
    assert said.code == 0, said.err
    table = [line.split() for line in said.out.splitlines()]
    assert ["stream", "seeds", "views", "dense", "coarse"] in table
    assert ["strong", "0-1", "40", "complete", "complete"] in table
    assert ["weak", "0-4", "30", "complete", "complete"] in table
    assert "; sealed" in said.out
    withdraw(FeatureStore.open(tiny.store, writable=True), 0, "dense")
    command("cache", "rm", tiny.store, "--seed", "1", "--yes")
    said = command("cache", "info", tiny.store)
    assert "INCOMPLETE" in said.out
    assert f"--out {tiny.store}: it computes" in said.out
    assert "20 removed; not sealed" in said.out
    found = json.loads(command("cache", "info", tiny.store, "--json").out)
    assert {"views", "complete", "bytes_per_view", "identity"} <= found.keys()
    assert found["bytes_per_view"] == {n: t["bytes_per_view"] for n, t in found["teachers"].items()}


def test_info_draws_features_beside_their_views(tiny: Any, command: Run) -> None:
    said = command("cache", "info", tiny.store, "--png", "a.png", "--views", "2")
    assert said.code == 0, said.err
    assert "picture    a.png: 2 views\n" in said.err
    with Image.open("a.png") as image:
        width, height = image.size
    assert command("cache", "info", tiny.store, "--png", "b.png", "--views", "2").code == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    shutil.rmtree(tiny.folder / "data")
    said = command("cache", "info", tiny.store, "--png", "c.png", "--views", "2")
    assert said.code == 0, said.err
    assert "features alone, because the images are not at hand" in said.err
    with Image.open("c.png") as image:
        assert image.size[0] < width
        assert image.size[1] == height
    said = command("cache", "info", tiny.store, "--png", "no/such/folder.png")
    assert said.code == 2
    assert "cannot write no/such/folder.png" in said.err
    for name in ("dense", "coarse"):
        command("cache", "rm", tiny.store, "--teacher", name, "--yes")
    said = command("cache", "info", tiny.store, "--png", "d.png")
    assert said.code == 2
    assert "no view that is done" in said.err
