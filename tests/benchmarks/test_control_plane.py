"""`benchmarks/control_plane.py` runs, fills its stores over every executor, and does its work once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_ten_thousand_views_over_every_executor(repo: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repo / "benchmarks" / "control_plane.py"), "--views", "10000"]
    command += ["--executors", "serial", "processes", "--dir", str(tmp_path), "--json", str(tmp_path / "found.json")]
    env = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["found.json"]  # no store stays behind
    rows = json.loads((tmp_path / "found.json").read_text())
    assert [row["executor"] for row in rows] == ["serial", "processes"]
    for row in rows:
        # 1000 tiles x 10 seeds: 16 shards a seed. The first tasks of each half are not timed.
        assert row["half"]["shards"] + row["rest"]["shards"] == 160
        assert 9000 < row["half"]["views"] + row["rest"]["views"] < 10_000
        assert row["nothing"]["shards"] == 0
        assert row["half"]["tasks"] > 2, "enough tasks to see what one costs"
        assert "| " + row["executor"] in done.stdout
