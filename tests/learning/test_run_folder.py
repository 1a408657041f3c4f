"""Run folders: never overwritten, whole files, metrics cut back on resume; and budgets."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsmtdf.errors import CheckpointError, ConfigError
from rsmtdf.learning.budget import parse_budget, total_steps
from rsmtdf.learning.run import RunFolder, next_run_path, point_latest


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", config={"a": 1})
    with pytest.raises(CheckpointError, match="runs are never overwritten"):
        RunFolder.create(tmp_path / "run", config={})
    assert RunFolder.open(tmp_path / "run").config() == {"a": 1}
    with pytest.raises(CheckpointError, match="is no run folder"):
        RunFolder.open(tmp_path)


def test_states_keep_earlier_facts(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", config={})
    run.write_state("running", total_steps=10)
    run.write_state("interrupted", step=4)
    assert run.state() == {"total_steps": 10, "state": "interrupted", "step": 4}


def test_records_are_cut_back_to_the_checkpoint_and_survive_a_torn_line(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", config={})
    for step in (10, 20, 30):
        run.record("train", step, loss=1.0 / step)
    with run.metrics.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [r["step"] for r in run.records()] == [10, 20, 30]
    (run.path / "checkpoints" / "last.safetensors.0123.partial").write_bytes(b"half a fi")
    run.rewind(20)
    assert not list(run.path.rglob("*.partial"))
    assert [r["step"] for r in run.records()] == [10, 20]
    run.record("train", 30, loss=0.5)
    assert run.records()[-1] == {"kind": "train", "step": 30, "loss": 0.5}


def test_names_count_up_and_latest_points_at_the_newest(tmp_path: Path) -> None:
    first = next_run_path(tmp_path, stem="my data/5%-rs-mtdf")
    assert first.name == "my-data-5%-rs-mtdf-1"
    first.mkdir()
    second = next_run_path(tmp_path, stem="my data/5%-rs-mtdf")
    assert second.name.endswith("-2")
    second.mkdir()
    for run in (first, second):
        point_latest(run)
    assert (tmp_path / "latest").resolve() == second.resolve()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20000-steps", ("steps", 20000)),
        ("20k-steps", ("steps", 20000)),
        ("2h", ("seconds", 7200)),
        ("45min", ("seconds", 2700)),
        ("1.5d", ("seconds", 129600)),
        ("1.5k steps", ("steps", 1500)),
    ],
)
def test_budgets(text: str, expected: tuple[str, float]) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "2", "h", "0-steps", "-1h", "2 weeks", "0h"])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="neither a time"):
        parse_budget(text)


def test_the_length_of_a_run() -> None:
    assert total_steps(epochs=3, steps=None, budget=None, steps_per_epoch=7, step_seconds=None) == 21
    assert total_steps(epochs=None, steps=5, budget=None, steps_per_epoch=7, step_seconds=None) == 5
    assert total_steps(epochs=None, steps=None, budget="1h", steps_per_epoch=7, step_seconds=2.0) == 1800
    with pytest.raises(ConfigError, match="how long shall it train"):
        total_steps(epochs=None, steps=None, budget=None, steps_per_epoch=7, step_seconds=None)


def test_what_a_kill_during_creation_leaves_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert RunFolder.create(tmp_path / "run", config={"a": 2}).config() == {"a": 2}
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other" / "checkpoints" / "last.safetensors").write_bytes(b"kept")
    with pytest.raises(CheckpointError, match="never overwritten"):
        RunFolder.create(tmp_path / "other", config={})
