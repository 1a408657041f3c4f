"""A tiny world and a tiny experiment, cached once: what the tests of the whole sequence start from."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rsmtdf.cli.caching import run_cache
from rsmtdf.cli.main import main
from rsmtdf.cli.planning import plan_cache
from rsmtdf.cli.workspace import Source, data_root, load_source, with_labels
from rsmtdf.data.synthetic.world import write_world
from rsmtdf.signals import StopFlag
from rsmtdf.store.store import FeatureStore

TINY_VIT = {"patch_size": 14, "embed_dim": 24, "depth": 4, "num_heads": 2}
TINY: dict[str, Any] = {
    "root": "data",
    "dataset": {
        "name": "tiny",
        "layout": "loveda",
        "classes": ["background", "building", "road", "water", "barren", "forest", "agriculture"],
        "palette": [[255, 255, 255], [255, 0, 0], [255, 255, 0], [0, 0, 255], [9, 9, 9], [0, 255, 0], [255, 195, 128]],
        "label_map": [[0, 255], *([v, v - 1] for v in range(1, 8))],
        "tile_px": 64,
    },
    "splits": {
        "train": "data/lists/train.txt",
        "val": "data/lists/val.txt",
        "test": "data/lists/test.txt",
        "labels": "6",
    },
    "views": {"crop_px": 56},
    "teachers": [
        {
            "name": "dense",
            "library": "timm",
            "model": "vit_tiny_patch16_224",
            "weights": "random",
            "overrides": TINY_VIT,
        },
        {
            "name": "coarse",
            "library": "timm",
            "model": "vit_tiny_patch16_224",
            "weights": "random",
            "seed": 1,
            "input_px": 28,
            "overrides": TINY_VIT,
        },
    ],
    "cache": {"seeds": 2, "weak_views": 5, "batch": 16},
    "student": {
        "backbone": "vit_tiny_patch16_224",
        "weights": "random",
        "img_px": 56,
        "overrides": TINY_VIT,
        "layers": [0, 1, 2, 3],
        "dpt_features": 8,
        "dpt_channels": [8, 8, 8, 8],
        "translator_hidden": 16,
    },
    "train": {
        "steps": 12,
        "batch": 4,
        "micro_batch": 4,
        "backbone_lr": 1.0e-3,
        "head_lr_factor": 2.0,
        "conf_threshold": 0.2,
        "validate_every": 4,
        "log_every": 1,
        "min_token_valid": 0.0,
        "patience": None,
    },
}


@dataclass(frozen=True)
class Tiny:
    """A folder with `data/`, `tiny.yaml`, and the store `feats.zarr` made from them."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "tiny.yaml"

    @property
    def store(self) -> Path:
        return self.folder / "feats.zarr"

    def source(self, *overrides: str, labels: str | None = None) -> Source:
        return with_labels(load_source(dataset=None, config=self.config, overrides=overrides), labels)

    def cache(self, *overrides: str, labels: str | None = None, stop: StopFlag | None = None) -> dict[str, Any]:
        """Stage 1, as the command line does it."""
        source = self.source(*overrides, labels=labels)
        job = plan_cache(source, root=data_root(source, root=None), out=self.store)
        return run_cache(job, device="cpu", stop=StopFlag() if stop is None else stop, say=lambda line: None)


@pytest.fixture(scope="session")
def cached_tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Shared and read-only: copy it with `tiny` before changing anything."""
    tiny = Tiny(tmp_path_factory.mktemp("tiny"))
    # An odd number of training scenes gives a pool of 20 tiles; the odd pool has its own test.
    write_world(tiny.folder / "data", tile_px=64, train=5, val=2, test=2, seed=0, scene_px=160)
    tiny.config.write_text(yaml.safe_dump(TINY))
    tiny.cache()
    return tiny


@pytest.fixture
def tiny(cached_tiny: Tiny, tmp_path: Path) -> Tiny:
    """A copy of one's own."""
    shutil.copytree(cached_tiny.folder, tmp_path / "tiny")
    own = Tiny(tmp_path / "tiny")
    store = FeatureStore.open(own.store, writable=True)
    store.amend(data_root=str(own.folder / "data"), experiment={**store.experiment, "base": str(own.folder)})
    return own


@pytest.fixture
def say() -> Callable[[str], None]:
    return lambda line: None


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RSMTDF_DATA", raising=False)
    return folder


@pytest.fixture
def command(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`rsmtdf` as typed: exit code, stdout and stderr. An exception that reaches the user fails the test."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["rsmtdf", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def tiny_experiment() -> dict[str, Any]:
    """The tiny experiment as its YAML says it: models that take milliseconds, few views."""
    return copy.deepcopy(TINY)
