"""How tasks are cut, given out, tried again and ended, with crews that do as the test says."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsmtdf.errors import ConfigError, TeacherError, WorkerError
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.stages.scaleout import SerialCrew, WorkerLost, piece, spread
from rsmtdf.stages.scaleout import crew as crews
from rsmtdf.stages.scaleout.tasks import Tasks
from tests.scaleout import working
from tests.scaleout.working import Done


class Scripted:
    """A crew whose future of a task is what a function of its units says: an outcome, or an exception."""

    name = "scripted"
    deaths = 0
    moved = 0

    def __init__(self, script: Callable[[tuple[int, ...]], Any], *, width: int = 3) -> None:
        self.given: list[tuple[int, ...]] = []
        self.most = 0
        self._script, self._width = script, width
        self.stopped = False

    def slots(self) -> int:
        return self._width

    def submit(self, work: Any, units: tuple[int, ...]) -> Future[Any]:
        self.given.append(units)
        future: Future[Any] = Future()
        outcome = self._script(units)
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
        return future

    def stop(self) -> None:
        self.stopped = True


def done(units: tuple[int, ...], seconds: float = 1.0) -> Done:
    return Done(units, 0, "cpu", seconds)


def run(crew: Any, n: int, **options: Any) -> tuple[list[int], Any]:
    found: list[int] = []
    tally = spread(
        range(n), work=working.note, crew=crew, stop=StopFlag(), on_done=lambda d: found.extend(d.units), **options
    )
    return sorted(found), tally


def test_every_unit_is_done_once_by_this_process(tmp_path: Path) -> None:
    found: list[int] = []
    stop = StopFlag()
    tally = spread(
        [7, 3, 5],
        work=functools.partial(working.note, tmp_path),
        crew=SerialCrew(device="cpu", stop=stop),
        stop=stop,
        on_done=lambda d: found.extend(d.units),
    )
    assert sorted(found) == [3, 5, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["unit.3", "unit.5", "unit.7"]
    assert (tally.retries, tally.deaths) == (0, 0)


def test_an_interruption_of_this_process_is_no_lost_worker(caplog: pytest.LogCaptureFixture) -> None:
    stop = StopFlag()

    def work(units: tuple[int, ...], device: str, flag: StopFlag) -> Done:
        stop.signum = signal.SIGTERM
        flag.check("3 views are kept")
        return done(units)

    with pytest.raises(Interrupted, match="3 views are kept"):
        spread(range(9), work=work, crew=SerialCrew(device="cpu", stop=stop), stop=stop, on_done=print)
    assert caplog.messages == []


def test_a_run_has_one_flag_whichever_thread_asks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2)

    class Slow(StopFlag):
        def __init__(self) -> None:
            together.wait()
            super().__init__()

    monkeypatch.setattr(crews, "StopFlag", Slow)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(crews.told_to_stop, ["one run", "one run"])
    assert one is other


def test_tasks_grow_to_the_length_that_is_aimed_at_and_shrink_towards_the_end() -> None:
    crew = Scripted(lambda units: done(units, seconds=0.5 * len(units)))
    found, _ = run(crew, 2000, target_s=20.0)
    sizes = [len(units) for units in crew.given]
    assert found == list(range(2000))
    assert sizes[0] == 1
    assert max(sizes) == 40  # 20 s at half a second each
    assert sizes[-1] == 1


def test_a_slow_unit_is_a_task_of_its_own() -> None:
    crew = Scripted(lambda units: done(units, seconds=100.0 * len(units)))
    run(crew, 30, target_s=45.0)
    assert {len(units) for units in crew.given} == {1}


@pytest.mark.parametrize("losses", [1, 2, 8])
def test_lost_tasks_are_cut_in_two_until_the_cause_is_alone(losses: int) -> None:
    """However few losses are allowed: what shares a task with the cause is not given up for it."""
    deadly = 500

    def script(units: tuple[int, ...]) -> Any:
        return WorkerLost("it died") if deadly in units else done(units, seconds=0.001)

    crew = Scripted(script)
    found: list[int] = []
    with pytest.raises(WorkerError, match=r"shards 500; the rest is done"):
        spread(
            range(2000),
            work=working.note,
            crew=crew,
            stop=StopFlag(),
            on_done=lambda d: found.extend(d.units),
            losses=losses,
        )
    assert sorted(found) == [u for u in range(2000) if u != deadly]


def test_a_task_that_is_lost_once_is_done_by_another_worker() -> None:
    lost: set[tuple[int, ...]] = set()

    def script(units: tuple[int, ...]) -> Any:
        if 5 in units and not lost:
            lost.add(units)
            return WorkerLost("it died")
        return done(units)

    found, tally = run(Scripted(script), 10)
    assert found == list(range(10))
    assert tally.retries == len(next(iter(lost))[:2])  # one half, or both


def test_where_every_worker_dies_it_ends() -> None:
    crew = Scripted(lambda units: WorkerLost("it died"))
    with pytest.raises(WorkerError, match="no worker stays alive"):
        run(crew, 10_000)
    assert len(crew.given) < 100


def test_an_error_of_the_work_is_not_tried_again() -> None:
    crew = Scripted(lambda units: TeacherError("no weights"))
    with pytest.raises(TeacherError, match="no weights"):
        run(crew, 100)
    assert crew.stopped
    assert len(crew.given) == crew.slots()


def test_units_that_somebody_else_has_are_tried_later_and_not_for_ever() -> None:
    asked: list[tuple[int, ...]] = []

    def script(units: tuple[int, ...]) -> Any:
        if 2 in units:
            asked.append(units)
            if len(asked) < 2:
                return Done(units, 0, "cpu", 0.0, "shard 2 is claimed by process 9")
        return done(units)

    found, tally = run(Scripted(script), 4)
    assert found == [0, 1, 2, 3]
    assert tally.retries == 1
    never = Scripted(lambda units: Done(units, 0, "cpu", 0.0, "shard 2 is claimed by process 9"))
    with pytest.raises(WorkerError, match=r"claimed by process 9\nIt was waited for"):
        run(never, 1, patience_s=0.5)


def test_a_raised_flag_ends_it_and_keeps_what_comes_back() -> None:
    stop, found = StopFlag(), []

    def script(units: tuple[int, ...]) -> Any:
        if 2 in units:
            stop.signum = signal.SIGINT
        return done(units)

    crew = Scripted(script, width=1)
    with pytest.raises(Interrupted) as ended:
        spread(range(50), work=working.note, crew=crew, stop=stop, on_done=lambda d: found.extend(d.units))
    assert ended.value.exit_code == 130
    assert crew.stopped
    assert sorted(found) == [0, 1, 2]


@given(n=st.integers(0, 500), pieces=st.integers(1, 60))
def test_pieces_are_disjoint_and_cover_everything(n: int, pieces: int) -> None:
    parts = [piece(n, index=i, pieces=pieces) for i in range(pieces)]
    assert [u for part in parts for u in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("index", "pieces"), [(8, 8), (-1, 8), (0, 0)])
def test_a_piece_that_does_not_exist_is_refused(index: int, pieces: int) -> None:
    with pytest.raises(ConfigError, match="piece"):
        piece(100, index=index, pieces=pieces)


@given(st.lists(st.integers(0, 1000), unique=True, max_size=200), st.floats(0.001, 200), st.integers(1, 20))
def test_tasks_give_out_everything_once(units: list[int], pace: float, slots: int) -> None:
    tasks, seen = Tasks(units, target_s=45.0), []
    while tasks:
        task = tasks.next(slots=slots, now=0.0)
        seen.extend(task.units)
        tasks.measured(len(task.units), pace * len(task.units))
    assert seen == sorted(units)
