"""What a view costs besides pixels and teachers, and whether that stays flat: `cache-features` with nothing to compute.

    python benchmarks/control_plane.py [--views 10000 100000 1000000] [--executors serial processes dask] [--dir DIR]

Everything else is real: planning and growing the store, tasks of about a second over the executors (shorter than in
earnest, so that there are many), claims, files, checksums, status words, sealing. Each row is a process of its own.
`rss` is the peak of the coordinating process, in which Dask's scheduler runs too; `before` is its memory before the
first task, with the store open. `resume` is the time from opening a store that is half done until the first task
could be given out; `nothing` the same for one that is finished. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import control_plane_parts as parts
import numpy as np
import psutil

from rsmtdf.signals import StopFlag
from rsmtdf.stages.scaleout import Crew, SerialCrew, clusters, process_crew, spread
from rsmtdf.store.store import FeatureStore

WORKERS = 2
TARGET_S = 1.0


def rss_mb() -> float:
    return psutil.Process().memory_info().rss / 1e6


def lacking(store: FeatureStore) -> list[int]:
    """As the command does it: what is missing, and what was skipped."""
    rows = store.pending_rows(["fake"], retry_skipped=True)
    return np.unique(rows // store.shard_views).tolist()


@contextlib.contextmanager
def crew_of(executor: str, stop: StopFlag) -> Iterator[Crew]:
    if executor == "serial":
        yield SerialCrew(device="cpu", stop=stop)
    elif executor == "processes":
        with process_crew(["cpu"] * WORKERS) as crew:
            yield crew
    else:
        with clusters.local_cluster(WORKERS, device="cpu") as crew:
            yield crew


def measure(path: Path, executor: str, *, until: float) -> dict[str, Any]:
    """Fills the store at `path` as far as the share `until` of its shards."""
    begun = time.perf_counter()
    store = FeatureStore.open(path, writable=True)
    opened = time.perf_counter()
    store.clean_partials()
    cleaned = time.perf_counter()
    shards = lacking(store)
    listed = time.perf_counter()
    shards = [k for k in shards if k < until * store.n_shards]
    found: dict[str, Any] = {
        "open_s": opened - begun,
        "clean_s": cleaned - opened,
        "list_s": listed - cleaned,
        "resume_s": listed - begun,
        "shards": len(shards),
    }
    views = 0
    samples: list[tuple[int, float]] = []

    def take(done: parts.Done) -> None:
        nonlocal views
        views += done.views
        samples.append((views, rss_mb()))

    stop = StopFlag()
    if shards:
        with crew_of(executor, stop) as crew:
            work = functools.partial(parts.fill, str(path))
            # Workers import torch and read the store's columns before the first shard; that is not a cost per view.
            spread(shards[: 2 * WORKERS], work=work, crew=crew, stop=stop, on_done=take, target_s=0.001)
            views, found["before_mb"] = 0, rss_mb()
            start = time.perf_counter()
            tally = spread(shards[2 * WORKERS :], work=work, crew=crew, stop=stop, on_done=take, target_s=TARGET_S)
            found["fill_s"] = time.perf_counter() - start
        found |= {"views": views, "us_per_view": 1e6 * found["fill_s"] / max(views, 1), "tasks": tally.tasks}
    found["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    sealing = time.perf_counter()
    store.seal()
    found["seal_s"] = time.perf_counter() - sealing
    return found


def child(*arguments: object) -> dict[str, Any]:
    """A step in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], text=True, stdout=subprocess.PIPE, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row(folder: Path, executor: str, views: int) -> dict[str, Any]:
    path = folder / f"{executor}-{views}.zarr"
    prepared = child("--step", "prepare", "--dir", path, "--views", views)
    half = child("--step", "half", "--dir", path, "--executors", executor)
    rest = child("--step", "rest", "--dir", path, "--executors", executor)
    nothing = child("--step", "rest", "--dir", path, "--executors", executor)
    shutil.rmtree(path)
    return {"executor": executor, "views": views, **prepared, "half": half, "rest": rest, "nothing": nothing}


def table(rows: list[dict[str, Any]]) -> str:
    names = [
        "executor", "views", "prepare s", "first half µs/view", "second half µs/view", "rss before / peak MB",
        "resume s", "seal s", "nothing to do s",
    ]  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for r in rows:
        half, rest = r["half"], r["rest"]
        lines.append(
            f"| {r['executor']} | {r['views']:,} | {r['prepare_s']:.1f} | {half['us_per_view']:.0f} | "
            f"{rest['us_per_view']:.0f} | {rest['before_mb']:.0f} / {rest['rss_mb']:.0f} | {rest['resume_s']:.2f} | "
            f"{rest['seal_s']:.2f} | {r['nothing']['resume_s']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--executors", nargs="+", default=["serial", "processes", "dask"])
    parser.add_argument("--dir", type=Path, help="Where the stores are made; default a temporary folder.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", choices=["prepare", "half", "rest"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "prepare":
        begun = time.perf_counter()
        parts.prepare(options.dir, options.views[0])
        print(json.dumps({"prepare_s": time.perf_counter() - begun}))
    elif options.step:
        until = 0.5 if options.step == "half" else 1.0
        print(json.dumps(measure(options.dir, options.executors[0], until=until)))
    else:
        rows = []
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            for executor in options.executors:
                for views in options.views:
                    rows.append(row(Path(folder), executor, views))
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
        print(table(rows))
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
