"""The synthetic world on disk: LoveDA's own tree, so that the LoveDA loader reads it, and a large GeoTIFF scene.

A LoveDA scene is 2 x 2 tiles. Masks hold LoveDA's raw values (class + 1; 0 is its no-data value, never written
here). LoveDA keeps its test labels to itself, so papers take test tiles from `Val`; here both lie under `Val`, drawn
from different keys, and `lists/{train,val,test}.txt` name the scenes of each.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from PIL import Image
from rasterio import Affine
from rasterio.windows import Window

from rsmtdf.data.synthetic.land import lay_land
from rsmtdf.data.synthetic.materials import CLASSES, LABELS, PALETTE
from rsmtdf.data.synthetic.noise import Bank
from rsmtdf.data.synthetic.paint import MARGIN_PX, paint
from rsmtdf.data.synthetic.plan import WORLD_VERSION, ScenePlan, Split, plan_scene
from rsmtdf.errors import DatasetError
from rsmtdf.files import whole_file, write_whole

GSD_M = 0.3
"""LoveDA's ground sampling distance."""

_BLOCK_PX = 512
_CRS = "EPSG:32650"
_ORIGIN_M = (500_000.0, 4_400_000.0)
_MANIFEST = "world.json"


class World:
    """Makes scenes; holds the noise bank (24 MB, about half a second to make) and nothing else."""

    def __init__(self) -> None:
        self._bank = Bank(version=WORLD_VERSION)

    def render(self, plan: ScenePlan, *, y0: int, x0: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 [h, w, 3] and class index uint8 [h, w] of a window of a scene; windows of a scene fit together."""
        margin = MARGIN_PX
        top, left = y0 - margin, x0 - margin
        land = lay_land(plan, self._bank, y0=top, x0=left, height=height + 2 * margin, width=width + 2 * margin)
        image = paint(plan, self._bank, land, y0=top, x0=left)
        inside = (slice(margin, margin + height), slice(margin, margin + width))
        return np.ascontiguousarray(image[inside]), LABELS[land.material[inside]]

    def scene(self, *, split: Split, seed: int, index: int, side_px: int) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 [s, s, 3] and class index uint8 [s, s] of a whole scene."""
        plan = plan_scene(split=split, seed=seed, index=index, side_px=side_px)
        return self.render(plan, y0=0, x0=0, height=side_px, width=side_px)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldFiles:
    """Where a written world lies: lists of image paths (POSIX, relative to the root), and the large scene."""

    root: Path
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    scene: Path | None
    scene_truth: Path | None


def write_world(
    root: Path,
    *,
    tile_px: int,
    train: int,
    val: int,
    test: int,
    seed: int,
    scene_px: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> WorldFiles:
    """Writes a world under `root`; a world already there with the same arguments is kept as it is.

    Args:
        root: a new or empty folder, or one that holds this very world (also one half-written by an interruption).
        tile_px: side of the tiles the loader will cut; a scene is 2 x 2 of them.
        train: number of *scenes* to train on, so four times as many tiles.
        val: number of scenes to validate on.
        test: number of scenes to test on.
        seed: another seed is another world; splits of one seed never share a draw.
        scene_px: side of the large GeoTIFF scene under `scene/`, with its truth (class indices) beside it; 0: none.
        progress: called with (scenes done, scenes in all).

    Raises:
        DatasetError: numbers out of range, or `root` holds something else.
    """
    if tile_px < 16 or min(train, val, test, scene_px) < 0:
        raise DatasetError(
            f"cannot make a world of {train} + {val} + {test} scenes of 2 x 2 tiles of {tile_px} px and a scene of "
            f"{scene_px} px: tiles need at least 16 px, counts cannot be negative"
        )
    arguments = {
        "world_version": WORLD_VERSION,
        "tile_px": tile_px,
        "train": train,
        "val": val,
        "test": test,
        "seed": seed,
        "scene_px": scene_px,
    }
    counts: dict[Split, int] = {"train": train, "val": val, "test": test}
    jobs = _jobs(counts, seed=seed, side_px=2 * tile_px)
    files = _files(root, jobs, scene_px=scene_px)
    if _is_written(root, arguments):
        return files
    root.mkdir(parents=True, exist_ok=True)
    write_whole(root / _MANIFEST, _json({**arguments, "complete": False}))
    world = World()
    total = len(jobs) + (scene_px > 0)
    for done, (_, plan, image) in enumerate(jobs, start=1):
        _write_pair(root / image, *world.render(plan, y0=0, x0=0, height=plan.side_px, width=plan.side_px))
        if progress:
            progress(done, total)
    for split in counts:
        lines = "".join(f"{image}\n" for job_split, _, image in jobs if job_split == split)
        (root / "lists").mkdir(exist_ok=True)
        write_whole(root / "lists" / f"{split}.txt", lines.encode())
    if files.scene and files.scene_truth:
        plan = plan_scene(split="predict", seed=seed, index=0, side_px=scene_px)
        write_scene(world, plan, image=files.scene, truth=files.scene_truth)
        if progress:
            progress(total, total)
    write_whole(root / _MANIFEST, _json({**arguments, "complete": True}))
    return files


def write_scene(world: World, plan: ScenePlan, *, image: Path, truth: Path) -> None:
    """Writes a scene of any size as a tiled GeoTIFF (RGB, uint8) and its class indices (nodata 255), block by block."""
    image.parent.mkdir(parents=True, exist_ok=True)
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "dtype": "uint8",
        "width": plan.side_px,
        "height": plan.side_px,
        "crs": _CRS,
        "transform": Affine(GSD_M, 0.0, _ORIGIN_M[0], 0.0, -GSD_M, _ORIGIN_M[1]),
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "deflate",
        "BIGTIFF": "IF_SAFER",
    }
    with (
        whole_file(image) as image_part,
        whole_file(truth) as truth_part,
        rasterio.open(image_part, "w", count=3, photometric="RGB", **profile) as pixels,
        rasterio.open(truth_part, "w", count=1, nodata=255, **profile) as labels,
    ):
        labels.write_colormap(1, {i: (*rgb, 255) for i, rgb in enumerate(PALETTE)})
        labels.update_tags(**{f"CLASS_{i}": name for i, name in enumerate(CLASSES)})
        for y0 in range(0, plan.side_px, _BLOCK_PX):
            for x0 in range(0, plan.side_px, _BLOCK_PX):
                height, width = min(_BLOCK_PX, plan.side_px - y0), min(_BLOCK_PX, plan.side_px - x0)
                rgb, label = world.render(plan, y0=y0, x0=x0, height=height, width=width)
                window = Window(x0, y0, width, height)
                pixels.write(np.moveaxis(rgb, -1, 0), window=window)
                labels.write(label, 1, window=window)


def _jobs(counts: dict[Split, int], *, seed: int, side_px: int) -> list[tuple[Split, ScenePlan, str]]:
    """(split, plan, image path) of every scene; ids run over all splits, as LoveDA's do."""
    jobs: list[tuple[Split, ScenePlan, str]] = []
    for split, count in counts.items():
        folder = "Train" if split == "train" else "Val"
        for index in range(count):
            plan = plan_scene(split=split, seed=seed, index=index, side_px=side_px)
            jobs.append((split, plan, f"{folder}/{plan.domain}/images_png/{len(jobs)}.png"))
    return jobs


def _files(root: Path, jobs: list[tuple[Split, ScenePlan, str]], *, scene_px: int) -> WorldFiles:
    def images(split: Split) -> tuple[str, ...]:
        return tuple(image for job_split, _, image in jobs if job_split == split)

    return WorldFiles(
        root=root,
        train=images("train"),
        val=images("val"),
        test=images("test"),
        scene=root / "scene" / "scene.tif" if scene_px else None,
        scene_truth=root / "scene" / "scene_truth.tif" if scene_px else None,
    )


def _is_written(root: Path, arguments: dict[str, int]) -> bool:
    """Whether `root` holds this world, complete.

    Raises:
        DatasetError: it holds another world, or files that are none.
    """
    manifest = root / _MANIFEST
    if not manifest.exists():
        if root.exists() and any(root.iterdir()):
            raise DatasetError(f"{root} is not empty and holds no synthetic world; give another folder or empty it")
        return False
    found = json.loads(manifest.read_text())
    is_complete = found.pop("complete", False)
    if found != arguments:
        differing = ", ".join(f"{k} {found.get(k)} (asked: {v})" for k, v in arguments.items() if found.get(k) != v)
        raise DatasetError(f"{root} holds another synthetic world: {differing}; give another folder or remove it")
    return bool(is_complete)


def _write_pair(image: Path, rgb: np.ndarray, label: np.ndarray) -> None:
    mask = image.parents[1] / "masks_png" / image.name
    for path, array in ((image, rgb), (mask, label + 1)):
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        # Level 1: noise does not compress further, and writing should not cost more than rendering.
        Image.fromarray(array.astype(np.uint8)).save(buffer, "PNG", compress_level=1)
        path.write_bytes(buffer.getvalue())


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=1) + "\n").encode()
