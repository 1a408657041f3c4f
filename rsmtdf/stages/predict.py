"""From a trained student and an image of any size to a land-cover map; memory does not grow with the image."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch

from rsmtdf.data.raster import Header, choose_bands, is_guess, open_raster, read_header, read_pixels
from rsmtdf.data.scaling import suggest_scaling, to_bytes, yaml_line
from rsmtdf.errors import CheckpointError, ConfigError, DatasetError
from rsmtdf.inference.blend import Blend, Patch, blend, block_valid, read_patch
from rsmtdf.inference.maps import TILE_PX, Legend, MapFrame, check_destination, map_format, open_map, outputs
from rsmtdf.inference.model import Precision, logits_of
from rsmtdf.inference.windows import Box, blocks, touching
from rsmtdf.learning.run import RunFolder
from rsmtdf.signals import StopFlag
from rsmtdf.specs import IGNORE_INDEX, DatasetSpec, from_dict
from rsmtdf.student.artifact import LoadedStudent, load_student

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""

# GDAL's own default is 5 % of the machine's memory, which is no bound at all on a large machine.
_GDAL_CACHE_BYTES = 64 * 2**20


def predict(
    student: Path,
    src: Path,
    dst: Path,
    *,
    device: torch.device,
    batch: int = 8,
    block_px: int = 2048,
    what: Blend = "probabilities",
    precision: Precision = "float32",
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: StopFlag | None = None,
) -> dict[str, Any]:
    """Maps image `src` with a run's best student (a run folder, or a student's file); see `predict_image`.

    Raises:
        CheckpointError: there is no usable student at `student`.
    """
    check_destination(dst, overwrite=overwrite)
    read_header(src)
    artifact = RunFolder.open(student).best if student.is_dir() else student
    return predict_image(
        load_student(artifact, device=device),
        src,
        dst,
        device=device,
        batch=batch,
        block_px=block_px,
        what=what,
        precision=precision,
        overwrite=overwrite,
        progress=progress,
        stop=stop,
    )


def predict_image(
    loaded: LoadedStudent,
    src: Path,
    dst: Path,
    *,
    device: torch.device,
    batch: int = 8,
    block_px: int = 2048,
    what: Blend = "probabilities",
    precision: Precision = "float32",
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: StopFlag | None = None,
) -> dict[str, Any]:
    """Writes the map of `src` to `dst`: windows of the training crop, overlapping by half, blended.

    Args:
        loaded: the student; its data set's bands, scaling and nodata are applied as in training.
        src: a TIFF, PNG or JPEG.
        dst: `.tif`: a tiled GeoTIFF with the source's CRS, transform and size; `.png`: a palette image and, beside
            it, `<stem>.overlay.png`. Pixels hold class indices, 255 where the source is not valid.
        device: where the student is.
        batch: windows per forward pass.
        block_px: side of the blocks that are read, blended and written; the map does not depend on it, memory does.
        what: what is averaged where windows overlap.
        precision: of the forward pass; blending is in float32 always.
        overwrite: replace an existing map (at the very end, in one step).
        progress: see `Progress`.
        stop: ends the work between two batches, leaving nothing behind.

    Returns:
        JSON-ready: `map`, `overlay` (or None), `width`, `height`, `mpx`, `windows`, `seconds`, `mpx_per_s`,
        `valid_share`, `classes` (name -> share of the valid pixels), `warnings` (also logged).

    Raises:
        DatasetError: `src` cannot be read, has too few bands, or is not 8-bit and the student knows no scaling.
        ConfigError: `dst` cannot be written or exists, or a number is out of range.
        CheckpointError: the student's file lacks what is needed.
        Interrupted: `stop` was raised.
    """
    started = time.perf_counter()
    _check_numbers(batch=batch, block_px=block_px)
    check_destination(dst, overwrite=overwrite)
    if any(src.resolve() == output.resolve() for output in outputs(dst)):
        raise ConfigError(f"the map cannot replace its own source {src}; give another name")
    spec, crop_px = _trained_on(loaded)
    header = read_header(src)
    _check_readable(src, header, spec)
    frame = _frame(src, header)
    notes = _notes(src, dst, header, spec, frame)
    legend = Legend(
        classes=spec.classes,
        palette=spec.palette,
        tags={"RSMTDF_DATASET": spec.name, "RSMTDF_SOURCE": src.name, "RSMTDF_CROP_PX": str(crop_px)},
    )
    tally = _Tally(_count_windows(header, crop_px=crop_px, block_px=block_px), progress, stop)
    counts = np.zeros(256, np.int64)
    model = logits_of(loaded.student, device=device, precision=precision)
    size = (header.height, header.width)
    with rasterio.Env(GDAL_CACHEMAX=_GDAL_CACHE_BYTES), open_map(dst, frame, legend) as target:
        for patch in _patches(src, header, spec, crop_px=crop_px, block_px=block_px):
            valid = block_valid(patch)
            labels = np.full(valid.shape, IGNORE_INDEX, np.uint8)
            before = tally.done
            if valid.any():
                # Nested, so that a block's scores (100 MB and more) are gone before the next block's are made.
                classes = _classes(
                    blend(
                        model,
                        patch,
                        height=size[0],
                        width=size[1],
                        crop_px=crop_px,
                        classes=len(spec.classes),
                        batch=batch,
                        device=device,
                        what=what,
                        tick=tally.add,
                    )
                )
                labels[valid] = classes[valid]
            tally.reach(before + _windows_of(patch.box, *size, crop_px=crop_px))
            counts += np.bincount(labels.ravel(), minlength=256)
            target.write(patch.box, labels, _inside(patch))
    if not counts[:IGNORE_INDEX].any():
        notes.append(f"{src} has no valid pixel (nodata, alpha or mask): the map holds only nodata (255)")
    for note in notes:
        log.warning(note)
    return _summary(dst, header, spec, counts, windows=tally.done, notes=notes, seconds=time.perf_counter() - started)


class _Tally:
    """Windows done, for progress and for stopping in between."""

    def __init__(self, total: int, progress: Progress | None, stop: StopFlag | None) -> None:
        self.done, self._total, self._progress, self._stop = 0, total, progress, stop

    def add(self, windows: int) -> None:
        self.reach(self.done + windows)

    def reach(self, done: int) -> None:
        if self._stop is not None:
            self._stop.check("no map was written")
        if done != self.done:
            self.done = done
            if self._progress is not None:
                self._progress(done, self._total)


def _check_numbers(*, batch: int, block_px: int) -> None:
    if batch < 1:
        raise ConfigError(f"a batch of {batch} windows is none; give at least 1")
    if block_px < TILE_PX or block_px % TILE_PX:
        raise ConfigError(f"blocks of {block_px} px do not fit the map's tiles; give a multiple of {TILE_PX}")


def _trained_on(loaded: LoadedStudent) -> tuple[DatasetSpec, int]:
    """The data set and the crop the student was trained on."""
    crop_px = loaded.meta.get("crop_px", loaded.student.spec.img_px)
    try:
        spec = from_dict(DatasetSpec, loaded.meta["dataset"])
        loaded.student.grid(crop_px, crop_px)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the student's file does not say what it was trained on: {error}") from error
    if len(spec.classes) > IGNORE_INDEX:
        raise CheckpointError(f"a map holds at most {IGNORE_INDEX} classes; the student has {len(spec.classes)}")
    return spec, int(crop_px)


def _check_readable(src: Path, header: Header, spec: DatasetSpec) -> None:
    try:
        choose_bands(header, spec.bands, where=str(src))
    except DatasetError as error:
        raise DatasetError(f"{error} and train on such images; this student saw three bands of {spec.name}") from error
    if header.dtype != "uint8" and spec.scaling is None:
        try:
            line = yaml_line(suggest_scaling([(src, header)], bands=spec.bands, nodata=spec.nodata))
        except DatasetError:
            line = "scaling: [[low, high], [low, high], [low, high]]"
        raise DatasetError(
            f"{src} is {header.dtype}, but the student was trained on 8-bit images of data set {spec.name}, so how to "
            f"scale it is not known; convert it to 8 bits as the training images were, or train on such images with "
            f"`{line}` (2-98 % of this file)"
        )


def _frame(src: Path, header: Header) -> MapFrame:
    with open_raster(src) as source:
        points, points_crs = source.gcps
        has_place = source.crs is not None or source.transform != rasterio.Affine.identity()
        return MapFrame(
            width=header.width,
            height=header.height,
            crs=source.crs,
            transform=source.transform if has_place else None,
            gcps=(points, points_crs) if points and source.crs is None else None,
        )


def _notes(src: Path, dst: Path, header: Header, spec: DatasetSpec, frame: MapFrame) -> list[str]:
    """What the user should know of this image, one sentence each."""
    notes = []
    is_placed = frame.crs is not None or frame.gcps is not None
    if map_format(dst) == "tif" and not is_placed:
        notes.append(f"{src} has no coordinate system: the map keeps its pixel grid and has none either")
    if map_format(dst) == "png" and is_placed:
        notes.append(f"{src} is georeferenced, a PNG map is not; write {dst.stem}.tif to keep its place")
    if is_guess(header, spec.bands):
        notes.append(f"{src} does not name its bands; the first three colour bands are taken as R, G, B")
    if spec.scaling is not None and header.dtype == "uint8" and max(high for _, high in spec.scaling) > 255:
        notes.append(f"{src} is 8-bit, but the student's scaling {list(spec.scaling)} is of deeper data: likely wrong")
    if spec.gsd_m and header.gsd_m and not 0.5 <= header.gsd_m / spec.gsd_m <= 2:
        notes.append(
            f"{src} has {header.gsd_m:.3g} m per pixel, the student was trained at {spec.gsd_m:.3g} m: "
            f"resample it for a better map"
        )
    return notes


def _patches(src: Path, header: Header, spec: DatasetSpec, *, crop_px: int, block_px: int) -> Iterator[Patch]:
    """The blocks of the image, read one ahead by a thread: decoding hides behind the forward passes."""

    def read(box: Box) -> tuple[np.ndarray, np.ndarray]:
        window = (box.x0, box.y0, box.width, box.height)
        pixels = read_pixels(src, header, bands=spec.bands, nodata=spec.nodata, window=window)
        valid = np.ones((box.height, box.width), bool) if pixels.valid is None else pixels.valid
        return to_bytes(pixels, spec.scaling), valid

    def patch(box: Box) -> Patch:
        return read_patch(read, box, height=header.height, width=header.width, crop_px=crop_px)

    boxes = blocks(header.height, header.width, block_px=block_px)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(patch, next(boxes))
        for box in boxes:
            current = ahead.result()
            ahead = pool.submit(patch, box)
            yield current
        yield ahead.result()


def _classes(scores: torch.Tensor) -> np.ndarray:
    """The class of the highest score, uint8 [h, w], of scores [k, h, w]; by strips, as argmax works on int64 copies."""
    rows = range(0, scores.shape[1], 256)
    strips = [scores[:, y : y + 256].argmax(dim=0).to(torch.uint8).cpu() for y in rows]
    classes: np.ndarray = torch.cat(strips).numpy()
    return classes


def _windows_of(box: Box, height: int, width: int, *, crop_px: int) -> int:
    rows = touching(box.y0, box.height, size=height, crop_px=crop_px)
    return len(rows) * len(touching(box.x0, box.width, size=width, crop_px=crop_px))


def _count_windows(header: Header, *, crop_px: int, block_px: int) -> int:
    size = (header.height, header.width)
    return sum(_windows_of(box, *size, crop_px=crop_px) for box in blocks(*size, block_px=block_px))


def _inside(patch: Patch) -> np.ndarray:
    y, x = patch.box.y0 - patch.around.y0, patch.box.x0 - patch.around.x0
    return patch.rgb[y : y + patch.box.height, x : x + patch.box.width]


def _summary(
    dst: Path, header: Header, spec: DatasetSpec, counts: np.ndarray, *, windows: int, notes: list[str], seconds: float
) -> dict[str, Any]:
    total, valid = header.width * header.height, int(counts[: len(spec.classes)].sum())
    files = [str(path) for path in outputs(dst)]
    return {
        "map": files[0],
        "overlay": files[1] if len(files) > 1 else None,
        "width": header.width,
        "height": header.height,
        "mpx": total / 1e6,
        "windows": windows,
        "seconds": seconds,
        "mpx_per_s": total / 1e6 / seconds,
        "valid_share": valid / total,
        "classes": {name: int(counts[i]) / valid if valid else 0.0 for i, name in enumerate(spec.classes)},
        "warnings": notes,
    }
