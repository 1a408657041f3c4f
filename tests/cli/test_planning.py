"""`rsmtdf plan` and `--dry-run`: what they promise is what a run then does, and what a run refuses they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rsmtdf.cli import training_pace
from rsmtdf.cli.caching import prepare_store
from rsmtdf.cli.pacing import pace_of, priced
from rsmtdf.cli.planning import CacheJob, plan_cache, student_grid
from rsmtdf.cli.workspace import data_root, open_workspace
from rsmtdf.signals import StopFlag
from rsmtdf.specs import FeatureSpec, Teacher
from rsmtdf.stages import cache as stage
from rsmtdf.store.store import FeatureStore
from rsmtdf.teachers.registry import build_teacher

CPU = torch.device("cpu")


def files(folder: Path) -> set[Path]:
    return {p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name != "locks"}


def job_of(tiny: Any, *overrides: str, out: Path | None = None) -> CacheJob:
    source = tiny.source(*overrides)
    return plan_cache(source, root=data_root(source, root=None), out=out or tiny.store)


# Time


class SlowTeacher:
    """A teacher of the tiny world that takes `seconds` of the watch for each view."""

    def __init__(self, inner: Teacher, watch: Watch, *, seconds: float) -> None:
        self._inner, self._watch, self._seconds = inner, watch, seconds

    @property
    def spec(self) -> FeatureSpec:
        return self._inner.spec

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self._watch.seconds += self._seconds * len(pixels)
        return self._inner(pixels)


class Watch:
    """Time that only teachers make pass, so that no other load on the machine changes the result."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> tuple[float, float]:
        return self.seconds, self.seconds


def slow_teachers(job: CacheJob, watch: Watch) -> dict[str, SlowTeacher]:
    grid = student_grid(job.workspace.experiment)
    built = {name: build_teacher(source, student_grid=grid, device=CPU) for name, source in job.sources.items()}
    return {name: SlowTeacher(t, watch, seconds=0.02 * n) for n, (name, t) in enumerate(built.items(), start=1)}


def planned_and_taken(job: CacheJob) -> tuple[float, float]:
    """Seconds of the plan, and those that the teachers really took in the run."""
    watch = Watch()
    teachers = slow_teachers(job, watch)
    due = {name: t for name, t in teachers.items() if job.plan.new_features[name]}
    estimate = priced(job, pace_of(job, due, clock=watch)).plan.estimate
    assert estimate is not None
    watch.seconds = 0.0
    store, maker = prepare_store(job, teachers, stop=StopFlag())
    report = stage.fill_store(store, teachers=teachers, maker=maker, batch=16, workers=2, stop=StopFlag())
    assert report.views == job.plan.new_views
    return estimate.seconds, watch.seconds


def test_a_plan_is_within_a_fifth_of_what_the_teachers_then_take(tiny: Any) -> None:
    fresh = tiny.folder / "fresh.zarr"
    planned, taken = planned_and_taken(job_of(tiny, "cache.seeds=4", out=fresh))
    assert taken > 100 * (0.02 + 0.04), "statistics are measured besides"
    assert planned == pytest.approx(taken, rel=0.2)
    more, paid = planned_and_taken(job_of(tiny, "cache.seeds=9", out=fresh))
    assert paid == pytest.approx(5 * 20 * 0.06), "only the new seeds"
    assert more == pytest.approx(paid, rel=0.2)


def test_a_plan_for_one_more_teacher_prices_that_one(tiny: Any, withdraw: Callable[..., None]) -> None:
    """The store has both; one is withdrawn from its first shard."""
    withdraw(FeatureStore.open(tiny.store, writable=True), 0, "coarse")
    planned, taken = planned_and_taken(job_of(tiny))
    assert taken == pytest.approx(20 * 0.04)
    assert planned == pytest.approx(taken, rel=0.2)


# Files and bytes


def test_the_files_and_bytes_of_a_plan_are_those_written(tiny: Any) -> None:
    before = files(tiny.store)
    plan = job_of(tiny, "cache.seeds=5").plan
    assert tiny.cache("cache.seeds=5")["bytes_written"] > 0
    new = {p for p in files(tiny.store) - before if p.parts[:2] != ("provenance", "twins")}
    of = {name: {p for p in new if name in p.parts} for name in ("dense", "coarse", "views")}
    assert plan.new_files == {name: len(found) for name, found in of.items()}
    assert plan.new_files["dense"] == 3 * 4, "three seeds, a shard each"
    payload = sum((tiny.store / p).stat().st_size for p in new if {"codes", "token_scale"} & set(p.parts))
    # A shard of 20 views has the place of 64 in its index, 16 bytes each, and 4 of checksum a view.
    overhead = 12 * (64 * 16 + 4) + 2 * 2 * 60 * 4
    assert 0 <= payload - plan.new_bytes <= overhead


def test_a_plan_leaves_nothing_behind(tiny: Any, command: Any) -> None:
    before = files(tiny.folder)
    said = command("plan", "--config", tiny.config, "--out", tiny.folder / "new.zarr", "--json")
    assert said.code == 0, said.err
    assert files(tiny.folder) == before
    result = json.loads(said.out)
    assert result["estimate"]["seconds"] > 0
    assert set(result["pace"]["teachers"]) == {"dense", "coarse"}
    assert result["training"]["step_seconds"] > 0
    assert result["training"]["peak_bytes"] > 10**6
    assert set(result["codec_bytes"]) == {"fp16", "int8", "int4"}
    assert result["outlook"]["read_bytes_per_second"] > 0


