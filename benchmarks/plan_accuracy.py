"""How well `rsmtdf plan` foretells what stage 1 then takes.

    python benchmarks/plan_accuracy.py [--scenes 4] [--seeds 2] [--teacher NAME ...] [--device auto] [--rounds 3]

Design, section 5, and the goal: within 20 %. Each round plans (a calibration of a few seconds, teachers with random
weights), then runs stage 1 for the same views into a new store and compares: seconds of the whole stage (channel
statistics, views, features, disk; not the building of teachers) and, for runs on the CPU, CPU-seconds, which other
processes on the machine disturb less. Images are a synthetic world of 512 px tiles in PNG scenes; views have 518 px.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rsmtdf.cli.caching import prepare_store
from rsmtdf.cli.pacing import pace_of, priced
from rsmtdf.cli.planning import CacheJob, plan_cache, student_grid
from rsmtdf.cli.terminal import choose_device
from rsmtdf.cli.workspace import Source
from rsmtdf.config import Experiment, parse_experiment
from rsmtdf.data.loveda import LOVEDA
from rsmtdf.data.synthetic import write_world
from rsmtdf.signals import StopFlag
from rsmtdf.specs import Teacher, to_dict
from rsmtdf.stages import cache as stage
from rsmtdf.stages.plan import now
from rsmtdf.teachers.registry import build_teacher

GOAL = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=4, help="of four tiles each")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--weak-views", type=int, default=4)
    parser.add_argument("--teacher", nargs="+", default=["dinov2_vits14"], help="presets; weights are random")
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the stores go; default the system's folder for such files")
    arguments = parser.parse_args()
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load}; {arguments.device}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        _rounds(Path(folder), arguments)


def _rounds(folder: Path, arguments: argparse.Namespace) -> None:
    write_world(folder / "data", tile_px=512, train=arguments.scenes, val=0, test=0, seed=0)
    experiment = _experiment(arguments)
    print(f"{'':<6}{'':>6}{'calibration':>12}{'elapsed s':>24}{'CPU-seconds':>24}")
    print(f"{'round':<6}{'views':>6}{'s':>12}{'plan':>8}{'run':>8}{'error':>8}{'plan':>8}{'run':>8}{'error':>8}")
    errors: dict[str, list[float]] = {"elapsed": [], "CPU": []}
    for n in range(arguments.rounds):
        job = plan_cache(Source(experiment, folder), root=folder / "data", out=folder / f"feats-{n}.zarr")
        on, grid = choose_device(arguments.device), student_grid(experiment)
        teachers = {name: build_teacher(s, student_grid=grid, device=on) for name, s in job.sources.items()}
        begun = now()
        estimate = priced(job, pace_of(job, teachers)).plan.estimate
        ready = now()
        assert estimate is not None
        _fill(job, teachers)
        done = now()
        took, cpu = done[0] - ready[0], done[1] - ready[1]
        errors["elapsed"].append(estimate.seconds / took - 1)
        errors["CPU"].append(estimate.cpu_seconds / cpu - 1)
        print(
            f"{n:<6}{job.plan.new_views:>6}{ready[0] - begun[0]:>12.1f}"
            f"{estimate.seconds:>8.1f}{took:>8.1f}{errors['elapsed'][-1]:>+8.0%}"
            f"{estimate.cpu_seconds:>8.1f}{cpu:>8.1f}{errors['CPU'][-1]:>+8.0%}  limited by {estimate.limited_by}",
            flush=True,
        )
    medians = ", ".join(f"{what} {statistics.median(found):+.0%}" for what, found in errors.items())
    print(f"median error: {medians}; goal: within {GOAL:.0%}")


def _fill(job: CacheJob, teachers: Mapping[str, Teacher]) -> None:
    """Stage 1, teachers given: as `run_cache` does it."""
    cache, stop = job.workspace.experiment.cache, StopFlag()
    store, maker = prepare_store(job, teachers, stop=stop)
    stage.fill_store(store, teachers=teachers, maker=maker, batch=cache.batch, workers=cache.workers, stop=stop)


def _experiment(arguments: argparse.Namespace) -> Experiment:
    return parse_experiment(
        {
            "root": "data",
            "dataset": to_dict(LOVEDA),
            "splits": {"by": "official", "labels": "4"},
            "teachers": [{"name": name, "weights": "random"} for name in arguments.teacher],
            "cache": {
                "seeds": arguments.seeds,
                "weak_views": arguments.weak_views,
                "codec": arguments.codec,
                "batch": arguments.batch,
                "workers": arguments.workers,
            },
        },
        where="benchmark",
    )


if __name__ == "__main__":
    main()
