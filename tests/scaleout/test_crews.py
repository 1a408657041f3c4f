"""Crews that are real: processes that are killed and stopped, and a Dask cluster of them."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import distributed
import pytest

from rsmtdf.errors import ConfigError, TeacherError, WorkerError
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.stages.scaleout import clusters, process_crew, processes, spread
from tests.scaleout import working

LIMIT_S = 120.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[distributed.LocalCluster]:
    """One for all tests of this file: workers take seconds to start."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, processes=True, memory_limit=0, dashboard_address=":0"
    ) as found:
        yield found


@pytest.fixture(params=["processes", "dask"])
def crew(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "processes":
        with process_crew(["cpu", "cpu"], grace_s=3.0) as found:
            yield found
    else:
        address = request.getfixturevalue("cluster").scheduler_address
        with clusters.running_scheduler(address, device="cpu") as found:
            yield found


def given_to(crew: Any, work: Callable[..., Any], units: range, **options: Any) -> tuple[list[Any], Any]:
    found: list[Any] = []
    tally = spread(units, work=work, crew=crew, stop=options.pop("stop", StopFlag()), on_done=found.append, **options)
    return found, tally


def units_of(found: list[Any]) -> list[int]:
    return sorted(u for outcome in found for u in outcome.units)


def test_all_workers_do_all_units_once(crew: Any, tmp_path: Path) -> None:
    found, tally = given_to(crew, functools.partial(working.note, tmp_path), range(200))
    assert units_of(found) == list(range(200))
    assert {outcome.device for outcome in found} == {"cpu"}
    assert os.getpid() not in {outcome.worker for outcome in found}
    assert (tally.deaths, tally.retries) == (0, 0)


def test_a_worker_that_is_killed_is_replaced_and_its_task_done(crew: Any, tmp_path: Path) -> None:
    found, tally = given_to(crew, functools.partial(working.die_once, tmp_path, 7), range(40))
    assert set(units_of(found)) == set(range(40))
    assert tally.deaths == 1
    assert tally.retries >= 1


def test_an_error_comes_once_and_as_it_is(crew: Any, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="no weights file here"):
        given_to(crew, functools.partial(working.fail, tmp_path), range(500))
    assert 1 <= len(list(tmp_path.glob("fail.*"))) <= crew.slots()


def test_all_is_over_within_seconds_of_a_signal(crew: Any, tmp_path: Path) -> None:
    stop = StopFlag()

    def raise_it() -> None:
        wait_for(lambda: any(tmp_path.glob("begun.*")))
        stop.signum = signal.SIGTERM

    thread = threading.Thread(target=raise_it)
    thread.start()
    with pytest.raises(Interrupted) as ended:
        given_to(crew, functools.partial(working.linger, tmp_path), range(20), stop=stop, grace_s=LIMIT_S)
    thread.join()
    # With a grace this long it would only end by the workers' being told.
    assert ended.value.exit_code == 143


def test_a_process_that_does_not_listen_ends_itself(tmp_path: Path) -> None:
    stop = StopFlag()
    threading.Thread(
        target=lambda: (wait_for(lambda: any(tmp_path.glob("begun.*"))), setattr(stop, "signum", signal.SIGINT))
    ).start()
    with pytest.raises(Interrupted), process_crew(["cpu"], grace_s=0.5) as crew:
        given_to(crew, functools.partial(working.linger_deaf, tmp_path), range(3), stop=stop, grace_s=0.5)


def test_a_unit_that_kills_every_process_is_named_and_the_rest_is_done(tmp_path: Path) -> None:
    with process_crew(["cpu", "cpu"], grace_s=3.0) as crew, pytest.raises(WorkerError, match="shards 3; the rest"):
        given_to(crew, functools.partial(working.die_always, tmp_path, 3), range(12), losses=2)
    assert {p.name for p in tmp_path.iterdir()} == {f"unit.{u}" for u in range(12) if u != 3}


def test_the_thread_that_reports_a_death_leaves_the_pool_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It may hold the pool's lock, which shutting down and the end of the last reference take as well."""
    heard_in: list[threading.Thread] = []
    count, shut = processes.ProcessCrew._count_death, ProcessPoolExecutor.shutdown

    def shutdown(pool: ProcessPoolExecutor, *args: Any, **options: Any) -> None:
        assert threading.current_thread() is threading.main_thread()
        shut(pool, *args, **options)

    def count_death(crew: Any, desk: Any) -> None:
        pool = weakref.ref(desk._pool)
        count(crew, desk)
        assert pool() is not None
        heard_in.append(threading.current_thread())

    monkeypatch.setattr(ProcessPoolExecutor, "shutdown", shutdown)
    monkeypatch.setattr(processes.ProcessCrew, "_count_death", count_death)
    with process_crew(["cpu"], grace_s=3.0) as crew:
        found, _ = given_to(crew, functools.partial(working.die_once, tmp_path, 2), range(5))
    assert set(units_of(found)) == set(range(5))
    assert [thread is threading.main_thread() for thread in heard_in] == [False]


def test_an_error_that_cannot_be_sent_comes_in_words(crew: Any, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="Stubborn: the disk is on fire"):
        given_to(crew, working.fail_stubbornly, range(3))


def test_a_scheduler_outlives_its_client(cluster: distributed.LocalCluster, tmp_path: Path) -> None:
    for turn in ("first", "second"):
        (tmp_path / turn).mkdir()
        with clusters.running_scheduler(cluster.scheduler_address, device="cpu") as crew:
            found, _ = given_to(crew, functools.partial(working.note, tmp_path / turn), range(5))
        assert units_of(found) == list(range(5))


def test_a_scheduler_that_nobody_runs_is_said_to_be_none() -> None:
    with (
        pytest.raises(WorkerError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1 within 1 s"),
        clusters.running_scheduler("tcp://127.0.0.1:1", device="cpu", timeout_s=1.0),
    ):
        pass


class FakeJobs:
    """Stands in for a batch system's cluster: records what it is asked for, and has workers in this process."""

    def __init__(self, **options: Any) -> None:
        if "queue" not in options:
            raise TypeError("missing 1 required argument: 'queue'")
        self.options, self.asked = options, {}
        self._real = distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0", resources={"GPU": 2}
        )
        FakeJobs.last = self

    def scale(self, **asked: Any) -> None:
        self.asked["scale"] = asked

    def adapt(self, **asked: Any) -> None:
        self.asked["adapt"] = asked

    def close(self) -> None:
        self._real.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_jobs_of_a_batch_system_are_asked_for_as_the_file_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = types.ModuleType("dask_jobqueue")
    fake.SLURMCluster = FakeJobs
    monkeypatch.setitem(sys.modules, "dask_jobqueue", fake)
    options = {"queue": "gpu", "cores": 8}
    for jobs, asked in ((4, {"scale": {"jobs": 4}}), ((1, 9), {"adapt": {"minimum_jobs": 1, "maximum_jobs": 9}})):
        with clusters.job_cluster(
            "SLURMCluster", options=options, jobs=jobs, device="cuda:0", resources={"GPU": 1}
        ) as crew:
            found, _ = given_to(crew, functools.partial(working.note, tmp_path), range(3))
        assert {outcome.device for outcome in found} == {"cuda:0"}
        assert FakeJobs.last.asked == asked
        assert FakeJobs.last.options == options
    with (
        pytest.raises(ConfigError, match="missing 1 required argument"),
        clusters.job_cluster("SLURMCluster", options={}, jobs=1, device="cpu"),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="no 'SLRMCluster'; it has: SLURMCluster"),
        clusters.job_cluster("SLRMCluster", options={}, jobs=1, device="cpu"),
    ):
        pass


def test_a_shared_schedulers_other_workers_are_not_ours(cluster: distributed.LocalCluster) -> None:
    with clusters.running_scheduler(cluster.scheduler_address, device="cpu") as crew:
        crew.slots()
        assert crew.most_workers == 2
        for tasks, deaths in (([], 0), (["somebody-elses-1"], 0), ([f"rsmtdf-{crew._run}-1", "somebody-elses-1"], 1)):
            crew._hear((0.0, {"action": "remove-worker", "worker": "tcp://a:1", "processing-tasks": tasks}))
            assert crew.deaths == deaths
        assert crew.moved == 1


def test_packages_that_are_not_there_are_named_with_a_way_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("dask_cuda", "dask_jobqueue"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="pip install dask-cuda; --devices all"), clusters.cuda_cluster():
        pass
    with (
        pytest.raises(ConfigError, match="pip install dask-jobqueue; --shard-range"),
        clusters.job_cluster("SLURMCluster", options={}, jobs=1, device="cpu"),
    ):
        pass


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
