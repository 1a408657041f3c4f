"""What holds for every test: one share of the cores for each worker, no network, repeatable properties."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Two workers with as many threads each as there are cores run slower than one worker alone. Set in the environment,
# before torch is imported, so that processes which tests start inherit it.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    _threads = str(max(1, (os.cpu_count() or 1) // _workers))
    for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(_name, _threads)

# A test that would download weights fails at once instead of depending on the day's network.
os.environ["HF_HUB_OFFLINE"] = "1"

# `pytest --hypothesis-profile explore` looks for new examples; the default run is the same every time.
settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def run_python(tmp_path_factory: pytest.TempPathFactory):
    """Runs Python code in a fresh interpreter, outside the checkout but with its rsmtdf; returns its stdout."""
    import subprocess

    folder = tmp_path_factory.mktemp("python")

    def run(code: str, *arguments: str, check: bool = True) -> str:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=folder, env=env, text=True, capture_output=True, timeout=300
        )
        if check and done.returncode:
            raise AssertionError(f"exit {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    return run


@pytest.fixture(scope="session")
def withdraw():
    """Marks a teacher's shard as not done, as a repair does before it is computed again."""
    import numpy as np

    from rsmtdf.store.status import DONE, SKIPPED, TODO, state_of, word

    def mark(store, shard: int, teacher: str) -> None:
        status = store.teacher(teacher).status
        words = status.read_shard(shard)
        if status.is_sealed(shard):
            status.unseal(shard)
        status.write_shard(shard, np.where(np.isin(state_of(words), (DONE, SKIPPED)), np.uint64(word(TODO)), words))

    return mark
