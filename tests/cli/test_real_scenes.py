"""A user's own folder of real scenes, from `init` to maps and back: 72 aerial images that lie beside the checkout.

The models are tiny and start from random weights, so nothing here says what the method gains. What must hold all the
same: the student learns its six labelled scenes, knows more of regions it never saw than any single class would, the
maps lie where their sources lie, and working on the masks costs only what changed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from PIL import Image
from typer.testing import CliRunner

from rsmtdf.cli.main import app
from rsmtdf.cli.planning import student_grid, teacher_sources
from rsmtdf.cli.workspace import Workspace, data_root, load_source, open_workspace
from rsmtdf.config import parse_experiment, read_yaml
from rsmtdf.learning.run import RunFolder
from rsmtdf.store.store import FeatureStore

pytestmark = pytest.mark.slow

CLASSES = ["building", "land", "road", "vegetation", "water"]
PALETTE = [[60, 16, 152], [132, 41, 246], [110, 193, 228], [254, 221, 58], [226, 169, 41]]
LABELLED = ["tile1_part009", "tile4_part002", "tile5_part004", "tile6_part001", "tile6_part004", "tile8_part004"]
WEAK_VIEWS = 4
STEPS = 160

_VIT = {"patch_size": 7, "embed_dim": 32, "depth": 4, "num_heads": 4}
_TEACHER = {"library": "timm", "model": "vit_tiny_patch16_224", "weights": "random", "overrides": _VIT}
SMALL: dict[str, Any] = {
    "views": {"crop_px": 56},
    "teachers": [{"name": "dense", **_TEACHER}, {"name": "coarse", **_TEACHER, "seed": 1, "input_px": 28}],
    "cache": {"seeds": 1, "weak_views": WEAK_VIEWS, "batch": 32},
    "student": {
        "backbone": "vit_tiny_patch16_224",
        "weights": "random",
        "img_px": 56,
        "overrides": _VIT,
        "layers": [0, 1, 2, 3],
        "dpt_features": 8,
        "dpt_channels": [8, 8, 8, 8],
        "translator_hidden": 64,
    },
    "train": {
        "steps": STEPS,
        "batch": 8,
        "micro_batch": 8,
        "backbone_lr": 2.0e-3,
        "head_lr_factor": 2.0,
        "conf_threshold": 0.7,
        "ema_ratio": 0.98,
        "validate_every": STEPS,
        "patience": None,
        "log_every": 1,
    },
}


def rsmtdf(*arguments: object) -> Any:
    """What the command prints: its JSON where `--json` is among the arguments, else its text."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


@dataclass(frozen=True)
class Project:
    """A folder of images and masks with its configuration, its store and a run."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "rsmtdf.yaml"

    @property
    def store(self) -> Path:
        return self.folder / "feats.zarr"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def edit(self, *, dataset: dict[str, Any], splits: dict[str, Any]) -> None:
        """Corrects what `init` proposed, and takes the small models."""
        settings = yaml.safe_load(self.config.read_text())
        settings["dataset"].update(dataset)
        settings["splits"].update(splits)
        self.config.write_text(yaml.safe_dump({**settings, **SMALL}, sort_keys=False))

    def label(self, scenes: list[str]) -> None:
        (self.folder / "labels.txt").write_text("".join(f"{scene}.jpg\n" for scene in scenes))

    def cache(self) -> dict[str, Any]:
        found: dict[str, Any] = rsmtdf("cache-features", "--config", self.config, "--out", self.store, "--json")
        return found

    def train(self, run: Path, *more: object) -> list[dict[str, Any]]:
        """The run's records."""
        rsmtdf("train", "--cache", self.store, "--config", self.config, "--out", run, "--device", "cpu", *more)
        return RunFolder.open(run).records()

    def workspace(self) -> Workspace:
        source = load_source(dataset=None, config=self.config, overrides=())
        return open_workspace(source, root=data_root(source, root=None))


@pytest.fixture(scope="module")
def shared(repo: Path) -> Path:
    path = repo.parent / "shared" / "data"
    if not (path / "dubai").is_dir():
        pytest.skip("no ../shared/data/dubai beside the checkout")
    return path


@pytest.fixture(scope="module", autouse=True)
def _no_other_data() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RSMTDF_DATA", raising=False)
        yield


