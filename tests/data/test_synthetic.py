"""The synthetic world: keyed, seamless, disjoint splits, LoveDA's tree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from rsmtdf.data.synthetic import CLASSES, World, write_world
from rsmtdf.data.synthetic.noise import BANK_PX, Bank, Glimpse, hash_units, normals
from rsmtdf.data.synthetic.plan import plan_scene
from rsmtdf.errors import DatasetError
from rsmtdf.keyed import Draws


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    x = normals(Draws("test-normals"), 40_001)
    assert x.shape == (40_001,)
    assert abs(x.mean()) < 0.02
    assert abs(x.var() - 1) < 0.03
    assert abs((x**4).mean() - 3) < 0.15


def test_hashes_depend_on_every_argument_and_are_uniform() -> None:
    i, j = np.mgrid[-50:50, -50:50].reshape(2, -1)
    units = hash_units(7, 0, i, j)
    assert units.min() >= 0
    assert units.max() < 1
    counts = np.bincount((units * 10).astype(int), minlength=10)
    assert np.abs(counts - 1000).max() < 150
    for other in (hash_units(8, 0, i, j), hash_units(7, 1, i, j), hash_units(7, 0, j, i)):
        assert abs(np.corrcoef(units, other)[0, 1]) < 0.05


def test_the_bank_is_periodic_standardised_and_smooth() -> None:
    bank = Bank(version=1)
    plain = Glimpse(field=0, dy=0, dx=0, flip_y=False, flip_x=False, transpose=False, sign=1.0)
    field = bank.look(4.0, plain, 0, 0, BANK_PX, BANK_PX)
    assert field.dtype == np.float32
    assert abs(float(field.mean())) < 1e-3
    assert abs(float(field.std()) - 1) < 1e-3
    assert np.array_equal(bank.look(4.0, plain, -3, BANK_PX + 5, 9, 9), bank.look(4.0, plain, BANK_PX - 3, 5, 9, 9))
    # A Gaussian of sigma 4 leaves neighbours correlated by exp(-1 / (4 sigma^2)).
    assert abs(float((field * np.roll(field, 1, axis=1)).mean()) - np.exp(-1 / 64)) < 0.005


def test_a_scene_is_a_function_of_its_key_alone(world: World) -> None:
    first = world.scene(split="train", seed=3, index=5, side_px=64)
    world.scene(split="val", seed=9, index=0, side_px=32)
    again = World().scene(split="train", seed=3, index=5, side_px=64)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    image, label = first
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert label.shape == (64, 64)
    assert label.max() < len(CLASSES)


@pytest.mark.parametrize("change", [{"split": "test"}, {"seed": 4}, {"index": 6}])
def test_splits_seeds_and_indices_never_share_a_scene(world: World, change: dict[str, object]) -> None:
    key = {"split": "train", "seed": 3, "index": 5}
    one, two = world.scene(**key, side_px=48), world.scene(**{**key, **change}, side_px=48)
    assert (one[0] != two[0]).mean() > 0.5
    plans = [plan_scene(**k, side_px=48) for k in (key, {**key, **change})]
    assert plans[0].salt != plans[1].salt


def test_windows_of_a_scene_fit_together_to_the_bit(world: World) -> None:
    plan = plan_scene(split="predict", seed=0, index=1, side_px=1200)
    whole = world.render(plan, y0=500, x0=440, height=150, width=170)
    part = world.render(plan, y0=533, x0=500, height=61, width=90)
    for a, b in zip(whole, part, strict=True):
        assert np.array_equal(a[33:94, 60:150], b)


def test_every_class_occurs_and_colours_tell_something_of_classes(world: World) -> None:
    images, labels = zip(*(world.scene(split="train", seed=0, index=i, side_px=192) for i in range(12)), strict=True)
    label = np.concatenate([x.ravel() for x in labels])
    pixels = np.concatenate([x.reshape(-1, 3) for x in images]).astype(float)
    shares = np.bincount(label, minlength=7) / label.size
    assert shares.min() > 0.02, dict(zip(CLASSES, shares, strict=True))
    assert shares.max() < 0.5
    water, crops = pixels[label == 3].mean(0), pixels[label == 6].mean(0)
    assert crops[0] > water[0] + 15
    assert pixels.std() > 20


def test_write_world_makes_a_loveda_tree(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    files = write_world(
        tmp_path / "w", tile_px=24, train=4, val=2, test=2, seed=1, scene_px=70, progress=lambda *s: steps.append(s)
    )
    root = files.root
    assert steps == [(i, 9) for i in range(1, 10)]
    images = sorted(p.relative_to(root).as_posix() for p in root.glob("*/*/images_png/*.png"))
    assert images == sorted(files.train + files.val + files.test)
    assert {p.split("/")[0] for p in files.train} == {"Train"}
    assert {p.split("/")[0] for p in files.val + files.test} == {"Val"}
    assert {p.split("/")[1] for p in files.train} == {"Urban", "Rural"}
    assert sorted(int(Path(p).stem) for p in images) == list(range(8))
    for path in images:
        with Image.open(root / path) as image, Image.open(root / path.replace("images_", "masks_")) as mask:
            assert image.size == mask.size == (48, 48)
            assert image.mode == "RGB"
            assert mask.mode == "L"
            values = np.unique(np.asarray(mask))
        assert values.min() >= 1
        assert values.max() <= 7
    for split in ("train", "val", "test"):
        assert (root / "lists" / f"{split}.txt").read_text().split() == list(getattr(files, split))

    assert files.scene
    assert files.scene_truth
    with rasterio.open(files.scene) as scene, rasterio.open(files.scene_truth) as truth:
        assert scene.crs.to_epsg() == 32650
        assert scene.transform == truth.transform
        assert scene.transform.a == 0.3
        assert scene.shape == truth.shape == (70, 70)
        assert scene.count == 3
        assert truth.read(1).max() <= 6
        assert truth.nodata == 255
    assert not list(root.rglob("*.partial"))


def test_a_finished_world_is_kept_a_torn_one_is_finished_another_is_refused(tmp_path: Path) -> None:
    arguments = {"tile_px": 16, "train": 2, "val": 0, "test": 0, "seed": 1}
    files = write_world(tmp_path / "w", **arguments)
    first = files.root / files.train[0]
    stamp = first.stat().st_mtime_ns
    assert write_world(tmp_path / "w", **arguments) == files
    assert first.stat().st_mtime_ns == stamp

    manifest = files.root / "world.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": False}))
    (files.root / files.train[1]).unlink()
    write_world(tmp_path / "w", **arguments)
    assert (files.root / files.train[1]).exists()

    with pytest.raises(DatasetError, match=r"another synthetic world: seed 1 \(asked: 2\)"):
        write_world(tmp_path / "w", **{**arguments, "seed": 2})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").touch()
    with pytest.raises(DatasetError, match="not empty"):
        write_world(tmp_path / "other", **arguments)


@pytest.mark.parametrize("wrong", [{"tile_px": 8}, {"train": -1}, {"scene_px": -5}])
def test_numbers_out_of_range(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(DatasetError, match="cannot"):
        write_world(tmp_path / "w", **{"tile_px": 16, "train": 1, "val": 0, "test": 0, "seed": 0, **wrong})
    assert not (tmp_path / "w").exists()
