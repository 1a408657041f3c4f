"""Stored pixels end to end: stage 1 keeps them, stage 2 reads them, and a run's bits do not tell which it did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from rsmtdf.cli.training import TrainOptions, train_run
from rsmtdf.errors import StoreMismatch
from rsmtdf.learning.run import RunFolder
from rsmtdf.signals import StopFlag
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.verify import verify

Say = Callable[[str], None]
STORED = "cache.store_pixels=true"


def run(tiny: Any, out: Path, say: Say, *overrides: str) -> dict[str, Any]:
    return train_run(
        TrainOptions(cache=tiny.store, out=out, device="cpu", overrides=overrides), stop=StopFlag(), say=say
    )


def blacken_images(tiny: Any) -> int:
    """Puts black in place of every training image."""
    images = [f for f in (tiny.folder / "data").rglob("images_png/*.png") if "Train" in f.parts]
    for file in images:
        with Image.open(file) as image:
            black = Image.new(image.mode, image.size)
        black.save(file)
    return len(images)


def test_a_store_gains_pixels_later_without_asking_the_teachers(tiny: Any) -> None:
    before = FeatureStore.open(tiny.store).status("dense")
    result = tiny.cache(STORED)
    store = FeatureStore.open(tiny.store)
    assert result["views"] == 0
    assert result["pixels"]["views"] == store.n_views
    assert not len(store.pending_pixels())
    assert (store.status("dense") == before).all()
    assert tiny.cache(STORED)["pixels"]["views"] == 0
    assert verify(tiny.store, stop=StopFlag()).is_sound


def test_runs_with_and_without_stored_pixels_are_the_same_bits(tiny: Any, tmp_path: Path, say: Say) -> None:
    said: list[str] = []
    run(tiny, tmp_path / "made", say)
    tiny.cache(STORED)
    run(tiny, tmp_path / "read", said.append)
    assert any("read from the store" in line for line in said)
    made, read = (safetensors.torch.load_file(RunFolder.open(tmp_path / name).last) for name in ("made", "read"))
    assert made.keys() == read.keys()
    assert all(torch.equal(made[key], read[key]) for key in made)


def test_with_stored_pixels_training_looks_into_no_training_image(tiny: Any, tmp_path: Path, say: Say) -> None:
    run(tiny, tmp_path / "made", say)
    tiny.cache(STORED)
    assert blacken_images(tiny)
    run(tiny, tmp_path / "read", say)
    made, read = (
        [r for r in RunFolder.open(tmp_path / name).records() if r["kind"] == "train"] for name in ("made", "read")
    )
    assert [r["loss"] for r in made] == [r["loss"] for r in read]
    with pytest.raises(StoreMismatch):
        run(tiny, tmp_path / "never", say, "train.stored_pixels=never")
