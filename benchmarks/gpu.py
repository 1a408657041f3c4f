"""The benchmarks on a GPU.

    python benchmarks/gpu.py stage1 [--views 512] [--batch auto] [--device cuda] [--json FILE] [--markdown FILE]

`stage1`: DINOv2-B at 518 px and CLIP-L at 224 px in bfloat16 with random weights (speed does not depend on them): views
per second of the whole pipeline and of the bare teachers, their share of what the device does in a large bfloat16
matrix product, and the rate at which each codec's bytes are written. Where there is no GPU it says so, and that is all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rasterio.errors import NotGeoreferencedWarning
from stage1_parts import pages
from stage1_parts.world import PAPER, World, build_teachers, fill
from torch.utils.flop_counter import FlopCounterMode

from rsmtdf.specs import Teacher
from rsmtdf.stages import cache
from rsmtdf.store.codecs import CODECS

GOAL_SHARE = 0.90
CROP_PX = 518
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    stage1 = parts.add_parser("stage1", help="caching features")
    stage1.add_argument("--views", type=int, default=512, help="a round")
    stage1.add_argument("--batch", default="auto", help="auto, or a number")
    stage1.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that make views")
    stage1.add_argument("--device", default="cuda")
    stage1.add_argument("--dir", type=Path, help="where the stores go (default: the system's temporary folder)")
    stage1.add_argument("--json", type=Path, metavar="FILE")
    stage1.add_argument("--markdown", type=Path, metavar="FILE", help="puts the tables into it: docs/benchmarks.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", NotGeoreferencedWarning)  # PNG has no georeference
    if not torch.cuda.is_available():
        print("not measured on a GPU: this machine has none that PyTorch can use")
        return
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        found = measure_stage1(Path(folder), arguments)
    text = report(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.markdown:
        pages.put_between(arguments.markdown, "gpu.py", text)
    print(text)


def measure_stage1(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Pipeline and bare teachers in turns, under each codec; everything as JSON-ready data."""
    device = torch.device(arguments.device)
    teachers = build_teachers(PAPER, dtype="bfloat16", device=device, crop_px=CROP_PX)
    asked = "auto" if arguments.batch == "auto" else int(arguments.batch)
    batch = cache.choose_batch(asked, teachers, crop_px=CROP_PX)
    pixels = torch.randint(0, 256, (batch, CROP_PX, CROP_PX, 3), dtype=torch.uint8, device=device)
    found: dict[str, Any] = {
        "machine": pages.machine(device),
        "batch": batch,
        "workers": arguments.workers,
        "views": arguments.views,
        "flops_per_view": flops(teachers, pixels) / batch,
        "peak_flops": peak(device),
        "codecs": {},
    }
    world = World(folder, tiles=arguments.views)
    views = len(world.tiles)
    for codec in CODECS:
        store, maker = world.store(
            f"{codec}.zarr", teachers, codec=codec, seeds=ROUNDS + 1, shard_views=64, batch=batch
        )
        each = store.n_shards // (ROUNDS + 1)
        rows: list[dict[str, Any]] = []
        for k in range(ROUNDS + 1):
            alone = bare(teachers, pixels, batches=max(views // batch, 1))
            shards = range(k * each, (k + 1) * each)
            made = fill(store, teachers, maker, batch=batch, workers=arguments.workers, shards=shards)
            rows.append(
                {
                    "bare_views_per_s": alone,
                    "views_per_s": made.views / made.seconds,
                    "gb_per_s": made.bytes_written / made.seconds / 1e9,
                    "device_busy": made.device_share,
                    "busy_s": made.busy,
                    "limited_by": made.limited_by,
                }
            )
        found["codecs"][codec] = rows[1:]  # the first is to warm up
    return found


def flops(teachers: Mapping[str, Teacher], pixels: torch.Tensor) -> float:
    """Floating-point operations of one batch of all teachers, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        for teacher in teachers.values():
            teacher(pixels)
    return float(counter.get_total_flops())


def peak(device: torch.device, *, side: int = 8192, times: int = 20) -> float:
    """Operations per second of a large bfloat16 matrix product: the best of five, as nothing else is known to be."""
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    rates = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        for _ in range(times):
            a @ b
        torch.cuda.synchronize(device)
        rates.append(2 * side**3 * times / (time.perf_counter() - begun))
    return max(rates)


def bare(teachers: Mapping[str, Teacher], pixels: torch.Tensor, *, batches: int) -> float:
    """Views per second of the teachers alone, pixels on the device."""
    torch.cuda.synchronize(pixels.device)
    begun = time.perf_counter()
    for _ in range(batches):
        for teacher in teachers.values():
            teacher(pixels)
    torch.cuda.synchronize(pixels.device)
    return batches * len(pixels) / (time.perf_counter() - begun)


def report(found: Mapping[str, Any]) -> str:
    """Everything as Markdown."""
    lines, met = [], []
    for codec, rounds in found["codecs"].items():
        middle = {
            key: statistics.median(r[key] for r in rounds)
            for key in ("bare_views_per_s", "views_per_s", "gb_per_s", "device_busy")
        }
        share = statistics.median(r["views_per_s"] / r["bare_views_per_s"] for r in rounds)
        met.append(share >= GOAL_SHARE)
        of_peak = middle["views_per_s"] * found["flops_per_view"] / found["peak_flops"]
        lines.append(
            [
                codec,
                f"{middle['views_per_s']:.1f}",
                f"{middle['bare_views_per_s']:.1f}",
                f"{share:.3f}",
                f"{of_peak:.0%}",
                f"{middle['gb_per_s']:.2f}",
                f"{middle['device_busy']:.0%}",
                rounds[-1]["limited_by"],
            ]
        )
    head = ["codec", "views/s", "bare teachers, views/s", "pipeline / bare", "of the bf16 peak", "GB/s written"]
    teachers = "DINOv2-B at 518 px and CLIP-L at 224 px, bfloat16, random weights"
    setting = f"{found['views']} views a round, batches of {found['batch']}, {found['workers']} threads for views"
    gflop, peak_tflops = found["flops_per_view"] / 1e9, found["peak_flops"] / 1e12
    parts = [
        found["machine"],
        f"**Stage 1 on a GPU** ({teachers}; {setting})",
        pages.table([*head, "device busy", "limited by"], lines),
        f"A view is {gflop:.0f} GFLOP; the peak, measured by a matrix product, is {peak_tflops:.0f} TFLOP/s.",
        f"Goal: pipeline / bare >= {GOAL_SHARE}: {'met' if all(met) else 'MISSED'}.",
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
