"""Stage 1 spread over processes, a Dask cluster and job arrays, with workers killed: the bits of one process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import sys
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsmtdf.cli import spreading, worker
from rsmtdf.cli.caching import run_cache
from rsmtdf.cli.planning import plan_cache
from rsmtdf.cli.spreading import Scale, fill_over, scale_of
from rsmtdf.cli.worker import fill_task, make_order
from rsmtdf.cli.workspace import load_source
from rsmtdf.errors import StoreMismatch, TeacherError
from rsmtdf.signals import StopFlag
from rsmtdf.stages.scaleout import SerialCrew, clusters, piece, process_crew, spread
from rsmtdf.store.status import state_of
from rsmtdf.store.store import FeatureStore
from tests.cli.test_kills import Command, Server
from tests.scaleout.filling import fill_and_die

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the commands are forked")

SEEDS, WEAK_VIEWS = 6, 150
"""Six strong shards and fifteen weak ones, so that signals and kills meet a store that is half done."""
TEACHERS = ["dense", "coarse"]


@dataclass(frozen=True)
class World:
    """The tiny experiment's folder, with a store that is prepared and one that is filled by one process."""

    server: Server
    folder: Path

    def cache(self, out: str, *more: object) -> Command:
        return self.server.start(
            "cache-features", "--config", "tiny.yaml", "--out", out, "--seeds", SEEDS, "--weak-views", WEAK_VIEWS,
            "--device", "cpu", *more, cwd=self.folder,
        )  # fmt: skip

    def prepared(self, out: str) -> str:
        """A copy of the prepared store."""
        shutil.copytree(self.folder / "init.zarr", self.folder / out)
        return out

    def store(self, out: str) -> FeatureStore:
        return FeatureStore.open(self.folder / out, writable=True)

    def order(self, out: str, **changes: Any) -> Any:
        experiment = load_source(dataset=None, config=self.folder / "tiny.yaml", overrides=()).experiment
        return make_order(
            self.store(out), experiment.model_copy(update=changes), data_root=self.folder / "data", threads=1
        )

    def shards(self, out: str) -> int:
        """How many have been written for the last teacher."""
        files = (self.folder / out / "teachers" / "coarse" / "status").glob("c.*")
        return len([p for p in files if not p.name.endswith(".partial")])

    def content(self, out: str) -> dict[str, bytes]:
        """Every file of a store but the notes on who computed what when."""
        store = self.folder / out
        found = {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}
        return {name: data for name, data in found.items() if not name.startswith("provenance/")}

    def check_same(self, out: str) -> None:
        expected, found = self.content("one.zarr"), self.content(out)
        assert sorted(found) == sorted(expected)
        assert [name for name in expected if found[name] != expected[name]] == []


