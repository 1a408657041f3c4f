"""How long a view takes on one core, against a plain Pillow chain of the same augmentation.

    python benchmarks/views.py [--views 200] [--images FOLDER]

Every view is made both ways in turn, so whatever else the machine does falls on both; times are CPU seconds of the
one thread, and a row shows the median and the mean over views (the goal, 10 ms from a 512 px PNG, is about the mean).
The images are procedural: a smooth landscape with fine texture, whose PNG is as hard to decode as an aerial photo's.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import rasterio
from PIL import Image, ImageEnhance, ImageFilter
from rasterio.errors import NotGeoreferencedWarning

from rsmtdf.specs import ViewRecipe
from rsmtdf.views.params import HUE_TURN, JITTER_ORDERS, UNIT, Resolved, draw_table, resolve
from rsmtdf.views.view import View, paste, render, render_both, view_crc

GOAL_MS = 10.0
TRIES = 3
SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "dubai" / "images"


def landscape(side: int, seed: int) -> np.ndarray:
    """uint8 [side, side, 3]: noise of several octaves with a few rectangles (fields, roofs)."""
    rng = np.random.default_rng(seed)
    image = np.zeros((side, side, 3))
    for cells, weight in ((4, 90), (16, 45), (64, 25), (side, 14)):
        grid = rng.normal(0, 1, (cells, cells, 3)) + rng.normal(0, 1, (cells, cells, 1))
        layers = [
            np.asarray(Image.fromarray(grid[:, :, c].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))
            for c in range(3)
        ]
        image += weight / 2 * np.stack(layers, axis=-1)
    for _ in range(30):
        y, x = rng.integers(0, side, 2)
        h, w = rng.integers(8, side // 6, 2)
        image[y : y + h, x : x + w] = image[y : y + h, x : x + w] * 0.3 + rng.normal(0, 50, 3)
    return np.clip(image + 115, 0, 255).astype(np.uint8)


def read_raster(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A tile through rasterio, as the data layer reads it: channel planes seen as [h, w, 3], and what is valid."""
    with rasterio.open(path) as source:
        planes = source.read()
    return planes.transpose(1, 2, 0), np.ones(planes.shape[1:], np.bool_)


