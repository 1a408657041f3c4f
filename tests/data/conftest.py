"""Tiny data sets on disk, made by rasterio and Pillow."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

from rsmtdf.specs import DatasetSpec

Write = Callable[..., Path]


@pytest.fixture
def write() -> Write:
    """write(path, array [h, w] or [h, w, c], **profile): PNG and JPEG through Pillow, TIFF through rasterio."""

    def write(path: Path, array: np.ndarray, *, mask: np.ndarray | None = None, colours: Any = None, **profile: Any):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() not in (".tif", ".tiff"):
            Image.fromarray(array).save(path, **profile)
            return path
        cube = array[..., None] if array.ndim == 2 else array
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            shape = {"height": cube.shape[0], "width": cube.shape[1], "count": cube.shape[2], "dtype": cube.dtype}
            with (
                rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
                rasterio.open(path, "w", "GTiff", **shape, **profile) as out,
            ):
                out.write(np.moveaxis(cube, 2, 0))
                if mask is not None:
                    out.write_mask(mask)
                if colours is not None:
                    out.colorinterp = colours
        return path

    return write


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """picture(height, width, channels=3, seed=0): uint8 noise without the value 0."""

    def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(1, 256, (height, width, channels), dtype=np.uint8)

    return picture


@pytest.fixture
def spec() -> DatasetSpec:
    """Three classes, tiles of 32 px."""
    return DatasetSpec(
        name="toy", classes=("land", "road", "roof"), palette=((0, 128, 0), (255, 0, 0), (0, 0, 255)), tile_px=32
    )


@pytest.fixture
def folder(tmp_path: Path, write: Write, picture: Callable[..., np.ndarray]) -> Path:
    """Ten labelled scenes of 64 x 64 px (a to j) and one unlabelled (u): 40 + 4 tiles of 32 px."""
    for number, name in enumerate("abcdefghij"):
        write(tmp_path / f"images/{name}.png", picture(64, 64, seed=number))
        write(tmp_path / f"masks/{name}.png", (picture(64, 64, 1, seed=100 + number) % 3)[..., 0])
    write(tmp_path / "images/u.png", picture(64, 64, seed=99))
    return tmp_path


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the checkout, which is not part of the repository."""
    path = Path(__file__).parents[2].parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return path
