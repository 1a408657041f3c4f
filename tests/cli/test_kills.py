"""Both stages through the command line, killed, stopped and started twice: nothing lost, nothing wrong, no litter."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsmtdf.learning.run import RunFolder
from rsmtdf.store.store import FeatureStore

SERVER = Path(__file__).with_name("command_server.py")
STEPS = 24
SEEDS = 6
"""Six strong shards and a weak one, so that kills meet a store that is half done."""
LIMIT_S = 120.0

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the commands are forked")


class Server:
    """Starts `rsmtdf` commands; see command_server.py."""

    def __init__(self, repo: Path, logs: Path) -> None:
        self._logs, self._n = logs, 0
        self._answers: list[tuple[int, str, str]] = []
        self._started: list[Command] = []
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            # One thread each: the same sums in the same order, however many cores there are.
            env={**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"},
        )

    def start(self, *args: object, cwd: Path) -> Command:
        self._n += 1
        log = self._logs / f"{self._n}.log"
        job = {"n": self._n, "args": [str(a) for a in args], "cwd": str(cwd), "log": str(log)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._started.append(Command(self, self._n, int(self.answer(self._n, "started")), log))
        return self._started[-1]

    def answer(self, n: int, word: str) -> str:
        """The next answer of that kind about command `n`; others are kept for later."""
        while True:
            for k, (of, kind, rest) in enumerate(self._answers):
                if of == n and kind == word:
                    del self._answers[k]
                    return rest
            line = self._process.stdout.readline()
            assert line, "the command server has ended"
            of, kind, rest = line.split()
            self._answers.append((int(of), kind, rest))

    def close(self) -> None:
        self._process.kill()
        for command in self._started:
            if not command.waited_for:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(command.pid, signal.SIGKILL)
        self._process.communicate()  # which also closes the pipes


@dataclass
class Command:
    """One running `rsmtdf` process."""

    server: Server
    n: int
    pid: int
    log: Path
    waited_for: bool = False

    def wait(self) -> int:
        """The exit code; negative for a signal."""
        self.waited_for = True
        return int(self.server.answer(self.n, "ended"))

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, condition: Callable[[], bool]) -> Command:
        """Waits for a condition that holds before the process ends."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.runs(), f"it ended before what the test waits for:\n{self.said()}"
            assert time.monotonic() < deadline, f"what the test waits for has not come:\n{self.said()}"
            time.sleep(0.001)
        return self

    def end(self, signum: signal.Signals) -> int:
        os.kill(self.pid, signum)
        return self.wait()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Stands still while inside."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def runs(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture(scope="module")
