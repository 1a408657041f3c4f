"""How long a training loop waits for its data: a step of 32 + 32 views that computes nothing for 30 ms.

    python benchmarks/data_wait.py [--steps 40] [--micro-batch 2] [--codec int8] [--workers N] [--threads N]

Design, section 9: a share of at most 3 %, views, features and decoding included. The store has the paper's sizes
(views of 518 px; 1369 x 768 and 256 x 1024 features) over a small synthetic world, with random numbers for features;
rows come from the sampler, views and features are made ahead as `rsmtdf train` does. The fake step sleeps, so it
leaves all cores to the data: true of a step on a GPU, not of one on the CPU. The files are in the page cache. Without
a GPU features are decoded on the CPU, which is most of their cost here.

Three rows: views taken as given (features read, verified and decoded); features taken as given; both. With
--store-pixels two more, for which views are read from the store instead of made: without and with features.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from rsmtdf.cli.planning import plan_cache, student_grid
from rsmtdf.cli.workspace import Source
from rsmtdf.config import parse_experiment
from rsmtdf.data.loveda import LOVEDA
from rsmtdf.data.synthetic import write_world
from rsmtdf.learning.sampler import Schedule
from rsmtdf.signals import StopFlag
from rsmtdf.specs import to_dict
from rsmtdf.stages import cache as stage
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.pixel_reader import PixelReader
from rsmtdf.store.queries import strong_pairs, weak_rows
from rsmtdf.store.statistics import ChannelStatistics
from rsmtdf.store.status import crc_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.teachers.registry import describe
from rsmtdf.views.batches import BatchMaker, PixelCheck
from rsmtdf.views.maker import ViewMaker
from rsmtdf.views.view import view_crc

BATCH = 32
GOAL = 0.03
WARM_UP = 2
SCENES, WEAK_VIEWS, LABELLED = 12, 8, 16


@dataclass(frozen=True)
class Data:
    store: FeatureStore
    maker: ViewMaker
    schedule: Schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="that count, after two to warm up")
    parser.add_argument("--step-ms", type=float, default=30)
    parser.add_argument("--micro-batch", type=int, default=2, help="of each kind; 2 is the default of training")
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--device", default="cpu", help="where targets are decoded")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that make views")
    parser.add_argument("--store-pixels", action="store_true", help="also with views that are read from the store")
    parser.add_argument("--threads", type=int, default=None, help="threads that read features (train.feature_threads)")
    arguments = parser.parse_args()
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load}; {arguments.device}")
    with tempfile.TemporaryDirectory() as folder:
        data = _data(Path(folder), arguments.codec)
        print(
            f"{BATCH}+{BATCH} views a step in micro-batches of {arguments.micro_batch}+{arguments.micro_batch}, "
            f"{arguments.codec}, {arguments.steps} steps of {arguments.step_ms:g} ms; goal: waits of {GOAL:.0%} or less"
        )
        print(f"{'':<24}{'share':>8}{'wait ms a step':>18}{'CPU ms a step':>16}")
        rows = [("features", False, True, False), ("views", True, False, False), ("both", True, True, False)]
        if arguments.store_pixels:
            _store_pixels(data, arguments.workers)
            rows += [("stored views", True, False, True), ("both, views stored", True, True, True)]
        for name, views, features, stored in rows:
            waited, passed, cpu = _run(data, arguments, views=views, features=features, stored=stored)
            n = arguments.steps
            print(f"{name:<24}{waited / passed:>8.1%}{1e3 * waited / n:>18.1f}{1e3 * cpu / n:>16.1f}", flush=True)
    cores = os.cpu_count() or 1
    print(
        f"{cores} cores give {cores * arguments.step_ms:g} CPU ms a step: what needs more of them waits, "
        "and so does what shares them"
    )


def _data(folder: Path, codec: str) -> Data:
    """A finished store of synthetic tiles and random features."""
    write_world(folder / "data", tile_px=512, train=SCENES, val=0, test=0, seed=0)
    experiment = parse_experiment(
        {
            "dataset": to_dict(LOVEDA),
            "root": "data",
            "splits": {"by": "official", "labels": str(LABELLED)},
            "cache": {"seeds": 1, "weak_views": WEAK_VIEWS, "codec": codec},
            "train": {"recipe": "paper", "batch": BATCH, "micro_batch": BATCH},
        },
        where="benchmark",
    )
    job = plan_cache(Source(experiment, folder), root=folder / "data", out=folder / "feats.zarr")
    work = job.workspace
    store = FeatureStore.create(
        folder / "feats.zarr", recipe=experiment.views, dataset=experiment.dataset, data_root="data", experiment={}
    )
    stage.grow_store(store, pool=work.pool, labelled=work.labelled, strong_seeds=1, weak_views=WEAK_VIEWS, plain=False)
    random = torch.Generator().manual_seed(0)
    features = {}
    for name, source in job.sources.items():
        spec = replace(describe(source, student_grid=student_grid(experiment)), weights_sha256="none: random numbers")
        features[name] = torch.randn(store.shard_views, spec.tokens, spec.dim, generator=random)
        statistics = ChannelStatistics(spec.dim)
        statistics.update(features[name][:4])
        store.add_teacher(spec, codec=codec, statistics=statistics)
    maker = stage.view_maker(store, reader=work.dataset, tiles={t: work.tiles[t] for t in store.tile_ids})
    for shard in range(store.n_shards):
        rows = store.rows_of_shard(shard).tolist()
        crcs = {row: view_crc(maker.mixed([row])[0]) for row in rows}
        given = {name: f[: len(rows)] for name, f in features.items()}
        store.write_shard(shard, view_crcs=crcs, skipped={}, features=given, provenance={})
    usable = store.usable(list(features))
    schedule = Schedule(
        pairs=strong_pairs(store, work.pool, usable),
        weak=weak_rows(store, sorted(work.labelled), usable),
        batch=BATCH,
        seed=0,
    )
    return Data(store, maker, schedule)


def _store_pixels(data: Data, workers: int) -> None:
    """Stores the pixels of all views and says what that took."""
    data.store.add_pixels()
    report = stage.store_pixels(data.store, maker=data.maker, workers=workers, stop=StopFlag())
    rate = report.views / report.seconds
    print(f"pixels of {report.views:,} views stored: {report.bytes_written / 1e6:,.0f} MB, {rate:.0f} views/s")


def _run(
    data: Data, arguments: argparse.Namespace, *, views: bool, features: bool, stored: bool
) -> tuple[float, float, float]:
    """Seconds waited, passed, and of CPU, over the steps that count."""
    micro, steps = arguments.micro_batch, WARM_UP + arguments.steps
    per_step = BATCH // micro
    ahead = max(2, per_step)
    crcs = crc_of(data.store.view_status())
    check = PixelCheck(crcs, strict=True, where="the store")
    kept = PixelReader(data.store) if stored else None
    batches = BatchMaker(maker=data.maker, check=check, workers=arguments.workers, ahead=ahead, kept=kept)

    def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for step in range(steps):
            for part in data.schedule.rows(step).micro_batches(micro):
                yield part.labelled, part.strong

    nothing: Iterator[object] = itertools.repeat(None)
    with CachedFeatures(
        data.store, list(data.store.teachers), device=arguments.device, threads=arguments.threads
    ) as source:
        made = batches.batches(rows()) if views else nothing
        read = source.stream((np.concatenate(pair) for pair in rows()), ahead=ahead) if features else nothing
        waited = 0.0
        begun, cpu = time.perf_counter(), time.process_time()
        for step in range(steps):
            if step == WARM_UP:
                waited, begun, cpu = 0.0, time.perf_counter(), time.process_time()
            before = time.perf_counter()
            held = [(next(made), next(read)) for _ in range(per_step)]
            waited += time.perf_counter() - before
            time.sleep(arguments.step_ms / 1e3)
            del held
        found = waited, time.perf_counter() - begun, time.process_time() - cpu
    batches.close()
    if kept is not None:
        kept.close()
    return found


if __name__ == "__main__":
    main()
