"""Each pipeline runs, on the tiny world."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def test_compare_methods_trains_scores_and_goes_on(tiny: Any, tmp_path: Path, repo: Path) -> None:
    command = [sys.executable, str(repo / "pipelines" / "compare_methods.py"), "--cache", str(tiny.store)]
    command += ["--out", str(tmp_path / "out"), "--seeds", "0", "1", "--methods", "supervised", "rs-mtdf"]
    command += ["--set", "train.steps=2", "--device", "cpu"]

    def run() -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(repo)}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "out" / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert [r.split("|")[1].strip() for r in rows] == ["method", "supervised", "rs-mtdf"]
    assert all("±" in r for r in rows[1:]), "two seeds have a spread"
    assert "best on val" in table
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}
    assert len(stamps) == 8
    assert run().returncode == 0
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items()), "the second time nothing is trained"
