"""`benchmarks/stage1.py` and `gpu.py` run. How fast anything is, no test can say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run(repo: Path, folder: Path, script: str, *arguments: str) -> str:
    command = [sys.executable, str(repo / "benchmarks" / script), *arguments]
    env = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_stage1_measures_pairs_and_growth(repo: Path, tmp_path: Path) -> None:
    begin, end = (f"<!-- tables of benchmarks/stage1.py: {edge} -->" for edge in ("begin", "end"))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    run(repo, tmp_path, "stage1.py", "--quick", "--json", "found.json", "--markdown", str(page))
    found = json.loads((tmp_path / "found.json").read_text())
    pipeline = found["pipeline"]
    assert len(pipeline["share"]) == len(pipeline["bare_s"]) == len(pipeline["pipeline_s"]) == 2
    assert [g["views"] for g in found["growth"]] == [20, 40]
    assert all(g["peak_mb"] >= g["before_mb"] > 0 for g in found["growth"])
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n")
    assert text.endswith(f"\n{end}\nafter\n")
    assert "old" not in text.split()
    assert "Goal:" not in text, "tiny sizes measure nothing that a goal speaks of"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure this GPU")
def test_without_a_gpu_that_is_said(repo: Path, tmp_path: Path) -> None:
    assert run(repo, tmp_path, "gpu.py", "stage1").startswith("not measured on a GPU")
