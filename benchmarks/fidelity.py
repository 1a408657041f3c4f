"""What each codec of the store does to features, and how fast, with bf16 autocast of the same teacher as the yardstick.

    python benchmarks/fidelity.py [--images FOLDER] [--weights random|hub] [--views 8] [--device cpu] [--threads 1]

Features come from the paper's teachers on strong views of the images, and from two synthetic surrogates that have what
codecs must survive: massive channels and artefact tokens. Without pretrained weights (`--weights hub` downloads them)
the teachers' rows are surrogates too: real images, but random weights. Statistics are measured on as many other views.

Columns, all after standardising (so that neither a massive channel nor a mean hides the others): relative L2 error;
cosine of a token with itself, mean and least; cosine of the MSE gradient with and without the codec, with respect to
the prediction of a student that is off by noise of 30 % or 5 % of the target's energy; the same at 5 % with respect to
the weights of a linear head, a sum over all tokens, in which noise averages out and bias stays.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rsmtdf.specs import ViewRecipe
from rsmtdf.store.codecs import CODECS, STD_FLOOR, bytes_per_view
from rsmtdf.store.statistics import ChannelStatistics
from rsmtdf.teachers.presets import PRESETS
from rsmtdf.teachers.registry import build_teacher
from rsmtdf.views.params import draw_table
from rsmtdf.views.view import render

TILE_PX = 512
GRID = (37, 37)
SHARES = (0.3, 0.05)
TRIES = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of real images; without it, the surrogates alone")
    parser.add_argument("--weights", choices=("random", "hub"), default="random")
    parser.add_argument("--views", type=int, default=8, help="views measured, and views that statistics are made from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{processor()}; torch {torch.__version__} on {device}, {arguments.threads} thread(s); load {load}")
    for name, (tokens, dim, artefacts) in {
        "synthetic, DINOv2-like": (37, 768, True),
        "synthetic, CLIP-like": (16, 1024, False),
    }.items():
        features = surrogate(2 * arguments.views, tokens, dim, artefacts=artefacts)
        report(name, features.to(device))
    if arguments.images is None:
        print("\nno --images: teachers not measured")
        return
    pixels = strong_views(arguments.images, 2 * arguments.views).to(device)
    for name in ("dinov2_vitb14", "clip_vitl14"):
        kind = "real weights" if arguments.weights == "hub" else "random weights: surrogate"
        features, half = taught(name, pixels, weights=arguments.weights)
        report(f"{name}, {kind}, real images", features, half)


def report(title: str, features: torch.Tensor, half: torch.Tensor | None = None) -> None:
    """Prints one table: statistics from the first half of the views, every codec on the second."""
    views = len(features) // 2
    statistics = ChannelStatistics(features.shape[-1])
    statistics.update(features[:views])
    facts, x = statistics.summary(), features[views:]
    mean, std = statistics.mean, statistics.std
    print(
        f"\n{title}: {views} views of {x.shape[1]} tokens, {x.shape[2]} channels; {len(facts['outlier_channels'])} "
        f"massive and {len(facts['constant_channels'])} constant channels, {facts['outlier_tokens']} outlier tokens of "
        f"{facts['tokens']:,} (norm {facts['token_norm_median']:.3g} median, {facts['token_norm_max']:.3g} at most)"
    )
    head = ["", "KB a view", "error", "cosine mean", "cosine least", "gradient 30 %", "gradient 5 %", "summed 5 %"]
    print(" | ".join([*head, "encode MB/s", "decode MB/s", "same bits as the CPU"]))
    if half is not None:
        print(" | ".join(["bf16 autocast", "", *quality(x, half[views:], mean, std), "", "", ""]))
    for name, codec in CODECS.items():
        encoded = codec.encode(x, mean=mean, std=std)
        decoded = codec.decode(encoded, mean=mean, std=std, device=x.device)
        megabytes = x.numel() * 2 / 1e6
        rates = [
            megabytes / quickest(lambda c=codec: c.encode(x, mean=mean, std=std), x.device),
            megabytes / quickest(lambda c=codec, e=encoded: c.decode(e, mean=mean, std=std, device=x.device), x.device),
        ]
        on_cpu = codec.encode(x.cpu(), mean=mean, std=std)
        same = all(torch.equal(values.cpu(), on_cpu[array]) for array, values in encoded.items())
        size = bytes_per_view(name, *x.shape[1:]) / 1e3
        cells = [name, f"{size:.0f}", *quality(x, decoded, mean, std), *(f"{rate:.0f}" for rate in rates)]
        print(" | ".join([*cells, "yes" if same else "NO"]))


def quality(x: torch.Tensor, y: torch.Tensor, mean: np.ndarray, std: np.ndarray) -> list[str]:
    """The columns of the table for features `y` in place of `x`."""
    spread = torch.from_numpy(std).clamp(min=STD_FLOOR)
    z, w = (((a.cpu() - torch.from_numpy(mean)) / spread).double() for a in (x, y))
    energy, error = z.square().mean(), w - z
    cosine = torch.cosine_similarity(z, w, dim=-1)
    cells = [f"{float(error.norm() / z.norm()):.5f}", f"{float(cosine.mean()):.6f}", f"{float(cosine.min()):.6f}"]
    generator = torch.Generator().manual_seed(1)
    for share in SHARES:
        residual = torch.randn(z.shape, generator=generator, dtype=torch.float64) * (energy * share).sqrt()
        cells.append(f"{float(torch.cosine_similarity(residual.flatten(), (residual - error).flatten(), dim=0)):.4f}")
    cells.append(f"{summed(z, error, float(energy * SHARES[-1]), generator):.4f}")
    return cells


def summed(z: torch.Tensor, error: torch.Tensor, energy: float, generator: torch.Generator) -> float:
    """Cosine of the gradient of a linear head's weights with and without `error`: a sum over all tokens.

    The head sees 256 random features of the target; the student's residual is a fixed linear map of them, so that its
    gradient adds up over tokens as a real student's does.
    """
    dim = z.shape[-1]
    inputs = torch.nn.functional.gelu(z.flatten(0, 1) @ torch.randn(dim, 256, generator=generator).double() / dim**0.5)
    residual = inputs @ torch.randn(256, dim, generator=generator).double()
    residual *= (energy / residual.square().mean()).sqrt()
    exact, changed = inputs.T @ residual, inputs.T @ (residual - error.flatten(0, 1))
    return float(torch.cosine_similarity(exact.flatten(), changed.flatten(), dim=0))


def taught(name: str, pixels: torch.Tensor, *, weights: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of `pixels` in float32 and under bf16 autocast, of the paper's teacher `name`, on the pixels' device."""
    source = PRESETS[name]
    if weights == "random":
        source = dataclasses.replace(source, weights="random")
        if source.library == "timm":
            # timm starts LayerScale at 1e-5: random blocks would do nothing. Trained ones are of the order of 1.
            source = dataclasses.replace(source, overrides={"init_values": 1.0})
    found = []
    for dtype in ("float32", "bfloat16"):
        teacher = build_teacher(
            dataclasses.replace(source, compute_dtype=dtype), student_grid=GRID, device=pixels.device
        )
        found.append(torch.cat([teacher(part) for part in pixels.split(1)]))
    return found[0], found[1]