def plain_chain(path: Path, p: Resolved, other: np.ndarray, crop: int) -> np.ndarray:
    """The usual chain on Pillow images, with the same parameters: uint8 [crop, crop, 3]."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    image = image.resize((p.scaled_w, p.scaled_h), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (max(crop, p.scaled_w), max(crop, p.scaled_h)))
    canvas.paste(image, (0, 0))
    image = canvas.crop((p.crop_x, p.crop_y, p.crop_x + crop, p.crop_y + crop))
    if p.hflip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for step in JITTER_ORDERS[p.jitter_order] if p.jitter else ():
        if step == 0:
            image = ImageEnhance.Brightness(image).enhance(p.brightness / UNIT)
        elif step == 1:
            image = ImageEnhance.Contrast(image).enhance(p.contrast / UNIT)
        elif step == 2:
            image = ImageEnhance.Color(image).enhance(p.saturation / UNIT)
        else:
            hue, saturation, value = image.convert("HSV").split()
            turned = np.asarray(hue) + np.uint8(round(p.hue / HUE_TURN * 256) % 256)
            image = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
    if p.grey:
        image = image.convert("L").convert("RGB")
    if p.blur_radius:
        image = image.filter(ImageFilter.GaussianBlur(p.blur_radius))
    out = np.array(image)
    box = (slice(p.cut_y, p.cut_y + p.cut_h), slice(p.cut_x, p.cut_x + p.cut_w))
    out[box] = other[box]
    return out


def cpu_ms(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.thread_time()
    result = work()
    return (time.thread_time() - start) * 1e3, result


def measure(paths: list[Path], recipe: ViewRecipe, views: int) -> dict[str, list[float]]:
    """Milliseconds of CPU by step, one entry per view (quickest of three tries), all steps of a view in turn."""
    tile_px = read_raster(paths[0])[0].shape[0]
    ids = [f"t{i}" for i in range(views)]
    strong = draw_table(recipe, tile_ids=ids, tile_px=tile_px, stream="strong", seed=0)
    weak = draw_table(recipe, tile_ids=ids, tile_px=tile_px, stream="weak", seed=0)
    image, valid = read_raster(paths[-1])
    other = render(image, valid, strong[-1], recipe=recipe)
    times: dict[str, list[float]] = {}
    for i in range(views):
        path, params = paths[i % len(paths)], strong[i]
        p = resolve(params)
        image, valid = read_raster(path)

        def ours(path: Path = path, params: np.ndarray = params) -> View:
            return paste(render(*read_raster(path), params, recipe=recipe), other, params)

        def chain(path: Path = path, p: Resolved = p) -> np.ndarray:
            return plain_chain(path, p, other.pixels, recipe.crop_px)

        view = ours()
        steps: dict[str, Callable[[], Any]] = {
            "PNG to strong view, plain Pillow chain": chain,
            "PNG to strong view, rsmtdf": ours,
            "  decode (rasterio)": lambda path=path: read_raster(path),
            "  render, strong": lambda a=image, v=valid, q=params: render(a, v, q, recipe=recipe),
            "  paste": lambda v=view, q=params: paste(v, other, q),
            "render, weak": lambda a=image, v=valid, q=weak[i]: render(a, v, q, recipe=recipe),
            "render_both (weak and strong)": lambda a=image, v=valid, q=params: render_both(a, v, q, recipe=recipe),
            "view_crc": lambda v=view: view_crc(v),
        }
        tries = [{name: cpu_ms(work)[0] for name, work in steps.items()} for _ in range(TRIES)]
        for name in steps:
            times.setdefault(name, []).append(min(t[name] for t in tries))
    return times


def report(title: str, times: dict[str, list[float]]) -> None:
    chain, ours = times["PNG to strong view, plain Pillow chain"], times["PNG to strong view, rsmtdf"]
    print(f"\n{title}, {len(ours)} views")
    print(f"{'CPU ms on one core':42s} {'median':>8s} {'mean':>8s} {'max':>8s}")
    for name, values in times.items():
        print(f"{name:42s} {statistics.median(values):8.2f} {statistics.fmean(values):8.2f} {max(values):8.2f}")
    ratio = statistics.median(a / b for a, b in zip(chain, ours, strict=True))
    mean = statistics.fmean(ours)
    print(f"plain chain / rsmtdf, paired: median {ratio:.2f}, of means {statistics.fmean(chain) / mean:.2f}")
    print(f"goal <= {GOAL_MS:.0f} ms on average: {'met' if mean <= GOAL_MS else 'MISSED'} ({mean:.2f} ms)")


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}; Python {platform.python_version()}, NumPy {np.__version__}, Pillow {PIL.__version__}"


def png_tiles(images: list[np.ndarray], folder: Path) -> list[Path]:
    paths = [folder / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def real_tiles(folder: Path, side: int, count: int) -> list[np.ndarray]:
    """Square tiles of the first images in `folder` that are large enough."""
    tiles = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".jpg", ".png", ".tif") and len(tiles) < count:
            with Image.open(path) as file:
                if min(file.size) >= side:
                    tiles.append(np.asarray(file.convert("RGB"))[:side, :side])
    return tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=200)
    parser.add_argument("--images", type=Path, default=SHARED, help="folder of real images, skipped where absent")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", NotGeoreferencedWarning)  # PNG has no georeference
    recipe = ViewRecipe()
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        paths = png_tiles([landscape(512, seed) for seed in range(8)], Path(temporary))
        kb = statistics.fmean(path.stat().st_size for path in paths) / 1e3
        report(f"procedural tiles, 512 px, {kb:.0f} kB PNG", measure(paths, recipe, arguments.views))
    real = real_tiles(arguments.images, 512, 8) if arguments.images.is_dir() else []
    if not real:
        print(f"\nno images of at least 512 px in {arguments.images.name}: real tiles left out")
        return
    with tempfile.TemporaryDirectory() as temporary:
        paths = png_tiles(real, Path(temporary))
        kb = statistics.fmean(path.stat().st_size for path in paths) / 1e3
        report(f"real tiles, 512 px, {kb:.0f} kB PNG", measure(paths, recipe, arguments.views))


if __name__ == "__main__":
    main()
