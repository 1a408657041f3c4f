"""`benchmarks/store.py` runs, and what it compares is comparable. How fast anything is, no test can say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BEGIN, END = (f"<!-- tables of benchmarks/store.py: {edge} -->" for edge in ("begin", "end"))
LIMITS = {"memcpy (limit)", "raw pread (limit)", "pread + crc32c (limit)"}
OURS = {f"rsmtdf, {how}" for how in ("verified", "verified, 2 threads", "unverified", "unverified, 2 threads")}
CHECKED = {"zarr-python a[i]", "zarr-python oindex", "tensorstore, crc32c", "h5py, fletcher32"}
UNCHECKED = {
    "tensorstore, no crc", "h5py", "npy memmap", ".npy per view", ".safetensors per view", ".pt per view",
}  # fmt: skip


@pytest.fixture(scope="module")
def found(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The figures of a quick run, and its Markdown. It ends with an error where two readers give different bytes."""
    for peer in ("h5py", "tensorstore", "webdataset"):
        pytest.importorskip(peer, reason=f"{peer} is not installed (it is in rsmtdf[bench])")
    folder = tmp_path_factory.mktemp("benchmark")
    page = folder / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    command = [sys.executable, str(repo / "benchmarks" / "store.py"), "--quick", "--markdown", str(page)]
    command += ["--dir", str(folder), "--json", str(folder / "found.json")]
    env = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert sorted(f.name for f in folder.iterdir()) == ["found.json", "page.md"]  # nothing else stays behind
    return json.loads((folder / "found.json").read_text()), page.read_text()


@pytest.mark.slow
def test_who_notices_a_flipped_bit(found):
    notices = found[0]["notices"]
    # 'unverified' compares the checksum that is stored beside the view with the status word, and sums nothing.
    expected = dict.fromkeys(OURS | CHECKED, True) | dict.fromkeys(
        UNCHECKED | {"raw pread (limit)", "WebDataset"}, False
    )
    expected |= {name: False for name in OURS if "unverified" in name}
    assert notices == expected


@pytest.mark.slow
def test_every_peer_is_in_every_table(found):
    for codec in ("fp16", "int8"):
        of = found[0]["codecs"][codec]
        names = {part: {row["name"] for row in of[part]} for part in ("views_one", "views_batch", "epochs", "cold")}
        single = {name for name in OURS if "threads" not in name}
        assert names["views_one"] == LIMITS | single | CHECKED | UNCHECKED
        assert names["views_batch"] == LIMITS | OURS | CHECKED | UNCHECKED
        assert {"rsmtdf, verified", "WebDataset, DataLoader", "h5py, fletcher32, DataLoader"} <= names["epochs"]
        assert {"rsmtdf, verified", "npy memmap", "tensorstore, crc32c"} <= names["cold"]
        assert {row["name"] for row in of["writes"]} >= {"rsmtdf", "raw file", "WebDataset", ".pt per view"}
        for part in names:
            assert all(row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"] for row in of[part])
            assert all(row["times_ours"] == 1 for row in of[part] if row["name"] == "rsmtdf, verified")


@pytest.mark.slow
def test_sizes_and_goals_are_stated(found):
    data, text = found
    assert data["bytes_per_view"]["fp16"] == 2 * (1369 * 768 + 256 * 1024)
    assert data["opening"]["sealed"][0]["views"] == 700
    assert data["opening"]["sealed"][0]["peak_mb"] >= data["opening"]["sealed"][0]["interpreter_mb"]
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "old" not in text.split()
    for line in ("Load average", "| **rsmtdf, verified** | yes |", "MB on disk a view"):
        assert line in text
    assert "**Goals**" not in text, "tiny sizes measure nothing that a goal speaks of"
