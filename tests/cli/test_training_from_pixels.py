"""Stored pixels end to end: stage 1 keeps them, stage 2 reads them, and a run's bits do not tell which it did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from rsmtdf.cli.planning import plan_cache
from rsmtdf.cli.training import TrainOptions, train_run
from rsmtdf.cli.workspace import data_root
from rsmtdf.errors import StoreCorrupt, StoreMismatch
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


def test_a_store_is_made_with_pixels_and_cared_for_by_commands(tiny: Any, command: Any) -> None:
    store = tiny.store
    assert command("cache-features", "--config", tiny.config, "--out", store, "--store-pixels").code == 0
    assert "pixels     of" in command("cache", "info", store).out
    assert command("cache", "verify", store).code == 0
    shard = next(f for f in sorted((store / "pixels" / "weak").iterdir()) if f.name.startswith("c."))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    assert command("cache", "verify", store).code == 1
    planned = command("cache", "repair", store, "--dry-run")
    assert "store the pixels of 1 views" in planned.out
    said = command("cache", "repair", store)
    assert said.code == 0
    assert "stored     pixels of 1 views" in said.out
    assert command("cache", "verify", store).code == 0
    assert command("cache", "rm", store, "--pixels", "--yes").code == 0
    assert not (store / "pixels").exists()
    assert command("cache", "verify", store).code == 0


def test_damaged_pixels_stop_training_and_say_how_to_go_on(tiny: Any, tmp_path: Path, say: Say) -> None:
    tiny.cache(STORED)
    for file in (tiny.store / "pixels" / "valid").glob("c.*"):
        data = bytearray(file.read_bytes())
        for k in range(0, len(data) - 2000, 50):
            data[k] ^= 1
        file.write_bytes(data)
    with pytest.raises(StoreCorrupt, match="stored_pixels=never"):
        run(tiny, tmp_path / "auto", say)
    run(tiny, tmp_path / "never", say, "train.stored_pixels=never")


def test_masks_stay_free_to_correct(tiny: Any, tmp_path: Path, say: Say) -> None:
    tiny.cache(STORED)
    for file in (tiny.folder / "data").rglob("masks_png/*.png"):
        if "Train" in file.parts:
            mask = np.asarray(Image.open(file))
            Image.fromarray(np.where(mask > 0, 1 + mask % 7, 0).astype(np.uint8)).save(file)
    run(tiny, tmp_path / "read", say)
    run(tiny, tmp_path / "made", say, "train.stored_pixels=never")
    read, made = (safetensors.torch.load_file(RunFolder.open(tmp_path / name).last) for name in ("read", "made"))
    assert all(torch.equal(made[key], read[key]) for key in made)


def test_what_is_not_stored_yet_is_made(tiny: Any, tmp_path: Path, say: Say) -> None:
    tiny.cache(STORED)
    store = FeatureStore.open(tiny.store, writable=True)
    assert store.pixels is not None
    for shard in range(0, store.n_shards, 2):
        words = np.zeros(store.shard_views, np.uint64)
        with store.locked():
            store.pixels.status.unseal(shard)
        store.pixels.status.write_shard(shard, words)
    assert 0 < len(store.pending_pixels()) < store.n_views
    said: list[str] = []
    run(tiny, tmp_path / "some", said.append)
    run(tiny, tmp_path / "none", say, "train.stored_pixels=never")
    assert any("made from the images" in line for line in said)
    some, none = (safetensors.torch.load_file(RunFolder.open(tmp_path / name).last) for name in ("some", "none"))
    assert all(torch.equal(some[key], none[key]) for key in some)


def test_views_made_for_the_teachers_are_stored_along_with_them(tiny: Any) -> None:
    shutil.rmtree(tiny.store)
    result = tiny.cache(STORED)
    store = FeatureStore.open(tiny.store)
    assert result["pixels"]["stored"] == store.n_views
    assert result["pixels"]["views"] == 0, "nothing is made twice"
    # Two more seeds: a store that keeps pixels keeps those of new views too.
    result = tiny.cache("cache.seeds=4")
    grown = FeatureStore.open(tiny.store)
    assert result["views"] == grown.n_views - store.n_views
    assert result["pixels"] == result["pixels"] | {"stored": grown.n_views, "views": 0, "missing": 0}
    assert verify(tiny.store, stop=StopFlag()).is_sound


def test_pieces_store_the_pixels_of_views_that_are_cached_already(tiny: Any, command: Any) -> None:
    def piece(index: int) -> Any:
        said = command(
            "cache-features", "--config", tiny.config, "--out", tiny.store, "--device", "cpu", "--store-pixels",
            "--shard-range", f"{index}/2", "--json",
        )  # fmt: skip
        assert said.code == 0, said.err
        return json.loads(said.out)

    first = piece(0)
    store = FeatureStore.open(tiny.store)
    left = len(store.pending_pixels())
    assert 0 < left < store.n_views
    assert first["pixels"] == first["pixels"] | {
        "views": store.n_views - left,
        "stored": store.n_views - left,
        "missing": 0,
    }
    sealed = tiny.store / "pixels" / "status" / "sealed"
    before = sealed.stat().st_size
    assert piece(1)["pixels"]["views"] == left
    assert not len(store.pending_pixels())
    assert sealed.stat().st_size > before + 8 * left, "whoever comes last seals"
    assert piece(0)["pixels"]["views"] == 0
    assert verify(tiny.store, stop=StopFlag()).is_sound


def test_a_piece_of_a_store_that_was_prepared_without_pixels_stores_its_own(tiny: Any, command: Any) -> None:
    shutil.rmtree(tiny.store)
    options = ("cache-features", "--config", tiny.config, "--out", tiny.store, "--device", "cpu")
    assert command(*options, "--init").code == 0
    said = command(*options, "--store-pixels", "--shard-range", "0/2", "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert 0 < result["views"] == result["pixels"]["stored"]
    assert result["pixels"]["views"] == 0, "nothing is made twice"
    assert "splits" not in said.err, "a store that is prepared is not planned again"


def test_the_plan_prices_pixels_and_a_finished_store_needs_none(tiny: Any) -> None:
    def planned(*overrides: str) -> Any:
        source = tiny.source(*overrides)
        return plan_cache(source, root=data_root(source, root=None), out=tiny.store).plan

    without, asked = planned(), planned(STORED)
    assert without.new_pixels == {}
    assert sum(asked.new_pixels.values()) == FeatureStore.open(tiny.store).n_views
    tiny.cache(STORED)
    written = list((tiny.store / "pixels").rglob("c.*"))
    overhead = sum(64 * 16 + 4 for f in written if f.parent.name != "status")
    crcs = 4 * (3 * asked.new_pixels["strong"] + 2 * asked.new_pixels["weak"])
    payload = sum(f.stat().st_size for f in written if f.parent.name != "status")
    assert asked.new_bytes - without.new_bytes == asked.new_pixel_bytes == payload - overhead - crcs
    assert asked.new_files["pixels"] == len(written)
    assert planned().new_pixel_bytes == 0
