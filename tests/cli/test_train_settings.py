"""Stage 2 under settings given on the command line, and what is left of a run that fails: its reason and its state."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from rsmtdf.cli import training
from rsmtdf.cli.training import TrainOptions, train_run
from rsmtdf.errors import CheckpointError, DatasetError, TrainingError
from rsmtdf.learning.run import RunFolder
from rsmtdf.learning.step import train_step
from rsmtdf.signals import StopFlag
from rsmtdf.stages.train import loop

Say = Callable[[str], None]


def run(tiny: Any, out: Path, say: Say, **options: Any) -> dict[str, Any]:
    return train_run(TrainOptions(cache=tiny.store, out=out, device="cpu", **options), stop=StopFlag(), say=say)


def at_call(n: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """`function`, but its `n`-th call raises."""
    left = n

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise error
        return function(*args, **kwargs)

    return failing


def same(one: Path, two: Path) -> None:
    for name in ("checkpoints/last.safetensors", "checkpoints/best.safetensors", "metrics.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_length_replaces_the_one_that_the_store_recorded(tiny: Any, tmp_path: Path, say: Say) -> None:
    result = run(tiny, tmp_path / "run", say, overrides=["train.epochs=1"])
    assert result["total_steps"] == 5, "20 tiles in batches of 4; the store says 12 steps"
    assert RunFolder.open(tmp_path / "run").config()["config"]["train"]["steps"] is None


@pytest.fixture(scope="module")
def whole(cached_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps, validated after 4, 8 and 12, to which nothing happens."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(cached_tiny, out, lambda line: None)
    return out


FULL = OSError(errno.ENOSPC, "No space left on device")
FULL_TOO = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("owner", "name", "call", "error", "file"),
    [
        (loop, "save_state", 2, FULL, "last.safetensors"),
        (loop, "save_state", 3, FULL_TOO, "last.safetensors"),
        (loop, "save_student", 1, FULL, "best.safetensors"),
        (RunFolder, "record", 5, FULL, "metrics.jsonl"),
        (RunFolder, "record", 6, FULL, "metrics.jsonl"),
        (RunFolder, "write_state", 3, FULL, "run.json"),
    ],
)
def test_a_full_disk_names_the_file_and_loses_nothing(
    tiny: Any, whole: Path, tmp_path: Path, say: Say, owner: Any, name: str, call: int, error: Exception, file: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, at_call(call, getattr(owner, name), error))
        expected = rf"cannot write .*{file}: .*No space left on device.*The last good state is kept in .*--resume"
        with pytest.raises(CheckpointError, match=expected):
            run(tiny, tmp_path / "cut", say)
    state = RunFolder.open(tmp_path / "cut").state()
    assert state["state"] == "failed"
    assert file in state["reason"]
    run(tiny, tmp_path / "cut", say, resume=True)
    same(whole, tmp_path / "cut")
    assert RunFolder.open(tmp_path / "cut").state()["reason"] is None


def test_a_full_disk_before_anything_was_kept_says_so(tiny: Any, tmp_path: Path, say: Say) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_state", at_call(1, loop.save_state, FULL))
        with pytest.raises(CheckpointError, match="No state had been kept yet"):
            run(tiny, tmp_path / "cut", say)


def test_a_step_out_of_memory_names_the_setting(tiny: Any, whole: Path, tmp_path: Path, say: Say) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", at_call(6, loop.train_step, torch.OutOfMemoryError("CUDA out of memory")))
        with pytest.raises(TrainingError, match=r"cpu ran out of memory at step 6, .*Lower train.micro_batch"):
            run(tiny, tmp_path / "cut", say)
    state = RunFolder.open(tmp_path / "cut").state()
    assert (state["state"], state["step"]) == ("failed", 4)
    run(tiny, tmp_path / "cut", say, resume=True)
    same(whole, tmp_path / "cut")


def test_any_failure_is_left_in_the_record(tiny: Any, tmp_path: Path, say: Say) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", at_call(3, loop.train_step, RuntimeError("boom")))
        with pytest.raises(RuntimeError, match="boom"):
            run(tiny, tmp_path / "step", say)
        patch.setattr(loop, "build_student", at_call(1, loop.build_student, ZeroDivisionError("none")))
        with pytest.raises(ZeroDivisionError):
            run(tiny, tmp_path / "start", say)
    for name, reason in (("step", "RuntimeError: boom"), ("start", "ZeroDivisionError: none")):
        state = RunFolder.open(tmp_path / name).state()
        assert (state["state"], state["reason"]) == ("failed", reason)


def test_threads_and_shards_are_closed_with_the_run(tiny: Any, tmp_path: Path, say: Say) -> None:
    def left() -> list[str]:
        shards = [str(fd.readlink()) for fd in Path("/proc/self/fd").glob("*") if fd.is_symlink()]
        threads = [t.name for t in threading.enumerate() if t.name.startswith("features")]
        return threads + [f for f in shards if str(tiny.store) in f]

    held: list[Any] = []

    def keeping(job: Any, **options: Any) -> Any:
        held.append(job)
        return train(job, **options)

    with pytest.MonkeyPatch.context() as patch:
        train = training.stage.train
        patch.setattr(training.stage, "train", keeping)
        run(tiny, tmp_path / "whole", say)
        assert left() == []
        patch.setattr(loop, "train_step", at_call(2, loop.train_step, RuntimeError("boom")))
        with pytest.raises(RuntimeError, match="boom"):
            run(tiny, tmp_path / "failed", say)
        assert left() == []
    assert len(held) == 2


def test_a_finished_run_stays_as_it_is(tiny: Any, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = (tmp_path / "run/run.json").read_bytes()
    said: list[str] = []
    result = run(tiny, tmp_path / "run", said.append, resume=True)
    assert said == [f"{tmp_path / 'run'} is finished already: nothing to go on with"]
    assert result == RunFolder.open(tmp_path / "run").state()["summary"], "with the seconds it took, not 0"
    (tmp_path / "run/checkpoints/last.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot resume from"):
        run(tiny, tmp_path / "run", said.append, resume=True, overrides=["train.workers=3"])
    assert (tmp_path / "run/run.json").read_bytes() == before


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_validation_that_fails_loses_no_step(
    tiny: Any, whole: Path, tmp_path: Path, say: Say, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", at_call(n, training.evaluate, DatasetError("scene 7 cannot be read")))
        with pytest.raises(DatasetError, match="scene 7"):
            run(tiny, tmp_path / "cut", say)
        state = RunFolder.open(tmp_path / "cut").state()
        assert (state["state"], state["step"]) == ("failed", 4 * n)
    steps: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", lambda **given: steps.append(given["step"]) or train_step(**given))
        run(tiny, tmp_path / "cut", say, resume=True)
    assert steps == list(range(4 * n, 12)), "no step twice"
    same(whole, tmp_path / "cut")


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_counts_a_validation_that_was_made_again(
    tiny: Any, tmp_path: Path, say: Say, patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = {"miou": 0.25, "per_class": {}}
    settings = [f"train.patience={patience}"]
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: flat)
    assert run(tiny, tmp_path / "whole", say, overrides=settings)["steps"] == 4 * (1 + patience)
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", at_call(1 + patience, training.evaluate, DatasetError("unreadable")))
        with pytest.raises(DatasetError):
            run(tiny, tmp_path / "cut", say, overrides=settings)
    assert run(tiny, tmp_path / "cut", say, resume=True)["steps"] == 4 * (1 + patience)
    same(tmp_path / "whole", tmp_path / "cut")