@pytest.fixture(scope="module")
def proposed(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The images as their owner has them, after `rsmtdf init`."""
    project = Project(tmp_path_factory.mktemp("scenes") / "dubai")
    project.folder.mkdir()
    (project.folder / "images").symlink_to(shared / "dubai" / "images")
    shutil.copytree(shared / "dubai" / "masks", project.folder / "masks", copy_function=shutil.copyfile)
    project.folder.joinpath("masks").chmod(0o755)
    rsmtdf("init", project.folder)
    return project


@pytest.fixture(scope="module")
def dubai(proposed: Project) -> Project:
    """Named, split, cached and trained: read-only; `own` is a copy to work on."""
    proposal = yaml.safe_load(proposed.config.read_text())
    assert proposal["root"] == "."
    assert proposal["splits"]["by"] == "group", "eight groups are to be seen in the names"
    assert len(proposal["dataset"]["classes"]) == len(CLASSES)
    # This seed holds out two of the smaller groups, so that scoring takes seconds.
    proposed.edit(
        dataset={"classes": CLASSES, "palette": PALETTE, "tile_px": 256},
        splits={"group": r"^(tile\d+)_", "fractions": [0.8, 0.1, 0.1], "seed": 12, "labels": "labels.txt"},
    )
    proposed.label(LABELLED)
    proposed.cache()
    proposed.train(proposed.run)
    return proposed


@pytest.fixture
def own(dubai: Project, tmp_path: Path) -> Project:
    shutil.copytree(dubai.folder, tmp_path / "dubai", symlinks=True, ignore=shutil.ignore_patterns("run"))
    return Project(tmp_path / "dubai")


def test_the_configuration_of_the_walk_through_is_valid(repo: Path) -> None:
    page = (repo / "docs" / "your-own-images.md").read_text(encoding="utf-8")
    named, small = (read_yaml(text, where="the page") for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[:2])
    dataset = {"name": "dubai", "palette": PALETTE, **named["dataset"]}
    experiment = parse_experiment({**named, **small, "dataset": dataset}, where="the page")
    assert experiment.dataset.classes == tuple(CLASSES)
    assert experiment.train.steps == 300
    assert teacher_sources(experiment).keys() == {"dense", "coarse"}
    assert student_grid(experiment) == (8, 8)


def test_the_check_finds_the_72_scenes_in_order(dubai: Project) -> None:
    found = rsmtdf("data", "check", "--config", dubai.config, "--json")
    assert found["problems"] == []
    assert (found["images"], found["masks"], found["images_without_mask"]) == (72, 72, [])
    total = sum(found["class_pixels"].values())
    shares = {name: round(pixels / total, 2) for name, pixels in found["class_pixels"].items()}
    assert shares == {"building": 0.13, "land": 0.53, "road": 0.09, "vegetation": 0.1, "water": 0.14}


def test_groups_stay_whole_and_six_scenes_are_labelled(dubai: Project) -> None:
    space = dubai.workspace()
    parts = (space.splits.train, space.splits.val, space.splits.test)
    groups = [{tile.split("_")[0] for tile in part} for part in parts]
    assert all(groups)
    assert sum(map(len, groups)) == len(set.union(*groups)) == 8, "no region is on two sides of a split"
    assert {tile.split("/")[0] for tile in space.labelled} == set(LABELLED)
    assert len(space.pool) > 10 * len(space.labelled), "all other tiles of the training groups are unlabelled"
    assert set(space.labelled) < set(space.pool) == set(space.splits.train)


def test_the_labelled_loss_falls_and_the_student_catches_up_with_the_teachers(dubai: Project) -> None:
    records = [r for r in RunFolder.open(dubai.run).records() if r["kind"] == "train"]
    assert len(records) == STEPS
    for term, share in (("loss_x", 0.8), ("distill/dense", 0.6), ("distill/coarse", 0.6)):
        values = [r[term] for r in records]
        early, late = np.mean(values[: STEPS // 5]), np.mean(values[-STEPS // 5 :])
        assert late < share * early, f"{term}: {early:.3f} -> {late:.3f}"


def test_held_out_groups_are_told_apart_better_than_by_one_class(dubai: Project) -> None:
    scores = rsmtdf("evaluate", dubai.run, "--split", "test", "--json")
    assert scores["tiles"] == len(dubai.workspace().splits.test)
    confusion = np.array(scores["confusion"])
    pixels = confusion.sum(axis=1)
    # One class everywhere has its share of the pixels as IoU and 0 for all others: 0.09 here, at best.
    floor = (pixels / pixels.sum()).max() / (pixels > 0).sum()
    assert scores["miou"] > 2.5 * floor
    assert scores["oa"] > pixels.max() / pixels.sum() + 0.1
    assert scores["per_class"]["water"]["iou"] > 0.5, "the most distinct class of this region"


def test_a_map_of_a_held_out_scene_agrees_with_its_mask(dubai: Project, shared: Path, tmp_path: Path) -> None:
    source = shared / "dubai" / "images" / "tile3_part001.jpg"
    told = rsmtdf("predict", dubai.run, source, tmp_path / "map.png", "--json")
    with Image.open(tmp_path / "map.png") as image, Image.open(source) as scene:
        assert image.mode == "P"
        assert image.size == scene.size
        assert image.getpalette()[: 3 * len(CLASSES)] == [v for colour in PALETTE for v in colour]
        found = np.array(image)
    mask = np.array(Image.open(shared / "dubai" / "masks" / "tile3_part001.png"))
    known = mask != 255
    right = (found == mask)[known].mean()
    assert right > max(np.bincount(mask[known]) / known.sum()), "no better than one class for the whole scene"
    with Image.open(told["overlay"]) as overlay:
        assert overlay.size == image.size
    assert sum(told["classes"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "name",
    [
        "hro_rgb_u8_epsg26913_0.15m.tif",
        "hro_rgb_u8_epsg26913_0.15m_internalmask.tif",
        "rasterio_RGB_u8_epsg32618_nodata0.tif",
        "naip_4band_u8_epsg26914_nodata0.tif",
    ],
)
def test_a_geotiff_gets_a_map_in_its_own_place(dubai: Project, shared: Path, tmp_path: Path, name: str) -> None:
    told = rsmtdf("predict", dubai.run, shared / "geotiff" / name, tmp_path / "map.tif", "--json")
    with rasterio.open(shared / "geotiff" / name) as source, rasterio.open(tmp_path / "map.tif") as drawn:
        assert (drawn.crs, drawn.transform, drawn.shape) == (source.crs, source.transform, source.shape)
        assert drawn.crs is not None
        assert (drawn.count, drawn.dtypes[0], drawn.nodata) == (1, "uint8", 255)
        labels, is_there = drawn.read(1), source.dataset_mask() > 0
    assert np.array_equal(labels != 255, is_there), "nodata exactly where the source has none"
    assert labels[is_there].max() < len(CLASSES)
    assert told["valid_share"] == pytest.approx(is_there.mean())


def test_a_corrected_mask_costs_nothing_and_is_learned_from(own: Project, tmp_path: Path) -> None:
    once = own.train(tmp_path / "before", "--budget", "2-steps")
    for scene in LABELLED:
        path = own.folder / "masks" / f"{scene}.png"
        mask = np.array(Image.open(path))
        mask[mask == CLASSES.index("land")] = CLASSES.index("building")  # in the first batch, whichever it is
        path.unlink()
        Image.fromarray(mask).save(path)
    assert own.cache()["views"] == 0
    again = own.train(tmp_path / "after", "--budget", "2-steps")
    first, other = once[0], again[0]
    assert first["distill"] == other["distill"], "the same views, the same targets"
    assert first["loss_x"] != other["loss_x"], "other labels"


def test_one_more_labelled_scene_costs_its_weak_views_alone(own: Project, tmp_path: Path) -> None:
    before = own.workspace().labelled
    stored = {p: p.read_bytes() for p in own.store.rglob("c.*") if "codes" in p.parts}
    assert stored
    own.label([*LABELLED, "tile7_part004"])
    more = set(own.workspace().labelled) - set(before)
    assert {tile.split("/")[0] for tile in more} == {"tile7_part004"}
    assert own.cache()["views"] == WEAK_VIEWS * len(more)
    assert own.cache()["views"] == 0
    assert all(path.read_bytes() == data for path, data in stored.items()), "growing rewrote features"
    assert FeatureStore.open(own.store).info()["complete"]
    records = own.train(tmp_path / "run", "--budget", "2-steps")
    assert np.isfinite(records[0]["loss"])