def strong_views(folder: Path, count: int) -> torch.Tensor:
    """uint8 [count, 518, 518, 3]: strong views (before CutMix) of the first images that are large enough, in turn."""
    recipe = ViewRecipe()
    tiles: list[np.ndarray] = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".tif") and len(tiles) < count:
            with Image.open(path) as file:
                if min(file.size) >= TILE_PX:
                    tiles.append(np.asarray(file.convert("RGB"))[:TILE_PX, :TILE_PX])
    if not tiles:
        raise SystemExit(f"no image of at least {TILE_PX} px in {folder}")
    table = draw_table(recipe, tile_ids=[f"t{i}" for i in range(count)], tile_px=TILE_PX, stream="strong", seed=0)
    valid = np.ones((TILE_PX, TILE_PX), np.bool_)
    views = [render(tiles[i % len(tiles)], valid, table[i], recipe=recipe).pixels for i in range(count)]
    return torch.from_numpy(np.stack(views))


def surrogate(views: int, side: int, dim: int, *, artefacts: bool) -> torch.Tensor:
    """float32 [views, side * side, dim]: a falling spectrum, smooth in its leading directions, normalised per token.

    Then either 1.5 % artefact tokens along one direction (as plain DINOv2 has), or four massive channels and 1 % tokens
    three times as large (as CLIP has before its last norm). What is known of the real ones in kind, guessed in degree.
    """
    generator = torch.Generator().manual_seed(dim)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    smooth = torch.nn.functional.interpolate(normal(views, 64, 8, 8), size=(side, side), mode="bicubic")
    parts = torch.cat([smooth.flatten(2).transpose(1, 2), normal(views, side * side, dim - 64)], dim=-1)
    parts *= torch.arange(1, dim + 1).float() ** -0.5
    basis, _ = torch.linalg.qr(normal(dim, dim))
    x = torch.nn.functional.layer_norm(parts @ basis, (dim,))
    x = x * (0.3 * normal(dim)).exp() + 0.5 * normal(dim)
    chosen = torch.rand(views, side * side, generator=generator)
    if artefacts:
        return x + (chosen < 0.015).unsqueeze(-1) * 4 * normal(dim)
    x[..., [7, 100, 500, 900]] *= torch.tensor([15.0, 20.0, 25.0, 30.0])
    return x * torch.where(chosen < 0.01, 3.0, 1.0).unsqueeze(-1)


def quickest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest try: of this thread on the CPU, by the clock elsewhere."""
    tries = []
    for _ in range(TRIES):
        if device.type == "cpu" and torch.get_num_threads() == 1:
            start = time.thread_time()
            work()
            tries.append(time.thread_time() - start)
        else:
            torch.accelerator.synchronize() if device.type != "cpu" else None
            start = time.perf_counter()
            work()
            torch.accelerator.synchronize() if device.type != "cpu" else None
            tries.append(time.perf_counter() - start)
    return min(tries)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