def server(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(repo, tmp_path_factory.mktemp("logs"))
    yield found
    found.close()


# Stage 2


@pytest.fixture(scope="module")
def train(server: Server, cached_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Command]:
    """Starts a training of `STEPS` steps into `out`, or goes on with it."""
    folder = tmp_path_factory.mktemp("runs")

    def start(out: Path, *more: object) -> Command:
        new = [] if "--resume" in more else ["--set", f"train.steps={STEPS}"]
        return server.start(
            "train", "--cache", cached_tiny.store, "--out", out, "--device", "cpu", *new, *more, cwd=folder
        )

    return start


@pytest.fixture(scope="module")
def whole_run(train: Callable[..., Command], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    command = train(folder)
    assert command.wait() == 0, command.said()
    return RunFolder.open(folder)


def lines(run: Path, kind: str = "") -> int:
    """How many records there are (of a kind), as whole lines."""
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return 0
    return sum(line.endswith("\n") and f'"{kind}' in line for line in text.splitlines(keepends=True))


def litter(folder: Path) -> list[str]:
    return [str(p) for p in folder.parent.rglob("*.partial")]


def check_same_run(found: Path, expected: RunFolder) -> None:
    for name in ("last", "best"):
        file = f"checkpoints/{name}.safetensors"
        assert (found / file).read_bytes() == (expected.path / file).read_bytes(), f"{name} has other bits"
    assert (found / "metrics.jsonl").read_text() == expected.metrics.read_text()
    assert RunFolder.open(found).state()["state"] == "finished"
    assert litter(found) == []


def test_a_training_killed_three_times_ends_in_the_same_bits(
    train: Callable[..., Command], whole_run: RunFolder, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    # Before the first checkpoint: what was recorded until then is recorded once more.
    assert train(out).until(lambda: lines(out) >= 2).end(signal.SIGKILL) == -9
    assert not (out / "checkpoints" / "last.safetensors").exists()
    # Between the record of a validation and the checkpoint that belongs to it.
    assert train(out, "--resume").until(lambda: lines(out, "val") >= 2).end(signal.SIGKILL) == -9
    # While a checkpoint is being written; and as such a kill leaves it when it comes at the worst moment.
    writing = train(out, "--resume").until(lambda: bool(litter(out)) and lines(out, "val") >= 4)
    assert writing.end(signal.SIGKILL) == -9
    for name in ("checkpoints/last.safetensors", "checkpoints/best.safetensors", "run.json"):
        (out / f"{name}.0123456789abcdef0123456789abcdef.partial").write_bytes(b"half a fi")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    last = train(out, "--resume")
    assert last.wait() == 0, last.said()
    check_same_run(out, whole_run)


def test_a_stopped_training_says_how_to_go_on_and_does(
    train: Callable[..., Command], whole_run: RunFolder, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    more: list[str] = []
    for signum, code, record in ((signal.SIGTERM, 143, 3), (signal.SIGINT, 130, 11)):
        command = train(out, *more).until(lambda n=record: lines(out) >= n)
        assert command.end(signum) == code, command.said()
        state = RunFolder.open(out).state()
        assert state["state"] == "interrupted"
        message = command.said().splitlines()[-1]
        assert re.fullmatch(rf"stopped at step {state['step']} of {STEPS}; .*--out {out} --resume.*", message)
        assert "Traceback" not in command.said()
        more = ["--resume"]
    last = train(out, "--resume")
    assert last.wait() == 0, last.said()
    check_same_run(out, whole_run)


def test_a_run_that_ran_out_of_patience_does_not_go_on(train: Callable[..., Command], tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["train.patience=1", "train.validate_every=2", "train.backbone_lr=1.0e-15"]
    command = train(out, *(word for setting in settings for word in ("--set", setting)))
    assert command.wait() == 0, command.said()
    before = {name: (out / name).read_bytes() for name in ("metrics.jsonl", "checkpoints/last.safetensors")}
    assert lines(out, "val") == 2
    again = train(out, "--resume")
    assert again.wait() == 0, again.said()
    assert {name: (out / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_as_one_process(
    train: Callable[..., Command], cached_tiny: Any, repo: Path, tmp_path: Path
) -> None:
    settings = ["--set", "train.steps=8", "--set", "train.micro_batch=2"]
    alone = train(tmp_path / "one", *settings)
    assert alone.wait() == 0, alone.said()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rsmtdf"]
    command = ["train", "--cache", str(cached_tiny.store), "--out", str(tmp_path / "two"), "--device", "cpu", "--json"]
    done = subprocess.run(
        [*launcher, *command, *settings],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 8, "one result, of the first rank"
    one, two = (RunFolder.open(tmp_path / name) for name in ("one", "two"))
    assert [(r["kind"], r["step"]) for r in two.records()] == [(r["kind"], r["step"]) for r in one.records()]
    for a, b in zip(one.records(), two.records(), strict=True):
        if a["kind"] == "train":
            assert a["labelled_pixels"] == b["labelled_pixels"]
            for term in ("loss", "loss_x", "loss_u", "distill"):
                np.testing.assert_allclose(b[term], a[term], rtol=1e-4, err_msg=f"{term} of step {a['step']}")
    assert files(two.path) == files(one.path), "only one rank writes"
    assert two.state()["state"] == "finished"


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# Stage 1


@dataclass(frozen=True)
class World:
    """The tiny experiment's folder, where any number of stores may be made."""

    server: Server
    folder: Path

    def cache(self, out: str) -> Command:
        return self.server.start(
            "cache-features", "--config", "tiny.yaml", "--out", out, "--seeds", SEEDS, "--device", "cpu",
            cwd=self.folder,
        )  # fmt: skip

    def shards(self, out: str, what: str) -> int:
        """How many shards of an array have been written."""
        return len([p for p in (self.folder / out / what).glob("c*") if not p.name.endswith(".partial")])

    def content(self, out: str) -> dict[str, bytes]:
        """Every file of a store but the notes on who computed what when, and no other file beside it."""
        store = self.folder / out
        found = {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}
        return {name: data for name, data in found.items() if not name.startswith("provenance/")}


@pytest.fixture(scope="module")
def world(server: Server, cached_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(cached_tiny.folder / "data", folder / "data")
    shutil.copy(cached_tiny.config, folder)
    found = World(server, folder)
    command = found.cache("whole.zarr")
    assert command.wait() == 0, command.said()
    return found


def check_same_store(world: World, out: str) -> None:
    found, expected = world.content(out), world.content("whole.zarr")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert FeatureStore.open(world.folder / out).info()["complete"]
    assert [p.name for p in world.folder.rglob(f"{out}*") if p.name != out] == []
    assert litter(world.folder / out) == []


MOMENTS: dict[str, Callable[[World, str], bool]] = {
    "created": lambda world, out: (world.folder / out / "zarr.json").exists(),
    "first shard": lambda world, out: world.shards(out, "teachers/dense/codes") >= 1,
    "half": lambda world, out: world.shards(out, "teachers/coarse/status") >= 4,
}


def test_caching_killed_three_times_ends_in_the_same_bits(world: World) -> None:
    out = "killed.zarr"
    for reached in MOMENTS.values():
        command = world.cache(out).until(lambda reached=reached: reached(world, out))
        assert command.end(signal.SIGKILL) == -9
    # As a kill leaves them that comes while a file is written: of features, of status words, of metadata.
    for name in ("teachers/dense/codes/c.6.0.0", "teachers/dense/status/c.6", "views/status/c.6", "zarr.json"):
        (world.folder / out / f"{name}.0123456789abcdef0123456789abcdef.partial").write_bytes(b"half a fi")
    last = world.cache(out)
    assert last.wait() == 0, last.said()
    check_same_store(world, out)


def test_stopped_caching_goes_on_with_the_same_command(world: World) -> None:
    out = "stopped.zarr"
    for signum, code, moment in ((signal.SIGTERM, 143, "first shard"), (signal.SIGINT, 130, "half")):
        command = world.cache(out).until(lambda moment=moment: MOMENTS[moment](world, out))
        assert command.end(signum) == code, command.said()
        assert "run the same command again" in command.said().splitlines()[-1]
        assert "Traceback" not in command.said()
        assert litter(world.folder / out) == []
    last = world.cache(out)
    assert last.wait() == 0, last.said()
    check_same_store(world, out)


@pytest.mark.parametrize("moment", ["at once", *MOMENTS])
def test_two_processes_on_one_store_do_not_harm_it(world: World, moment: str) -> None:
    out = f"two-{moment.replace(' ', '-')}.zarr"
    first = world.cache(out)
    if moment == "at once":
        second = world.cache(out)
    else:
        first.until(lambda: MOMENTS[moment](world, out))
        with first.held():  # tiny teachers would be done before the second one has looked around
            second = world.cache(out)
            while second.runs() and "waiting for process" not in second.said():
                time.sleep(0.01)
    codes = [first.wait(), second.wait()]
    if moment == "at once":
        assert 0 in codes, (first.said(), second.said())
    else:
        assert codes[0] == 0, first.said()
    for command, code in zip((first, second), codes, strict=True):
        assert code in (0, 2), command.said()
        assert "Traceback" not in command.said()
        if code == 2:
            *_, error = re.split(r"^error: ", command.said(), flags=re.MULTILINE)
            assert out in error
            assert re.search(r"process \d+ on \S+|another process has just made a store", error), (
                f"it does not say why: {error}"
            )
    if moment in ("first shard", "half"):
        assert codes[1] == 2, second.said()
    last = world.cache(out)
    assert last.wait() == 0, last.said()
    check_same_store(world, out)
