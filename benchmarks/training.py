"""One training step with cached features against the same step with the teachers online, paired, in CPU-seconds.

    python benchmarks/training.py [--pairs 3] [--batch 2]

The paper's sizes (518 px; DINOv2-S student, DINOv2-B and CLIP-L teachers) with random weights, which cost the same.
Design, section 9: at least 1.9 (arithmetic limit 2.01). Also the peak memory of each kind, from processes of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rsmtdf.cli.caching import run_cache
from rsmtdf.cli.planning import plan_cache
from rsmtdf.cli.terminal import say
from rsmtdf.cli.training import TrainOptions, open_job
from rsmtdf.cli.workspace import Source
from rsmtdf.config import parse_experiment
from rsmtdf.data.loveda import LOVEDA
from rsmtdf.data.synthetic import write_world
from rsmtdf.signals import StopFlag
from rsmtdf.specs import to_dict
from rsmtdf.stages.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="steps of each kind that count, after one warm-up")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("STORE", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_measure(Path(arguments.one[0]), arguments.one[1], arguments.pairs)))
        return
    with tempfile.TemporaryDirectory() as folder:
        store = _store(Path(folder), arguments.batch)
        found = {kind: _in_a_process(store, kind, arguments) for kind in ("online", "cached")}
    _report(found, arguments)


def _store(folder: Path, batch: int) -> Path:
    """A store of one seed of a few synthetic tiles, from full-size teachers."""
    write_world(folder / "data", tile_px=512, train=max(batch // 2, 1), val=0, test=0, seed=0)
    random = {"weights": "random"}
    experiment = parse_experiment(
        {
            "dataset": to_dict(LOVEDA),
            "root": "data",
            "splits": {"by": "official", "labels": "2"},
            "teachers": [{"name": "dinov2_vitb14", **random}, {"name": "clip_vitl14", **random}],
            "student": random,
            "cache": {"seeds": 1, "weak_views": 1, "batch": 2},
            "train": {"recipe": "paper", "batch": batch, "micro_batch": batch, "epochs": 100, "log_every": 1},
        },
        where="benchmark",
    )
    job = plan_cache(Source(experiment, folder), root=folder / "data", out=folder / "feats.zarr")
    run_cache(job, device="cpu", stop=StopFlag(), say=say)
    return folder / "feats.zarr"


def _in_a_process(store: Path, kind: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The kinds run in processes of their own, so that the peak memory of one is not the other's."""
    command = [sys.executable, __file__, "--one", str(store), kind, "--pairs", str(arguments.pairs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _measure(store: Path, kind: str, steps: int) -> dict[str, list[float]]:
    options = TrainOptions(
        cache=store,
        out=store.parent / f"run-{kind}",
        device="cpu",
        teachers=kind,
        train={"budget": f"{steps + 1}-steps"},
        overrides=["train.validate_every=1000000"],
    )
    with contextlib.ExitStack() as opened:
        job = open_job(options, say=say, opened=opened)
        marks: list[tuple[float, float]] = [(time.process_time(), time.perf_counter())]
        train(
            job,
            resume=False,
            stop=StopFlag(),
            progress=lambda done, total, note: marks.append((time.process_time(), time.perf_counter())),
        )
    gaps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks[1:])]
    return {
        "cpu": [g[0] for g in gaps],
        "wall": [g[1] for g in gaps],
        "peak_gib": [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20],
    }


def _report(found: dict[str, dict[str, list[float]]], arguments: argparse.Namespace) -> None:
    online, cached = found["online"], found["cached"]
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load}; no GPU")
    print(f"batch {arguments.batch}+{arguments.batch} at 518 px, {arguments.pairs} steps of each after one warm-up")
    for name, unit in (("cpu", "CPU-s a step"), ("wall", "wall s a step"), ("peak_gib", "GiB peak RSS")):
        a, b = statistics.median(online[name]), statistics.median(cached[name])
        print(f"{unit:<14} online {a:8.2f}   cached {b:8.2f}   online / cached {a / b:.2f}")


if __name__ == "__main__":
    main()
