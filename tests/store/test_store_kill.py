"""The store survives its writers: kill -9, full disks, changes cut short at every step."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from rsmtdf.errors import StoreError
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.status import DONE, crc_of, state_of
from rsmtdf.store.store import FeatureStore

SCRIPT = Path(__file__).with_name("writer_process.py")
TOKENS, DIM = 64, 256
"""32 kB a view, so that a kill meets writing and not only starting."""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the writers are forked")


class Writers:
    """Starts, follows and kills writer processes."""

    def __init__(self, repo: Path) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": str(repo)},
        )
        self._words: list[tuple[str, int, str]] = []

    def start(self, store: Path, *, do: str = "fill", part: int = 0, of: int = 1, limit: int | None = None) -> int:
        """The id of a new process that has opened the store and begins to write."""
        job = {"do": do, "store": str(store), "part": part, "of": of, "limit": limit}
        self._server.stdin.write(json.dumps(job) + "\n")
        pid = self._next("started")[1]
        assert self._next("ready", pid)[1] == pid
        return pid

    def outcome(self, pid: int) -> tuple[str, str]:
        """How a process ended: its last word and what it said."""
        word, _, text = self._next("finished failed", pid)
        return word, text

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it had finished
        deadline = time.monotonic() + 20
        for pid in pids:
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.002)

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()  # which also closes the pipes

    def _next(self, words: str, pid: int | None = None) -> tuple[str, int, str]:
        """The next answer of that kind (of that process); others are kept for later."""
        while True:
            for k, (word, of, _) in enumerate(self._words):
                if word in words.split() and pid in (None, of):
                    return self._words.pop(k)
                assert not (word == "failed" and pid in (None, of)), self._words[k]
            word, of, text = self._server.stdout.readline().rstrip("\n").split(" ", 2)
            self._words.append((word, int(of), text))


@pytest.fixture(scope="module")
def writers(repo):
    found = Writers(repo)
    yield found
    found.close()


@pytest.fixture(scope="module")
def content():
    spec = importlib.util.spec_from_file_location("writer_process", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.content


def big_store(kit, path, *, tiles: int) -> FeatureStore:
    store = kit.create(path)
    store.extend([kit.weak(tiles, seeds=1), kit.strong(tiles)])
    kit.add_teacher(store, grid=(8, 8), dim=DIM)
    return store


def check_all_done(store, kit, content) -> None:
    rows = kit.rows(store)
    with CachedFeatures(store, ["t"], device="cpu", rows=rows) as source:
        for row in rows.tolist():
            assert np.array_equal(source.fetch(np.array([row]))["t"][0].numpy(), content(row, TOKENS, DIM)), row
    assert crc_of(store.view_status())[rows].tolist() == (rows + 1).tolist()


KILLS = 100
RESUMED_BY = 3


def test_a_hundred_kills_of_two_writers_then_resume_with_three(kit, path, writers, content):
    """Each round kills both writers at a random moment; whatever is marked done is right throughout."""
    store = big_store(kit, path, tiles=2400)
    waits = np.random.default_rng(7).uniform(0.002, 0.06, KILLS // 2).tolist()
    committed, killed, litter, orphans = [], 0, 0, 0
    for wait in waits:
        running = [writers.start(path, part=part, of=2) for part in range(2)]
        time.sleep(wait)
        writers.kill(running)
        killed += len(running)
        litter += len(list(path.rglob("*.partial")))
        seen = FeatureStore.open(path)
        done = np.flatnonzero(state_of(seen.status("t")) == DONE)
        orphans += len(list((path / "teachers" / "t" / "features").glob("c.*"))) - len(done) // seen.shard_views
        with CachedFeatures(seen, ["t"], device="cpu") as source:
            for row in done[-8:].tolist():
                assert np.array_equal(source.fetch(np.array([row]))["t"][0].numpy(), content(row, TOKENS, DIM))
        committed.append(len(done))
    assert killed == KILLS
    assert committed == sorted(committed), "what was committed once stays"
    assert 0 < committed[-1] < len(kit.rows(store)), "no kill met a writer at work: the test shows nothing"
    assert litter + orphans > 0, "no kill met a shard half-written: the test shows little"
    resumed = [writers.start(path, part=part, of=RESUMED_BY) for part in range(RESUMED_BY)]
    assert [writers.outcome(pid) for pid in resumed] == [("finished", "")] * RESUMED_BY
    store.refresh()
    check_all_done(store, kit, content)
    # None twice: a file and a note for each shard, nothing else.
    files = sorted(p.name for p in (path / "teachers" / "t" / "features").glob("c.*"))
    assert files == sorted(f"c.{k}.0.0" for k in range(store.n_shards))
    notes = sorted(int(p.stem) for p in (path / "provenance" / "t").iterdir())
    assert notes == list(range(store.n_shards))
    FeatureStore.open(path, writable=True).clean_partials()
    assert not list(path.rglob("*.partial"))


def test_a_full_disk_is_a_clean_error(kit, path, writers, content):
    store = big_store(kit, path, tiles=8)
    word, text = writers.outcome(writers.start(path, limit=100_000))
    assert word == "failed"
    assert text.startswith(f"shard 0 of feature store {path} could not be written: File too large")
    assert "it goes on from here" in text
    assert not list(path.rglob("*.partial"))
    assert not list((path / "teachers" / "t" / "features").glob("c.*"))
    assert len(store.missing_shards(["t"])) == store.n_shards
    assert writers.outcome(writers.start(path)) == ("finished", "")
    check_all_done(store, kit, content)


class Stop(Exception):
    """What a test raises inside a change."""


def steps_of(kit, path) -> list[str]:
    store = FeatureStore.open(path, writable=True)
    steps: list[str] = []
    store.extend([kit.weak(300, seeds=4, start=5, first_tile=50)], on_step=steps.append)
    return steps


def test_a_change_cut_short_at_any_step_leaves_the_old_store(kit, tmp_path):
    kit.full(tmp_path / "original")
    steps = steps_of(kit, shutil.copytree(tmp_path / "original", tmp_path / "probe"))
    assert steps[-1] == "commit"
    assert len(steps) > 8
    for k, last in enumerate(steps):
        path = shutil.copytree(tmp_path / "original", tmp_path / f"s{k}")
        store = FeatureStore.open(path, writable=True)
        before = {name: store.column(name).copy() for name in store.column_names}

        def stop(step: str, at: str = last) -> None:
            if step == at:
                raise Stop

        with pytest.raises(Stop):
            store.extend([kit.weak(300, seeds=4, start=5, first_tile=50)], on_step=stop)
        seen = FeatureStore.open(path)
        grown = 24 + 1200 if last == "commit" else 24
        assert seen.n_rows == grown, last
        for name, values in before.items():
            np.testing.assert_array_equal(seen.column(name)[:24], values)
        assert len(seen.tile_ids) == (308 if last == "commit" else 8)
        assert (state_of(seen.status("t"))[kit.rows(store)[:18]] == DONE).all()
        # Opened for writing, every array has the committed length again, for other readers.
        writable = FeatureStore.open(path, writable=True)
        lengths = {zarr.open_array(p.parent, mode="r").shape[0] for p in path.glob("teachers/t/[fs]*/zarr.json")}
        lengths |= {zarr.open_array(path / "views" / name, mode="r").shape[0] for name in writable.column_names}
        assert lengths == {grown}, last
        # And another change, of other size, works on what was left behind.
        writable.extend([kit.weak(2, seeds=2, start=900, first_tile=70)])
        assert writable.n_rows == grown + 4
        again = FeatureStore.open(path)
        np.testing.assert_array_equal(again.column("seed")[grown:], [900, 900, 901, 901])
        assert again.tile_ids[int(again.column("tile")[grown])] == "scène/70_0"


def test_a_disk_that_fills_during_a_change(kit, path, writers):
    kit.full(path)
    word, text = writers.outcome(writers.start(path, do="extend", limit=9000))
    assert word == "failed"
    assert text.startswith(f"cannot extend feature store {path}: File too large")
    assert "it is as it was before" in text
    assert not list(path.rglob("*.partial"))
    seen = FeatureStore.open(path, writable=True)
    assert seen.n_rows == 24
    assert len(seen.tile_ids) == 8
    CachedFeatures(seen, ["t"], device="cpu", rows=kit.rows(seen)).close()
    assert writers.outcome(writers.start(path, do="extend")) == ("finished", "")
    assert FeatureStore.open(path).n_views == 5018


def test_a_store_appears_whole_or_not_at_all(kit, tmp_path, monkeypatch):
    def fail(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(
        StoreError, match=r"cannot make a feature store at .*: No space left on device; nothing is left"
    ):
        kit.create(tmp_path / "s")
    assert not list(tmp_path.iterdir())
