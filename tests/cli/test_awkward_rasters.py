"""Both stages on awkward rasters: four nameless 16-bit bands, nodata borders, an odd number of tiles, a bare scene.

The scenes of `rsmtdf.testing.scenes` lie in the folder as a survey agency delivers them; the configuration is what
their owner would make of `init` and of the error that asks for `scaling`.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import yaml
from typer.testing import CliRunner

from rsmtdf.cli.main import app
from rsmtdf.cli.workspace import Workspace, data_root, load_source, open_workspace
from rsmtdf.errors import DatasetError
from rsmtdf.learning.run import RunFolder
from rsmtdf.specs import to_dict
from rsmtdf.stages.cache import view_maker
from rsmtdf.stages.predict import predict_image
from rsmtdf.store.queries import strong_pairs
from rsmtdf.store.store import FeatureStore
from rsmtdf.student.artifact import load_student
from rsmtdf.testing.scenes import AwkwardScenes, write_awkward_scenes

SEEDS, WEAK_VIEWS, STEPS = 3, 4, 40
MIN_VALID = 0.2  # leaves 17 of the 19 tiles: still an odd number
CPU = torch.device("cpu")

_VIT = {"patch_size": 14, "embed_dim": 24, "depth": 4, "num_heads": 2}
_TEACHER = {"library": "timm", "model": "vit_tiny_patch16_224", "weights": "random", "overrides": _VIT}
SMALL: dict[str, Any] = {
    "views": {"crop_px": 56},
    "teachers": [{"name": "dense", **_TEACHER}, {"name": "coarse", **_TEACHER, "seed": 1, "input_px": 28}],
    "cache": {"seeds": SEEDS, "weak_views": WEAK_VIEWS, "batch": 16},
    "student": {
        "backbone": "vit_tiny_patch16_224",
        "weights": "random",
        "img_px": 56,
        "overrides": _VIT,
        "layers": [0, 1, 2, 3],
        "dpt_features": 8,
        "dpt_channels": [8, 8, 8, 8],
        "translator_hidden": 16,
    },
    "train": {
        "steps": STEPS,
        "batch": 4,
        "micro_batch": 4,
        "backbone_lr": 1.0e-3,
        "head_lr_factor": 2.0,
        "conf_threshold": 0.3,
        "log_every": 1,
    },
}


class Survey:
    """The 16-bit scenes' folder with its configuration, and the twin beside it."""

    def __init__(self, scenes: AwkwardScenes) -> None:
        self.scenes, self.folder = scenes, scenes.deep
        self.config, self.store, self.run = (self.folder / n for n in ("rsmtdf.yaml", "feats.zarr", "run"))
        self.cached: dict[str, Any] = {}
        """What stage 1 reported."""

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load(self.config.read_text())
        return found

    def write(self, settings: dict[str, Any]) -> None:
        self.config.write_text(yaml.safe_dump(settings, sort_keys=False))

    def workspace(self) -> Workspace:
        source = load_source(dataset=None, config=self.config, overrides=())
        return open_workspace(source, root=data_root(source, root=None))

    def image(self, name: str) -> Path:
        return self.folder / "images" / f"{name}.tif"


