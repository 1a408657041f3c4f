"""A run's folder: what was asked for, how it went, and its checkpoints.

    config.json      the resolved experiment, and what the run depends on besides (labels, store identity)
    run.json         state (running, interrupted, finished, failed), step, best, versions
    metrics.jsonl    one line per record: {"kind": "train" | "val", "step": ..., ...}
    checkpoints/     best.safetensors (EMA student), last.safetensors (everything a resume needs)

Files are replaced whole; `metrics.jsonl` only grows, and is cut back to the checkpoint when a run is resumed, so an
interrupted and resumed run leaves the same lines as an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsmtdf.errors import CheckpointError
from rsmtdf.files import PARTIAL, write_whole

STATES = ("running", "interrupted", "finished", "failed")


class RunFolder:
    """The folder of one run. `create` never overwrites; `open` takes an existing one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "checkpoints" / "best.safetensors"
        self.last = path / "checkpoints" / "last.safetensors"
        self.metrics = path / "metrics.jsonl"

    @classmethod
    def create(cls, path: Path, *, config: Mapping[str, Any]) -> RunFolder:
        """A new run folder at `path` with its configuration.

        Raises:
            CheckpointError: `path` holds something already, or cannot be written.
        """
        # An empty `checkpoints` alone is what a process leaves that was killed right here.
        if path.exists() and (
            not path.is_dir() or any(p.name != "checkpoints" or any(p.iterdir()) for p in path.iterdir())
        ):
            raise CheckpointError(
                f"{path} exists already; runs are never overwritten: choose another --out or --resume"
            )
        run = cls(path)
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_whole(path / "config.json", _json(config))
            run.metrics.touch()
        except OSError as error:
            raise CheckpointError(
                f"cannot make a run folder at {path}: {error.strerror}; choose another --out"
            ) from error
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The existing run at `path`.

        Raises:
            CheckpointError: there is none.
        """
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is no run folder (it has no config.json)")
        return cls(path)

    def config(self) -> dict[str, Any]:
        return self._read("config.json")

    def state(self) -> dict[str, Any]:
        return self._read("run.json") if (self.path / "run.json").exists() else {}

    def write_state(self, state: str, **facts: Any) -> None:
        """Replaces run.json; facts given before and not now are kept."""
        if state not in STATES:
            raise ValueError(f"{state!r} is none of {STATES}")
        write_whole(self.path / "run.json", _json({**self.state(), **facts, "state": state}))

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Appends one line to metrics.jsonl."""
        line = json.dumps({"kind": kind, "step": step, **values}, allow_nan=True)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def records(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl (a line cut by a kill is left out)."""
        out = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                out.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return out

    def rewind(self, step: int) -> None:
        """Drops what a resumed run makes again: the records after `step`, and files that a kill left half-written."""
        for file in self.path.rglob(f"*{PARTIAL}"):
            file.unlink(missing_ok=True)
        kept = [json.dumps(r, allow_nan=True) for r in self.records() if r["step"] <= step]
        write_whole(self.metrics, "".join(line + "\n" for line in kept).encode())

    def _read(self, name: str) -> dict[str, Any]:
        try:
            data = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error}") from error
        if not isinstance(data, dict):
            raise CheckpointError(f"{self.path / name} should hold a JSON object")
        return data


def next_run_path(parent: Path, *, stem: str) -> Path:
    """`parent/<stem>-<n>` with the first n (from 1) that is free; odd characters of `stem` become '-'."""
    clean = re.sub(r"[^A-Za-z0-9._%-]+", "-", stem).strip("-") or "run"
    n = 1
    while (parent / f"{clean}-{n}").exists():
        n += 1
    return parent / f"{clean}-{n}"


def point_latest(run: Path) -> None:
    """Makes `latest` beside `run` point at it, where the system has symbolic links."""
    link = run.parent / "latest"
    temporary = run.parent / f".latest-{os.getpid()}"
    try:
        temporary.symlink_to(run.name)
        os.replace(temporary, link)
    except OSError:
        temporary.unlink(missing_ok=True)


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
