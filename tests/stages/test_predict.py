"""Maps of any raster: place, size and validity kept, the same in every division into blocks, whole or absent."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from rsmtdf.data.raster import open_raster
from rsmtdf.data.synthetic import CLASSES, PALETTE, World
from rsmtdf.errors import CheckpointError, ConfigError, DatasetError
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.specs import DatasetSpec, to_dict
from rsmtdf.stages.predict import predict, predict_image
from rsmtdf.student.artifact import LoadedStudent, save_student
from rsmtdf.student.model import StudentSpec, build_student
from rsmtdf.testing.scenes import AwkwardScenes, write_awkward_scenes, write_image

CPU = torch.device("cpu")
TINY = StudentSpec(
    classes=7,
    backbone="vit_small_patch16_224",
    overrides=(("depth", 4), ("embed_dim", 16), ("num_heads", 2), ("patch_size", 8)),
    img_px=64,
    layers=(0, 1, 2, 3),
    dpt_features=8,
    dpt_channels=(8, 8, 8, 8),
    translator_hidden=8,
)
SPEC = DatasetSpec(name="folder", classes=CLASSES, palette=PALETTE)


def _loaded(spec: DatasetSpec = SPEC, **meta: object) -> LoadedStudent:
    student = build_student(TINY, seed=1).eval()
    with torch.no_grad():
        # A random student says one class everywhere; centred on this input, its maps have something to get wrong.
        last = student.decoder.predict[-1]
        last.bias.sub_(student(torch.zeros(1, 3, 64, 64)).logits.mean(dim=(0, 2, 3)))
    return LoadedStudent(student, {"dataset": to_dict(spec), "crop_px": 64, **meta})


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> AwkwardScenes:
    return write_awkward_scenes(tmp_path_factory.mktemp("awkward"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    write_image(path, World().scene(split="test", seed=7, index=1, side_px=150)[0][:90])
    return path


def _map(path: Path) -> np.ndarray:
    with open_raster(path) as dataset:
        values: np.ndarray = dataset.read(1)
    return values


def test_a_geotiff_keeps_place_size_and_validity(tmp_path: Path, scenes: AwkwardScenes) -> None:
    src, dst = scenes.deep / "images" / "north.tif", tmp_path / "map.tif"
    seen: list[tuple[int, int]] = []
    result = predict_image(_loaded(scenes.deep_spec), src, dst, device=CPU, batch=3, progress=lambda *s: seen.append(s))
    with rasterio.open(src) as a, rasterio.open(dst) as b:
        assert (b.crs, b.transform, b.shape) == (a.crs, a.transform, a.shape)
        assert (b.count, b.dtypes[0], b.nodata) == (1, "uint8", 255)
        assert b.profile["tiled"]
        assert b.profile["compress"] == "deflate"
        assert b.colormap(1)[3] == (*PALETTE[3], 255)
        assert b.colormap(1)[255][3] == 0
        assert b.tags(1)["CLASS_5"] == "forest"
        labels = b.read(1)
    valid = scenes.valid["north"]
    assert np.array_equal(labels != 255, valid)
    assert labels[valid].max() < 7
    assert len(np.unique(labels[valid])) > 1
    assert result["valid_share"] == pytest.approx(valid.mean())
    assert sum(result["classes"].values()) == pytest.approx(1)
    assert result["classes"]["water"] == pytest.approx((labels[valid] == 3).mean())
    assert result["mpx"] == pytest.approx(170 * 230 / 1e6)
    assert seen[-1] == (result["windows"], result["windows"])
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert result["overlay"] is None
    assert result["warnings"] == []
    assert [p.name for p in tmp_path.iterdir()] == ["map.tif"]


def test_the_alpha_twin_gives_the_same_map(tmp_path: Path, scenes: AwkwardScenes) -> None:
    for kind, spec in (("deep", scenes.deep_spec), ("alpha", scenes.alpha_spec)):
        src = getattr(scenes, kind) / "images" / "south.tif"
        predict_image(_loaded(spec), src, tmp_path / f"{kind}.tif", device=CPU)
    assert np.array_equal(_map(tmp_path / "deep.tif"), _map(tmp_path / "alpha.tif"))


def test_blocks_do_not_change_the_map(tmp_path: Path) -> None:
    path = tmp_path / "scene.tif"
    write_image(path, World().scene(split="test", seed=8, index=0, side_px=600)[0][:560])
    loaded = _loaded(crop_px=128)
    for block in (256, 512, 2048):
        result = predict_image(loaded, path, tmp_path / f"{block}.tif", device=CPU, block_px=block, batch=16)
    whole = _map(tmp_path / "2048.tif")
    assert result["windows"] == 8 * 9
    assert len(np.unique(whole)) > 2
    for block in (256, 512):
        # Only ties may fall otherwise: a matrix product of another batch can differ in its last bit.
        assert (_map(tmp_path / f"{block}.tif") != whole).mean() < 1e-5


def test_a_png_becomes_a_palette_map_and_an_overlay(tmp_path: Path, photo: Path) -> None:
    result = predict_image(_loaded(), photo, tmp_path / "map.png", device=CPU)
    predict_image(_loaded(), photo, tmp_path / "map.tif", device=CPU)
    with Image.open(tmp_path / "map.png") as image:
        assert image.mode == "P"
        assert image.info["CLASS_0"] == "background"
        assert tuple(image.getpalette()[9:12]) == PALETTE[3]
        labels = np.asarray(image)
    assert np.array_equal(labels, _map(tmp_path / "map.tif"))
    with Image.open(result["overlay"]) as overlay, Image.open(photo) as source:
        expected = (np.asarray(source).astype(float) + np.array(PALETTE)[labels]) / 2
        assert np.abs(np.asarray(overlay) - expected).max() <= 0.5
    assert result["overlay"] == str(tmp_path / "map.overlay.png")
    assert result["warnings"] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.overlay.png", "map.png", "map.tif"]


def test_an_image_smaller_than_a_window(tmp_path: Path) -> None:
    write_image(tmp_path / "small.png", np.full((5, 30, 3), 90, np.uint8))
    assert predict_image(_loaded(), tmp_path / "small.png", tmp_path / "m.png", device=CPU)["windows"] == 1
    with Image.open(tmp_path / "m.png") as image:
        assert image.size == (30, 5)


def test_without_a_coordinate_system_it_says_so_and_keeps_the_grid(tmp_path: Path, photo: Path) -> None:
    result = predict_image(_loaded(), photo, tmp_path / "map.tif", device=CPU)
    assert len(result["warnings"]) == 1
    assert "no coordinate system" in result["warnings"][0]
    assert _map(tmp_path / "map.tif").shape == (90, 150)


def test_a_georeferenced_source_into_a_png_is_warned_of(tmp_path: Path, scenes: AwkwardScenes) -> None:
    src = scenes.alpha / "images" / "corner.tif"
    result = predict_image(_loaded(), src, tmp_path / "map.png", device=CPU)
    assert "write map.tif to keep its place" in result["warnings"][0]
    labels = np.asarray(Image.open(tmp_path / "map.png"))
    assert np.array_equal(labels != 255, scenes.valid["corner"])


def test_nothing_valid_gives_a_map_of_nodata_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "empty.tif"
    profile = {"width": 70, "height": 40, "count": 3, "dtype": "uint8", "crs": "EPSG:32650", "nodata": 0}
    with rasterio.open(path, "w", driver="GTiff", transform=rasterio.Affine(1, 0, 5, 0, -1, 9), **profile) as out:
        out.write(np.zeros((3, 40, 70), np.uint8))
    loaded = _loaded()
    loaded.student.forward = None  # must not be needed
    result = predict_image(loaded, path, tmp_path / "map.tif", device=CPU)
    assert (_map(tmp_path / "map.tif") == 255).all()
    assert any("no valid pixel" in note for note in result["warnings"])
    assert result["valid_share"] == 0
    assert set(result["classes"].values()) == {0.0}


def test_an_error_half_way_leaves_nothing_and_keeps_an_old_map(tmp_path: Path, photo: Path) -> None:
    loaded, dst = _loaded(), tmp_path / "map.tif"
    calls = 0
    threads = threading.active_count()
    forward = loaded.student.forward

    def failing(x: torch.Tensor) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return forward(x)

    loaded.student.forward = failing
    for name in ("map.tif", "map.png"):
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            predict_image(loaded, photo, tmp_path / name, device=CPU, batch=2)
        assert list(tmp_path.iterdir()) == []
    dst.write_bytes(b"the old map")
    calls = 0
    with pytest.raises(KeyboardInterrupt):
        predict_image(loaded, photo, dst, device=CPU, batch=2, overwrite=True)
    assert dst.read_bytes() == b"the old map"
    predict_image(loaded, photo, dst, device=CPU, batch=2, overwrite=True)
    assert _map(dst).shape == (90, 150)
    assert threading.active_count() < threads + 5


def test_a_stop_between_batches_leaves_nothing(tmp_path: Path, photo: Path) -> None:
    flag = StopFlag()

    def interrupt(done: int, total: int) -> None:
        assert done < total
        flag.signum = 15

    with pytest.raises(Interrupted, match="no map was written") as caught:
        predict_image(_loaded(), photo, tmp_path / "map.tif", device=CPU, batch=1, progress=interrupt, stop=flag)
    assert caught.value.exit_code == 143
    assert list(tmp_path.iterdir()) == []


def test_bad_sources_are_named(tmp_path: Path, photo: Path, scenes: AwkwardScenes) -> None:
    def fails(src: Path, match: str, loaded: LoadedStudent | None = None) -> None:
        with pytest.raises(DatasetError, match=match):
            predict_image(loaded or _loaded(), src, tmp_path / "map.tif", device=CPU)
        assert not (tmp_path / "map.tif").exists()

    fails(tmp_path / "none.tif", "does not exist")
    (tmp_path / "text.tif").write_text("hello")
    fails(tmp_path / "text.tif", "text.tif cannot be opened")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:-2000])
    fails(tmp_path / "cut.png", "truncated")
    Image.new("L", (30, 30)).save(tmp_path / "grey.png")
    fails(tmp_path / "grey.png", r"1 colour band\(s\)")
    deep = scenes.deep / "images" / "north.tif"
    fails(deep, r"uint16, but the student was trained on 8-bit images.*scaling: \[\[\d+, \d+\], ", _loaded())


def test_bad_destinations_are_named_before_any_work(tmp_path: Path, photo: Path) -> None:
    loaded = _loaded()
    loaded.student.forward = None

    def fails(dst: Path, match: str, **options: object) -> None:
        with pytest.raises(ConfigError, match=match):
            predict_image(loaded, photo, dst, device=CPU, **options)

    (tmp_path / "old.tif").touch()
    fails(tmp_path / "old.tif", "exists already.*--overwrite")
    (tmp_path / "m.overlay.png").touch()
    fails(tmp_path / "m.png", "m.overlay.png exists already")
    fails(tmp_path / "map.jpg", "ends in .tif or .png; JPEG would blur")
    fails(tmp_path / "no" / "map.tif", "there is no folder")
    (tmp_path / "folder.tif").mkdir()
    fails(tmp_path / "folder.tif", "it is a folder")
    fails(photo, "cannot replace its own source", overwrite=True)
    fails(tmp_path / "map.tif", "multiple of 256", block_px=300)
    fails(tmp_path / "map.tif", "at least 1", batch=0)


def test_a_student_that_does_not_know_its_data_set_is_refused(tmp_path: Path, photo: Path) -> None:
    for meta, match in (({"dataset": {"name": "x"}}, "lacks classes"), ({"crop_px": 63}, "patches of 8 px")):
        loaded = _loaded()
        loaded = LoadedStudent(loaded.student, {**loaded.meta, **meta})
        with pytest.raises(CheckpointError, match=match):
            predict_image(loaded, photo, tmp_path / "map.tif", device=CPU)


def test_predict_opens_a_file_or_a_run_folder(tmp_path: Path, photo: Path) -> None:
    loaded, run = _loaded(), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    save_student(run / "checkpoints" / "best.safetensors", loaded.student, meta=loaded.meta)
    predict(run, photo, tmp_path / "a.tif", device=CPU)
    predict(run / "checkpoints" / "best.safetensors", photo, tmp_path / "b.tif", device=CPU)
    assert np.array_equal(_map(tmp_path / "a.tif"), _map(tmp_path / "b.tif"))
    with pytest.raises(CheckpointError, match="no run folder"):
        predict(tmp_path, photo, tmp_path / "c.tif", device=CPU)
    with pytest.raises(CheckpointError, match="no such file"):
        predict(tmp_path / "nothing", photo, tmp_path / "c.tif", device=CPU)


REAL = (
    "hro_rgb_u8_epsg26913_0.15m",
    "hro_rgb_u8_epsg26913_0.15m_internalmask",
    "naip_4band_u8_epsg26914_nodata0",
    "rasterio_RGB_u8_epsg32618_nodata0",
    "landsat_3band_u16_epsg32618_nodata0",
)


@pytest.mark.parametrize("name", REAL)
def test_real_rasters(tmp_path: Path, repo: Path, name: str) -> None:
    src = repo.parent / "shared" / "data" / "geotiff" / f"{name}.tif"
    if not src.exists():
        pytest.skip("needs ../shared/data/geotiff")
    is_deep = "_u16_" in name
    spec = DatasetSpec(name="real", classes=CLASSES, palette=PALETTE, scaling=((0.0, 3000.0),) * 3 if is_deep else None)
    result = predict_image(_loaded(spec, crop_px=256), src, tmp_path / "map.tif", device=CPU)
    with rasterio.open(src) as a, rasterio.open(tmp_path / "map.tif") as b:
        assert (b.crs, b.transform, b.shape) == (a.crs, a.transform, a.shape)
        labels = b.read(1)
        expected = a.read_masks([1, 2, 3]).any(axis=0)
    assert np.array_equal(labels != 255, expected)
    assert result["valid_share"] == pytest.approx(expected.mean())
