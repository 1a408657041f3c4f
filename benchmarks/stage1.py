"""Stage 1 against the teacher alone: speed, memory and cost as the number of views grows.

    python benchmarks/stage1.py [--quick] [--rounds 7] [--json FILE] [--markdown docs/benchmarks.md]

The pipeline (decode, view, teacher, encode, write, commit) and the bare forward passes of the same views in the same
batches take turns, and their ratio is paired. Memory and cost are those of processes of their own, with a teacher that
costs next to nothing, so that what grows is the pipeline's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rasterio.errors import NotGeoreferencedWarning
from stage1_parts import pages
from stage1_parts.world import SMALL, TINY, Plain, World, build_teachers, fill

from rsmtdf.signals import StopFlag
from rsmtdf.specs import DatasetSpec, FeatureSpec, Tile, ViewRecipe
from rsmtdf.stages import cache
from rsmtdf.stages.cache.transfer import pixels_of
from rsmtdf.store.store import FeatureStore

GOAL_SHARE = 0.95
CROP_PX = 518
CPU = torch.device("cpu")
WORKERS = 2
GROWTH_CROP_PX = 112
"""Of the views by which memory is measured: 50 kB each, so that 10,000 which stay would be half a gigabyte."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="pairs of pipeline and bare teacher")
    parser.add_argument("--views", type=int, default=16, help="a round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure, as data")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="puts the tables into it: docs/benchmarks.md")
    parser.add_argument("--grow", type=int, help=argparse.SUPPRESS)  # one process of `measure_growth`
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", NotGeoreferencedWarning)  # PNG has no georeference
    if arguments.grow is not None:
        print(json.dumps(grown(arguments.grow)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "machine": pages.machine(),
            "quick": arguments.quick,
            "pipeline": measure_pipeline(Path(folder), arguments),
            "growth": measure_growth((20, 40) if arguments.quick else (100, 1_000, 10_000)),
        }
    text = report(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.markdown:
        pages.put_between(arguments.markdown, "stage1.py", text)
    print(text)


def measure_pipeline(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both, round by round: a new seed of all tiles each time, so nothing is there already."""
    quick, batch = arguments.quick, arguments.batch
    rounds, crop = (2, 56) if quick else (arguments.rounds, CROP_PX)
    described = TINY if quick else SMALL
    teachers = build_teachers(described, dtype="float32", device=CPU, crop_px=crop)
    world = World(folder, tiles=4 if quick else arguments.views)
    per_seed = len(world.tiles)
    store, maker = world.store(
        "feats.zarr", teachers, codec="int8", seeds=rounds + 1, shard_views=min(batch, per_seed), batch=batch
    )
    (teacher,) = teachers.values()
    shards_each = store.n_shards // (rounds + 1)
    rows: list[dict[str, dict[str, float]]] = []
    busy = []
    for k in range(rounds + 1):
        shards = range(k * shards_each, (k + 1) * shards_each)
        shown = [
            pixels_of(maker.mixed(rows[start : start + batch]), CPU)
            for rows in (store.rows_of_shard(shard).tolist() for shard in shards)
            for start in range(0, len(rows), batch)
        ]

        def whole(shards: range = shards) -> cache.CacheReport:
            return fill(store, teachers, maker, batch=batch, workers=WORKERS, shards=shards)

        def alone(shown: list[torch.Tensor] = shown) -> None:
            for pixels in shown:
                teacher(pixels)

        times: dict[str, dict[str, float]] = {}
        for name in ("pipeline", "bare") if k % 2 else ("bare", "pipeline"):
            begun, used = time.perf_counter(), time.process_time()
            made = whole() if name == "pipeline" else alone()
            times[name] = {"wall": time.perf_counter() - begun, "cpu": time.process_time() - used}
            if isinstance(made, cache.CacheReport) and k:
                busy.append(made.busy)
        if k:  # the first pair is to warm up
            rows.append(times)
        wall, cpu = (times["bare"][of] / times["pipeline"][of] for of in ("wall", "cpu"))
        say(f"round {k} of {rounds}: {wall:.3f} ({cpu:.3f} of CPU seconds)")
    return {
        "teacher": next(iter(described)),
        "views": per_seed,
        "batch": batch,
        "workers": WORKERS,
        "pipeline_s": [r["pipeline"]["wall"] for r in rows],
        "bare_s": [r["bare"]["wall"] for r in rows],
        "share": [r["bare"]["wall"] / r["pipeline"]["wall"] for r in rows],
        "cpu_share": [r["bare"]["cpu"] / r["pipeline"]["cpu"] for r in rows],
        "busy_s": {part: statistics.fmean(b[part] for b in busy) for part in busy[0]},
    }


def measure_growth(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """What so many views cost a process of its own: peak memory, and seconds of the pipeline."""
    found = []
    for views in sizes:
        say(f"{views:,} views in a process of their own")
        command = [sys.executable, __file__, "--grow", str(views)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        found.append(json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout))
    return found


class Noise:
    """Tiles without files."""

    def __init__(self) -> None:
        self._pixels = np.arange(128 * 128 * 3, dtype=np.uint32).astype(np.uint8).reshape(128, 128, 3)
        self._valid = np.ones((128, 128), np.bool_)

    def read_image(self, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        return self._pixels, self._valid

    def read_label(self, tile: Tile) -> np.ndarray:
        raise NotImplementedError


class Free:
    """A teacher that costs next to nothing."""

    spec = FeatureSpec(
        name="free", library="fake", model="free", weights_sha256="00", input_px=(112, 112), grid=(8, 8), dim=64
    )

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, ::14, ::14, :1].flatten(1, 2).float().expand(-1, -1, 64) / 255


def grown(views: int) -> dict[str, Any]:
    """One measurement, in this process."""
    tiles = {
        f"s/{k}_0": Tile(id=f"s/{k}_0", image="s.png", mask=None, x0=0, y0=0, width=128, height=128) for k in range(10)
    }
    spec = DatasetSpec(name="noise", classes=("a", "b"), palette=((0, 0, 0), (1, 1, 1)), tile_px=128)
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore.create(
            Path(folder) / "feats.zarr",
            recipe=ViewRecipe(crop_px=GROWTH_CROP_PX),
            dataset=spec,
            data_root=folder,
            experiment={},
        )
        cache.grow_store(
            store, pool=[], labelled=sorted(tiles), strong_seeds=0, weak_views=views // len(tiles), plain=False
        )
        maker = cache.view_maker(store, reader=Noise(), tiles=tiles)
        store.add_teacher(Free.spec, codec="int8", statistics=Plain(64), rule={})
        before = peak_mb()
        begun = time.perf_counter()
        made = cache.fill_store(
            store, teachers={"free": Free()}, maker=maker, batch=8, workers=WORKERS, stop=StopFlag()
        )
        seconds = time.perf_counter() - begun
    return {"views": made.views, "seconds": seconds, "before_mb": before, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """The most memory that this process had at a time. Not `ru_maxrss`, which a child takes over from its parent."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def report(found: dict[str, Any]) -> str:
    """Everything as Markdown."""
    p, growth = found["pipeline"], found["growth"]
    share, low, high = statistics.median(p["share"]), min(p["share"]), max(p["share"])
    rate, bare = (p["views"] / statistics.median(p[key]) for key in ("pipeline_s", "bare_s"))
    cpu = statistics.median(p["cpu_share"])
    head = [
        "teacher",
        "bare teacher, views/s",
        "pipeline, views/s",
        "pipeline / bare, paired",
        "range",
        "of CPU seconds",
        "rounds",
    ]
    line = [
        p["teacher"],
        f"{bare:.2f}",
        f"{rate:.2f}",
        f"{share:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{cpu:.3f}",
        str(len(p["share"])),
    ]
    setting = f"{p['views']} views a round, batches of {p['batch']}, {p['workers']} threads for views"
    parts = [
        found["machine"],
        f"**Stage 1 end to end over the bare teacher** ({setting})",
        pages.table(head, [line]),
        "Busy seconds a round: " + ", ".join(f"{part} {s:.2f}" for part, s in p["busy_s"].items()) + ".",
        "**Memory and cost as views grow** (a teacher that costs nothing, a process each)",
        pages.table(
            ["views", "peak memory, MB", "of it before the first view", "ms a view"],
            [
                [
                    f"{g['views']:,}",
                    f"{g['peak_mb']:.0f}",
                    f"{g['before_mb']:.0f}",
                    f"{1000 * g['seconds'] / g['views']:.2f}",
                ]
                for g in growth
            ],
        ),
    ]
    first, last = growth[-2], growth[-1]
    slope = (last["peak_mb"] - first["peak_mb"]) / (last["views"] - first["views"]) * 1000
    a, b = (g["seconds"] / g["views"] for g in (first, last))
    parts.append(
        f"From {first['views']:,} to {last['views']:,} views, memory grows by {slope:.2f} MB per 1,000 views "
        f"(their pixels are {GROWTH_CROP_PX**2 * 4 / 1e3:.0f} MB per 1,000), and one costs {b / a:.2f} times as much."
    )
    if not found["quick"]:
        parts.append(
            f"Goal: pipeline / bare >= {GOAL_SHARE}: {'met' if share >= GOAL_SHARE else 'MISSED'} ({share:.3f})."
        )
    return "\n\n".join(parts)


def say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
