"""What touches the disk: writing, the space taken, and reading what is not in the page cache."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from store_peers.formats import FORMATS
from store_peers.views import Views
from store_peers.ways import WAYS

COLD = (
    "raw pread (limit)",
    "pread + crc32c (limit)",
    "rsmtdf, verified",
    "npy memmap",
    ".npy per view",
    ".safetensors per view",
    "tensorstore, crc32c",
    "tensorstore, no crc",
    "h5py, fletcher32",
    "h5py",
    "zarr-python a[i]",
)


def write_rates(root: Path, views: Views, *, rounds: int) -> list[dict[str, Any]]:
    """Every format in turn, `rounds` times; the last round's files stay under `root`/<format>.

    Each rate is also given with the fsync of all files and folders that formats need which do none themselves.
    """
    rng = np.random.default_rng(0)
    seconds = {name: np.zeros((rounds, 3)) for name in FORMATS}
    for k in range(rounds):
        for name in rng.permutation(list(FORMATS)).tolist():
            folder = root / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            fill = FORMATS[name].begin(folder, views)
            begun, cpu = time.perf_counter(), time.process_time()
            fill()
            wrote, used = time.perf_counter(), time.process_time() - cpu
            if not FORMATS[name].durable:
                _fsync(folder)
            seconds[name][k] = wrote - begun, time.perf_counter() - begun, used
    total = len(views) * views.view_bytes
    ours = seconds["rsmtdf"][:, 1]
    return [
        {
            "name": name,
            "durable": FORMATS[name].durable,
            "mb_per_s": None if FORMATS[name].durable else total / float(np.median(found[:, 0])) / 1e6,
            "durable_mb_per_s": total / float(np.median(found[:, 1])) / 1e6,
            "cpu_s_per_gb": float(np.median(found[:, 2])) / total * 1e9,
            "times_ours": float(np.median(found[:, 1] / ours)),
            "bytes_per_view": disk_bytes(root / name) / len(views),
            "files": sum(1 for _ in _files(root / name)),
        }
        for name, found in seconds.items()
    ]


def disk_bytes(folder: Path) -> int:
    """Blocks that the files of `folder` take."""
    return sum(f.stat().st_blocks * 512 for f in _files(folder))


def cold_reads(root: Path, views: Views, *, rounds: int) -> dict[str, np.ndarray]:
    """Name -> seconds per read of one random view whose file is not in the page cache, all ways in turn.

    Files stay open between reads where the way keeps them open; a map is made anew, since mapped pages do not leave.
    """
    os.sync()  # pages that are not on disk yet do not leave either
    rng = np.random.default_rng(0)
    seconds = {name: np.zeros(rounds) for name in COLD}
    slot = {name: values[0] for name, values in views.buffers(1).items()}
    for k in range(rounds):
        row = int(rng.integers(len(views)))
        for name in rng.permutation(list(COLD)).tolist():
            way = WAYS[name]
            folder = root / way.format
            if not way.fresh_map:
                with way.open(folder, views) as reads:
                    # Indexes are read, as in the midst of an epoch; by a view so far off that the system's reading
                    # ahead, which dropping would not stop, does not come to this one.
                    reads.one(row ^ 32, slot)
                    _forget(folder)
                    seconds[name][k] = _timed(reads.one, row, slot)
            else:
                _forget(folder)
                with way.open(folder, views) as reads:
                    seconds[name][k] = _timed(reads.one, row, slot)
    return seconds


def _timed(one: Any, row: int, slot: Any) -> float:
    begun = time.perf_counter()
    one(row, slot)
    return time.perf_counter() - begun


def _forget(folder: Path) -> None:
    for file in _files(folder):
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _fsync(folder: Path) -> None:
    for path in [*_files(folder), *(p for p in [folder, *folder.rglob("*")] if p.is_dir())]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def _files(folder: Path) -> Iterator[Path]:
    return (f for f in folder.rglob("*") if f.is_file())