@pytest.mark.parametrize("part", ["build_student", "make_ema", "_random_batch", "train_step"])
def test_a_student_that_does_not_fit_has_no_pace(tiny: Any, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def full(*given: object, **more: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(training_pace, part, full)
    job = job_of(tiny)
    assert training_pace.measure_training(job.workspace.experiment, job.specs, device=torch.device("cpu")) is None


def test_without_calibration_no_time_is_guessed(tiny: Any, command: Any) -> None:
    said = command("plan", "--config", tiny.config, "--out", "new.zarr", "--no-calibrate")
    assert (said.code, said.err) == (0, "")
    assert "time       not measured" in said.out
    assert "time and memory not measured" in said.out
    assert "<- chosen" in said.out


def test_a_plan_needs_no_weights(tiny: Any, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = yaml.safe_load(tiny.config.read_text())
    settings["teachers"] = [{"name": "dinov2_vits14", "overrides": {"depth": 1}}]
    tiny.config.write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("HF_HOME", str(tiny.folder / "empty"))
    said = command("plan", "--config", tiny.config, "--out", "new.zarr", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["pace"]["teachers"]["dinov2_vits14"]["wall"] > 0


# What a run refuses


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--codec", "fp16"], "codec: expected 'fp16', found 'int8'"),
        (["--set", "teachers.1.input_px=14"], "input_px"),
        (["--set", "teachers.0.layer=1"], "layer: expected 1, found 3"),
        (["--set", "teachers.0.weights=gone.safetensors"], "no weights file at gone.safetensors"),
        (["--set", "views.hflip_p=0.25"], "hflip_p"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(tiny: Any, command: Any, option: list[str], message: str) -> None:
    arguments = ("cache-features", "--config", tiny.config, "--out", tiny.store, *option)
    dry, real = command(*arguments, "--dry-run"), command(*arguments)
    assert (dry.code, real.code) == (2, 2)
    for said in (dry.err, real.err):
        assert message in said


def test_a_dry_run_refuses_a_pool_of_broken_images(tiny: Any, command: Any) -> None:
    shutil.rmtree(tiny.store)
    for image in (tiny.folder / "data" / "Train").rglob("images_png/*.png"):
        good = image.read_bytes()
        image.write_bytes(good[:100] + b"\0" * (len(good) - 112) + good[-12:])
    for more in ([], ["--dry-run"], ["--dry-run", "--no-calibrate"]):
        said = command("cache-features", "--config", tiny.config, "--out", tiny.store, *more)
        assert said.code == 2
        assert "none of the 20 tiles can be read" in said.err
        assert not tiny.store.exists()


def test_a_dry_run_refuses_a_store_whose_images_are_gone(tiny: Any, command: Any) -> None:
    scene = sorted((tiny.folder / "data" / "Train").rglob("images_png/*.png"))[0]
    listed = tiny.folder / "data" / "lists" / "train.txt"
    kept = [line for line in listed.read_text().splitlines() if scene.stem not in line]
    assert len(kept) < 20
    listed.write_text("\n".join(kept))
    scene.unlink()
    for more in ([], ["--dry-run", "--no-calibrate"]):
        said = command("cache-features", "--config", tiny.config, "--out", tiny.store, *more)
        assert said.code == 2
        assert "that are not in the data set" in said.err


# A part of the pool


def test_a_part_of_the_pool_is_keyed_nested_and_leaves_labels_alone(tiny: Any) -> None:
    def drawn(n: int | None) -> tuple[set[str], tuple[str, ...]]:
        source = tiny.source(*([] if n is None else [f"cache.pool_tiles={n}"]))
        workspace = open_workspace(source, root=data_root(source, root=None))
        return set(workspace.pool), workspace.labelled

    whole, labelled = drawn(None)
    few, many = drawn(7)[0], drawn(12)[0]
    assert (len(few), len(many), len(whole)) == (7, 12, 20)
    assert few < many < whole
    assert drawn(7) == (few, labelled)
    assert drawn(10**6) == (whole, labelled)


def test_training_draws_the_part_that_was_cached(tiny: Any, command: Any) -> None:
    out = tiny.folder / "part.zarr"
    said = command("cache-features", "--config", tiny.config, "--out", out, "--pool", 8, "--json")
    assert said.code == 0, said.err
    store = FeatureStore.open(out)
    strong = {store.tile_ids[int(i)] for i in store.column("tile")[store.rows(stream="strong")]}
    job = job_of(tiny, "cache.pool_tiles=8", out=out)
    assert strong == set(job.workspace.pool)
    assert (job.plan.pool_tiles, job.plan.new_views) == (8, 0)
    assert store.experiment["config"]["cache"]["pool_tiles"] == 8
    run = tiny.folder / "run"
    said = command("train", "--cache", out, "--out", run, "--device", "cpu", "--budget", "2-steps", "--json")
    assert said.code == 0, said.err
    assert "6 labelled of 8 tiles" in said.err


# Failures that are allowed


def test_max_failures_is_an_option(tiny: Any, command: Any) -> None:
    victim = sorted((tiny.folder / "data" / "Train").rglob("images_png/*.png"))[0]
    good = victim.read_bytes()
    victim.write_bytes(good[: len(good) // 2] + b"\0" * 400 + good[len(good) // 2 + 400 :])
    out = tiny.folder / "new.zarr"
    arguments = ("cache-features", "--config", tiny.config, "--out", out, "--json")
    first = command(*arguments)
    assert first.code == 1
    n = len(json.loads(first.out)["unreadable_tiles"])
    assert n > 0
    assert command(*arguments, "--max-failures", n).code == 0
    assert command(*arguments, "--max-failures", n - 1).code == 1