@pytest.fixture(scope="module")
def server(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(repo, tmp_path_factory.mktemp("logs"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def world(server: Server, cached_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(cached_tiny.folder / "data", folder / "data")
    shutil.copy(cached_tiny.config, folder)
    found = World(server, folder)
    init = found.cache("init.zarr", "--init")
    assert init.wait() == 0, init.said()
    whole = found.cache(found.prepared("one.zarr"))
    assert whole.wait() == 0, whole.said()
    return found


def test_init_prepares_everything_and_computes_nothing(world: World) -> None:
    store, whole = world.store("init.zarr"), world.store("one.zarr")
    assert store.n_views == 20 * SEEDS + 6 * WEAK_VIEWS
    assert sorted(store.teachers) == sorted(TEACHERS)
    assert store.pending_views(TEACHERS) == store.n_views
    assert world.shards("init.zarr") == 0
    for name in TEACHERS:
        np.testing.assert_array_equal(store.teacher(name).mean, whole.teacher(name).mean)
    again = world.cache("init.zarr", "--init", "--json")
    assert again.wait() == 0
    said = again.said()
    assert json.loads(said[said.index("{") :])["pending_views"] == store.n_views
    assert "coarse: channel statistics" not in said, "statistics are measured once"


def test_a_piece_each_for_jobs_that_start_together_on_nothing(world: World) -> None:
    """The first prepares the store, one is killed and started again, and whoever comes last seals."""
    jobs = [world.cache("pieces.zarr", "--shard-range", f"{i}/3") for i in range(3)]
    jobs[1].until(lambda: world.shards("pieces.zarr") >= 1)
    assert jobs[1].end(signal.SIGKILL) == -9
    for i in (0, 2):
        assert jobs[i].wait() == 0, jobs[i].said()
        assert f"piece      {i}/3, other pieces are not finished" in jobs[i].said()
        assert "rsmtdf train" not in jobs[i].said(), "there is nothing to train from yet"
        assert "Traceback" not in jobs[i].said()
    done = set(np.flatnonzero(state_of(world.store("pieces.zarr").status("dense")) > 0) // 64)
    assert {*range(7), *range(14, 21)} <= done
    assert not (world.folder / "pieces.zarr" / "teachers" / "dense" / "status" / "sealed").exists()
    last = world.cache("pieces.zarr", "--shard-range", "1/3")
    assert last.wait() == 0, last.said()
    assert "piece      1/3, the last one: the store is complete" in last.said()
    assert "splits" not in last.said(), "a store that is prepared is not planned again"
    world.check_same("pieces.zarr")


def test_processes_of_which_one_is_killed(world: World, tmp_path: Path) -> None:
    order = world.order(world.prepared("processes.zarr"))
    with process_crew(["cpu", "cpu"]) as crew:
        check_deadly_filling(world, "processes.zarr", crew, order, tmp_path, deaths=1)


def test_a_dask_cluster_whose_workers_are_killed(world: World, tmp_path: Path) -> None:
    order = world.order(world.prepared("dask.zarr"))
    with clusters.local_cluster(2, device="cpu") as crew:
        check_deadly_filling(world, "dask.zarr", crew, order, tmp_path, deaths=3)


def check_deadly_filling(world: World, out: str, crew: Any, order: Any, folder: Path, *, deaths: int) -> None:
    done: list[Any] = []
    tally = spread(
        range(world.store(out).n_shards),
        work=functools.partial(fill_and_die, folder, deaths, order),
        crew=crew,
        stop=StopFlag(),
        on_done=done.append,
        target_s=0.5,
    )
    assert 1 <= tally.deaths <= deaths
    assert tally.retries >= tally.deaths
    # A shard that was committed just before its worker died is in nobody's report, and in no report twice.
    shards = [row.shard for outcome in done for row in outcome.report.ledger]
    assert len(shards) == len(set(shards))
    store = world.store(out)
    assert store.pending_views(TEACHERS) == 0
    store.clean_partials()
    store.seal()
    world.check_same(out)


@pytest.mark.parametrize(
    ("out", "more", "signum", "code"),
    [
        ("stopped.zarr", ["--processes", 2], signal.SIGTERM, 143),
        ("stopped-dask.zarr", ["--processes", 2, "--scheduler", "local"], signal.SIGINT, 130),
    ],
)
def test_a_signal_ends_all_workers_and_the_same_command_goes_on(
    world: World, out: str, more: list[object], signum: signal.Signals, code: int
) -> None:
    command = world.cache(world.prepared(out), *more)
    command.until(lambda: world.shards(out) >= 1)
    assert command.end(signum) == code, command.said()
    assert "Traceback" not in command.said()
    assert "run the same command again to go on" in command.said()
    store = world.store(out)
    assert 0 < store.pending_views(TEACHERS) < store.n_views
    with store.claim(range(store.n_shards)):
        pass  # nobody works on it any more
    last = world.cache(out)
    assert last.wait() == 0, last.said()
    world.check_same(out)


def test_only_what_is_missing_is_computed_by_processes_too(tiny: Any) -> None:
    """More seeds, more labelled tiles and another teacher, at once; then nothing."""
    before = FeatureStore.open(tiny.store)
    third = {**load_source(dataset=None, config=tiny.config, overrides=()).experiment.as_dict()["teachers"][1]}
    third |= {"name": "third", "seed": 2, "fusion_weight": 0.1}
    source = tiny.source("cache.seeds=3", labels="8")
    teachers = (*source.experiment.teachers, type(source.experiment.teachers[0]).model_validate(third))
    experiment = source.experiment.model_copy(update={"teachers": teachers})
    source = type(source)(experiment, source.base)
    reports = []
    for scale in (Scale(processes=2), Scale(processes=1)):
        job = plan_cache(source, root=tiny.folder / "data", out=tiny.store)
        reports.append(run_cache(job, device="cpu", stop=StopFlag(), say=lambda line: None, scale=scale))
    after = FeatureStore.open(tiny.store)
    new = after.n_views - before.n_views
    assert new == 20 + 2 * 5
    assert reports[0]["features"] == {"dense": new, "coarse": new, "third": after.n_views}
    assert reports[0]["spread"]["deaths"] == 0
    assert sum(w["views"] for w in reports[0]["spread"]["workers"].values()) == after.n_views
    assert after.pending_views([*TEACHERS, "third"]) == 0
    assert reports[1]["views"] == 0


def test_a_teacher_that_cannot_be_loaded_ends_it_at_once(world: World, tmp_path: Path) -> None:
    order = world.order(world.prepared("weightless.zarr"))
    record = json.loads(order.experiment)
    record["teachers"][0]["weights"] = str(tmp_path / "gone.safetensors")
    broken = type(order)(**{**order.__dict__, "experiment": json.dumps(record)})
    asked: list[tuple[int, ...]] = []

    def work(units: tuple[int, ...], device: str, stop: StopFlag) -> Any:
        asked.append(units)
        return fill_task(broken, units, device, stop)

    stop = StopFlag()
    with pytest.raises(TeacherError, match=r"gone\.safetensors"):
        spread(range(9), work=work, crew=SerialCrew(device="cpu", stop=stop), stop=stop, on_done=asked.append)
    assert asked == [(0,)]


def test_another_teacher_of_the_same_name_is_refused_by_the_worker(world: World) -> None:
    order = world.order(world.prepared("other.zarr"))
    record = json.loads(order.experiment)
    record["teachers"][0]["seed"] = 99
    broken = type(order)(**{**order.__dict__, "experiment": json.dumps(record)})
    with pytest.raises(StoreMismatch, match="dense"):
        fill_task(broken, (0,), "cpu", StopFlag())


def test_a_shard_that_somebody_else_fills_is_handed_back(world: World) -> None:
    order = world.order(world.prepared("taken.zarr"))
    with world.store("taken.zarr").claim([3]):
        outcome = fill_task(order, (2, 3), "cpu", StopFlag())
    assert outcome.report.views == 0
    assert "shard 3 of feature store" in outcome.refused
    assert fill_task(order, (2, 3), "cpu", StopFlag()).report.views == 40


def test_the_time_to_open_everything_is_no_waiting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    order = world.order(world.prepared("slow.zarr"))
    clock = [0.0]

    def slowly(order: Any, device: str) -> Any:
        clock[0] += 1000.0
        return desks(order, device)

    desks = worker.open_desk
    monkeypatch.setattr(worker, "open_desk", slowly)
    monkeypatch.setattr(worker, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    with world.store("slow.zarr").claim([3]):
        outcome = fill_task(order, (2, 3), "cpu", StopFlag())
    assert outcome.refused
    assert outcome.seconds == 0.0


def test_a_piece_waits_for_a_shard_that_somebody_else_fills(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store = world.store(world.prepared("waits.zarr"))
    experiment = load_source(dataset=None, config=world.folder / "tiny.yaml", overrides=()).experiment
    refused: list[str] = []
    taken = contextlib.ExitStack()
    taken.enter_context(world.store("waits.zarr").claim([3]))

    def fill(*args: Any) -> Any:
        outcome = fill_task(*args)
        if outcome.refused:
            refused.append(outcome.refused)
            taken.close()
        return outcome

    monkeypatch.setattr(spreading, "fill_task", fill)
    scale = Scale(shard_range=(0, 4))
    options = {"data_root": world.folder / "data", "device": "cpu", "stop": StopFlag(), "say": print}
    with taken:
        filled = fill_over(store, experiment, scale=scale, **options)
    assert ["shard 3 of feature store" in said for said in refused] == [True]
    assert filled.report.views == sum(len(store.rows_of_shard(k)) for k in piece(store.n_shards, index=0, pieces=4))
    assert filled.facts == {"shard_range": "0/4", "is_last_piece": False}


def test_the_bar_of_a_piece_counts_what_is_missing(world: World) -> None:
    store = world.store(world.prepared("bar.zarr"))
    mine = list(piece(store.n_shards, index=1, pieces=4))
    fill_task(world.order("bar.zarr"), tuple(mine[:2]), "cpu", StopFlag())
    shards, views = spreading._shards(store, TEACHERS, Scale(shard_range=(1, 4)))
    assert shards == mine[2:]
    assert views == sum(len(store.rows_of_shard(k)) for k in mine[2:])


def test_a_worker_that_lives_longer_opens_everything_anew_for_the_next_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and weights may have changed meanwhile; and the device need not hold the teachers of both runs."""
    out = world.prepared("anew.zarr")
    first, second = world.order(out), world.order(out)
    assert worker.open_desk(first, "cpu") is worker.open_desk(first, "cpu")
    old = weakref.ref(worker.open_desk(first, "cpu"))
    build = worker.build_teacher
    was_there: list[bool] = []

    def build_alone(*args: Any, **options: Any) -> Any:
        was_there.append(old() is not None)
        return build(*args, **options)

    monkeypatch.setattr(worker, "build_teacher", build_alone)
    worker.open_desk(second, "cpu")
    assert was_there == [False, False]


@pytest.mark.parametrize("what", ["mean", "std", "weights"])
def test_a_store_made_again_with_another_teacher_has_other_contents(world: World, what: str) -> None:
    store = world.store("init.zarr")
    facts = {"identity": store.identity, "n_rows": store.n_rows, "segments": store.segments, "pixels": store.pixels}
    dense = store.teacher("dense")
    if what == "weights":
        other = dataclasses.replace(dense, spec=dataclasses.replace(dense.spec, weights_sha256="0" * 64))
    else:
        other = dataclasses.replace(dense, **{what: getattr(dense, what) + 1})
    same = types.SimpleNamespace(**facts, teachers=dict(store.teachers))
    changed = types.SimpleNamespace(**facts, teachers={**store.teachers, "dense": other})
    assert worker._contents(same) == worker._contents(store)
    assert worker._contents(changed) != worker._contents(store)


def test_the_documented_file_for_slurm_is_one(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("dask_jobqueue")
    fake.SLURMCluster = object
    monkeypatch.setitem(sys.modules, "dask_jobqueue", fake)
    file = str(repo / "docs" / "slurm.yaml")
    scale = scale_of(devices=None, processes=None, scheduler=file, shard_range=None, init=False)
    assert (scale.cluster.kind, scale.cluster.jobs, scale.cluster.device) == ("SLURMCluster", (1, 16), "cuda:0")
    assert scale.cluster.options["walltime"] == "04:00:00", "unquoted, YAML would make a number of it"
    assert scale.cluster.options["worker_extra_args"] == ["--memory-limit", "0"], "docs/scaling.md says why"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard-range", "8/8"], "pieces are numbered from 0, here 0/8 to 7/8"),
        (["--shard-range", "1-8"], "should read i/n"),
        (["--devices", "cpu", "--processes", "2"], "goes with neither"),
        (["--processes", "0"], "at least 1"),
        (["--processes", "2", "--scheduler", "cuda"], "has its own workers"),
        (["--init", "--processes", "2"], "--init prepares the store and computes nothing"),
        (["--scheduler", "slurm"], "none of: an address"),
        (["--scheduler", "tcp://127.0.0.1:1"], "no Dask scheduler answers at tcp://127.0.0.1:1"),
        (["--scheduler", "bad.yaml"], "kind: Field required"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    cached_tiny: Any, command: Any, here: Path, options: list[str], message: str
) -> None:
    (here / "bad.yaml").write_text("jobs: 4\n")
    said = command(
        "cache-features", "--config", cached_tiny.config, "--out", cached_tiny.store, "--device", "cpu", *options
    )
    assert said.code == 2
    assert message in said.err