def rsmtdf(*arguments: object) -> Any:
    """What the command prints: its JSON where `--json` is among the arguments, else its text."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


def cache(survey: Survey) -> Any:
    return rsmtdf("cache-features", "--config", survey.config, "--out", survey.store, "--json")


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Survey:
    """Described with the help of `init` and of the message that asks for a scaling; cached and trained."""
    survey = Survey(write_awkward_scenes(tmp_path_factory.mktemp("awkward")))
    told = rsmtdf("init", survey.folder)
    assert "images have 4 bands without names" in told
    assert "uint16" in told
    settings = survey.read()
    settings["dataset"] |= {
        "classes": list(survey.scenes.deep_spec.classes),
        "palette": [list(colour) for colour in survey.scenes.deep_spec.palette],
        "bands": [2, 3, 4],
        "tile_px": 64,
        "min_valid": MIN_VALID,
    }
    del settings["dataset"]["scaling"]  # init's belongs to bands 1, 2, 3
    settings["splits"] = {"by": "tile", "fractions": [1.0, 0.0, 0.0], "labels": "all"}
    survey.write({**settings, **SMALL})
    with pytest.raises(DatasetError) as asked:
        cache(survey)
    assert not survey.store.exists()
    line = re.search(r"^scaling: .*$", str(asked.value), re.MULTILINE)
    assert line, str(asked.value)
    settings["dataset"] |= yaml.safe_load(line[0])
    survey.write({**settings, **SMALL})
    survey.cached = cache(survey)
    rsmtdf("train", "--cache", survey.store, "--out", survey.run, "--device", "cpu")
    return survey


def test_tiles_left_out_are_counted_and_said(survey: Survey) -> None:
    shares = [
        valid[y : y + 64, x : x + 64].sum() / 64**2
        for valid in survey.scenes.valid.values()
        for y in range(0, valid.shape[0], 64)
        for x in range(0, valid.shape[1], 64)
    ]
    assert len(shares) == survey.scenes.tiles == 19
    kept = sum(share >= MIN_VALID for share in shares)
    assert kept == 17
    space = survey.workspace()
    assert (len(space.tiles), len(space.left_out)) == (17, 2)
    assert survey.cached["left_out_tiles"] == 2
    assert not survey.cached["unreadable_tiles"]
    assert "left out   2 tiles" in rsmtdf("cache-features", "--config", survey.config, "--out", survey.store)
    report = rsmtdf("data", "check", "--config", survey.config, "--json")
    assert (report["tiles"], report["left_out_tiles"], report["problems"]) == (17, 2, [])


def test_the_scene_without_a_mask_is_unlabelled_and_cached(survey: Survey) -> None:
    space = survey.workspace()
    assert set(space.pool) - set(space.labelled) == {"corner/0_0"}
    report = rsmtdf("data", "check", "--config", survey.config, "--json")
    assert (report["labelled_tiles"], report["images_without_mask"]) == (16, ["images/corner.tif"])
    streams = rsmtdf("cache", "info", survey.store, "--json")["segments"]
    assert {(s["stream"], s["tiles"], s["seeds"]) for s in streams} == {("strong", 17, 1), ("weak", 16, WEAK_VIEWS)}
    assert survey.cached["views"] == SEEDS * 17 + WEAK_VIEWS * 16


def test_the_lone_tile_of_an_odd_pool_is_cached_as_it_is_and_not_paired(survey: Survey) -> None:
    store, space = FeatureStore.open(survey.store), survey.workspace()
    rows, partner = store.rows(stream="strong"), store.column("partner")
    lone = rows[partner[rows] == rows]
    assert sorted(store.column("seed")[lone].tolist()) == list(range(SEEDS)), "one in each seed"
    usable = store.usable(["dense", "coarse"])
    assert usable[rows].all(), "its features are there too"
    maker = view_maker(store, reader=space.dataset, tiles=space.tiles)
    for row in map(int, lone):
        (mixed,), plain = maker.mixed([row]), maker.unmixed(row)
        assert np.array_equal(mixed.pixels, plain.pixels)
        assert maker.box(row)[2:] == (0, 0), "nothing is pasted"
    pairs = strong_pairs(store, space.pool, usable)
    assert {seed: found.shape for seed, found in pairs.items()} == dict.fromkeys(range(SEEDS), (8, 2))
    assert not np.isin(lone, np.concatenate(list(pairs.values()))).any()


def test_training_ends_with_finite_losses_and_learns(survey: Survey) -> None:
    records = [r for r in RunFolder.open(survey.run).records() if r["kind"] == "train"]
    assert len(records) == STEPS
    assert all(np.isfinite(r["loss"]) for r in records)
    for term in ("loss_x", "distill/dense", "distill/coarse"):
        values = [r[term] for r in records]
        assert np.mean(values[-8:]) < 0.9 * np.mean(values[:8]), f"{term} did not fall: {values}"


@pytest.mark.parametrize("name", ["north", "south", "corner"])
def test_the_map_has_nodata_where_the_scene_has(survey: Survey, tmp_path: Path, name: str) -> None:
    rsmtdf("predict", survey.run, survey.image(name), tmp_path / "map.tif")
    with rasterio.open(survey.image(name)) as source, rasterio.open(tmp_path / "map.tif") as drawn:
        assert (drawn.crs, drawn.transform, drawn.shape) == (source.crs, source.transform, source.shape)
        assert drawn.nodata == 255
        labels = drawn.read(1)
    valid = survey.scenes.valid[name]
    assert not valid.all()
    assert np.array_equal(labels != 255, valid)
    assert labels[valid].max() < len(survey.scenes.deep_spec.classes)


def test_sixteen_bits_and_their_alpha_twin_give_the_same_map(survey: Survey, tmp_path: Path) -> None:
    scenes, maps = survey.scenes, []
    loaded = load_student(RunFolder.open(survey.run).best, device=CPU)
    for root, spec in ((scenes.deep, scenes.deep_spec), (scenes.alpha, scenes.alpha_spec)):
        student = replace(loaded, meta={**loaded.meta, "dataset": to_dict(spec)})
        path = tmp_path / f"{spec.name}.tif"
        told = predict_image(student, root / "images" / "north.tif", path, device=CPU)
        assert told["warnings"] == []
        with rasterio.open(path) as drawn:
            maps.append(drawn.read(1))
    deep, alpha = maps
    valid = scenes.valid["north"]
    assert np.array_equal(deep != 255, valid)
    assert np.array_equal(alpha != 255, valid)
    # Bytes that went through 16 bits come back at most one level off, which moves few borders.
    assert (deep == alpha)[valid].mean() > 0.98
    shares = np.bincount(deep[valid]) / valid.sum()
    assert (shares > 0.05).sum() >= 2, "a map of one class would prove nothing"


def test_an_eight_bit_scene_for_a_deep_student_is_warned_of(survey: Survey, tmp_path: Path) -> None:
    twin = survey.scenes.alpha / "images" / "north.tif"
    told = rsmtdf("predict", survey.run, twin, tmp_path / "map.tif", "--json")
    assert any("8-bit" in warning and "scaling" in warning for warning in told["warnings"])
