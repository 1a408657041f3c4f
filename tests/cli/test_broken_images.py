"""Stage 1 over a folder as people have them: among good images, one of every kind that cannot be used."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from PIL import Image

from rsmtdf.store.status import DONE, SKIPPED, state_of
from rsmtdf.store.store import FeatureStore

SIDE, GOOD = 64, 12


def noise(seed: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (SIDE, SIDE, channels), dtype=np.uint8)


def damaged(path: Path) -> Path:
    """The same file with its middle overwritten: its header still opens, its pixels do not."""
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(400) + data[middle + 400 :])
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cached_tiny: Any) -> Path:
    """Twelve good images with masks, and the others without."""
    root = tmp_path_factory.mktemp("broken")
    images, masks = root / "images", root / "masks"
    images.mkdir()
    masks.mkdir()
    for i in range(GOOD):
        Image.fromarray(noise(i)).save(images / f"good{i:02d}.png")
        Image.fromarray((noise(100 + i, 1) % 3)[..., 0]).save(masks / f"good{i:02d}.png")
    Image.fromarray(noise(20)[..., 0]).save(images / "grey.png")
    Image.fromarray(noise(21)[..., :2]).save(images / "grey_alpha.png")
    (images / "zero.png").touch()
    (images / "nothing.tif").touch()
    (images / "text.jpg").write_text("<html>not found</html>")
    header = struct.pack(">IIBBBBB", 10**6, 10**6, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")]
    (images / "liar.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    Image.fromarray(noise(22)).save(images / "truncated.png")
    (images / "truncated.png").write_bytes((images / "truncated.png").read_bytes()[:-3000])
    Image.fromarray(noise(23)).save(images / "damaged.png")
    damaged(images / "damaged.png")
    shape = {"height": SIDE, "width": SIDE, "count": 3, "dtype": "uint8", "transform": rasterio.Affine.scale(2, -2)}
    with rasterio.open(images / "cut.tif", "w", driver="GTiff", **shape) as out:
        out.write(np.moveaxis(noise(24), 2, 0))
    (images / "cut.tif").write_bytes((images / "cut.tif").read_bytes()[:6000])
    settings = yaml.safe_load(cached_tiny.config.read_text())
    settings["root"] = "."
    settings["dataset"] = {
        "name": "broken",
        "classes": ["a", "b", "c"],
        "palette": [[255, 0, 0], [0, 255, 0], [0, 0, 255]],
        "tile_px": SIDE,
    }
    settings["splits"] = {"by": "tile", "fractions": [1.0, 0.0, 0.0], "labels": "6"}
    (root / "broken.yaml").write_text(yaml.safe_dump(settings))
    return root


NO_TILES = {
    "images/grey.png": "has 1 colour band",
    "images/grey_alpha.png": "has 1 colour band",
    "images/zero.png": "cannot be opened",
    "images/nothing.tif": "cannot be opened",
    "images/text.jpg": "cannot be opened",
    "images/liar.png": "at most 68,719,476,736 pixels",
    "images/truncated.png": "truncated",
}
"""Images that give themselves away before a pixel is read."""
BROKEN = {"damaged/0_0": "damaged.png cannot be read", "cut/0_0": "cut.tif cannot be read"}


def test_every_good_image_is_cached_and_every_other_named(folder: Path, command: Any) -> None:
    store_path = folder / "feats.zarr"
    arguments = ("cache-features", "--config", folder / "broken.yaml", "--out", store_path)
    said = command(*arguments, "--json")
    assert said.code == 1, "more than no failures"
    result = json.loads(said.out)
    reasons = result["unreadable_tiles"]
    assert set(reasons) == {*NO_TILES, *BROKEN}
    for name, reason in (NO_TILES | BROKEN).items():
        assert reason in reasons[name], reasons[name]
    store = FeatureStore.open(store_path)
    tile, partner = store.column("tile"), store.column("partner")
    status = state_of(store.view_status())
    assert len(store.tile_ids) == GOOD + len(BROKEN)
    broken = np.isin(tile, [store.tile_ids.indices[t] for t in BROKEN])
    skipped = np.flatnonzero(status == SKIPPED)
    lost = skipped[~broken[skipped]]
    assert broken[partner[lost]].all(), "a view of a good tile is missing only for want of its partner"
    assert result["partners_lost"] == len(lost)
    assert broken[skipped].sum() == 2 * len(BROKEN), "two seeds of each"
    assert result["views"] == (status == DONE).sum() == store.n_views - len(skipped)
    assert store.usable(["dense", "coarse"]).sum() == result["views"]
    text = command(*arguments)
    assert text.code == 1
    for name in reasons:
        assert name in text.out
    assert command(*arguments, "--max-failures", len(reasons)).code == 0


def test_the_plan_of_such_a_folder_says_what_it_counts(folder: Path, command: Any) -> None:
    said = command("plan", "--config", folder / "broken.yaml", "--out", folder / "none.zarr", "--json")
    assert said.code == 0, said.err
    plan = json.loads(said.out)
    assert plan["pool_tiles"] == GOOD + len(BROKEN), "what is broken inside shows only when it is read"
    assert plan["estimate"]["seconds"] > 0
    text = command("plan", "--config", folder / "broken.yaml", "--out", folder / "none.zarr", "--no-calibrate")
    assert "unreadable 7 files, left out (rsmtdf data check names them)" in text.out
