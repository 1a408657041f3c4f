"""`rsmtdf cache verify`: exit codes, what is said and where, and the check against the live teachers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rsmtdf.store.store import FeatureStore

Run = Callable[..., Any]


def flip(file: Path, at: int = 100) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def first_shard(tiny: Any, teacher: str) -> Path:
    array = FeatureStore.open(tiny.store).teacher(teacher).arrays[0]
    return next((tiny.store / "teachers" / teacher / array.name).glob("c.0.*"))


def test_a_sound_store(tiny: Any, command: Run) -> None:
    n = FeatureStore.open(tiny.store).n_views
    said = command("cache", "verify", tiny.store)
    assert said.code == 0, said.out
    assert f"store      {tiny.store}: sound, complete" in said.out
    assert f"teacher    dense: {n} views checked, {n} of {n} done" in said.out
    assert "GB/s" in said.out
    assert "next" not in said.out


def test_damage_names_store_teacher_view_file_and_what_to_do(tiny: Any, command: Run) -> None:
    file = first_shard(tiny, "dense")
    flip(file)
    view = FeatureStore.open(tiny.store).describe(0)
    said = command("cache", "verify", tiny.store, "--live", "3")
    assert said.code == 1
    assert f"damaged    store {tiny.store}, teacher 'dense', view {view}, file {file}: payload checksum is" in said.out
    assert "live       not done" in said.out
    assert said.out.rstrip().endswith(f"rsmtdf cache repair {tiny.store}")


def test_an_incomplete_store_is_sound(tiny: Any, command: Run, withdraw: Callable[..., None]) -> None:
    store = FeatureStore.open(tiny.store, writable=True)
    withdraw(store, 0, "dense")
    said = command("cache", "verify", tiny.store)
    assert said.code == 0
    assert "sound, incomplete" in said.out
    assert f"{len(store.rows_of_shard(0))} to do" in said.out
    found = json.loads(command("cache", "verify", tiny.store, "--json").out)
    assert (found["sound"], found["complete"], found["damage"]) == (True, False, [])


def test_json_names_every_damaged_view(tiny: Any, command: Run) -> None:
    file = first_shard(tiny, "coarse")
    file.unlink()
    found = json.loads(command("cache", "verify", tiny.store, "--json").out)
    store = FeatureStore.open(tiny.store)
    assert [d["view"] for d in found["damage"]] == [store.describe(r) for r in store.rows_of_shard(0).tolist()]
    assert {(d["kind"], d["teacher"], d["file"], d["what"]) for d in found["damage"]} == {
        ("features", "coarse", str(file), "the shard file is missing")
    }


def test_there_is_no_store(command: Run) -> None:
    said = command("cache", "verify", "nowhere.zarr")
    assert said.code == 2
    assert "no feature store at nowhere.zarr" in said.err


def test_a_manifest_that_is_damaged_is_damage(tiny: Any, command: Run) -> None:
    flip(tiny.store / "zarr.json", 400)
    said = command("cache", "verify", tiny.store)
    assert said.code == 1
    assert f"file {tiny.store / 'zarr.json'}" in said.out


def test_live_features_are_the_stored_ones(tiny: Any, command: Run) -> None:
    shutil.move(tiny.folder / "data", tiny.folder / "elsewhere")
    refused = command("cache", "verify", tiny.store, "--live", "6")
    assert refused.code == 2
    assert "--root" in refused.err
    options = ["--root", tiny.folder / "elsewhere", "--device", "cpu"]
    said = command("cache", "verify", tiny.store, "--live", "6", *options)
    assert said.code == 0, said.err
    assert "live       dense: 6 views made again: cosine mean 0.999" in said.out or "mean 1.0000" in said.out
    found = json.loads(command("cache", "verify", tiny.store, "--live", "6", *options, "--json").out)["live"]
    for check in found.values():
        assert check["compared"] == 6
        assert check["cosine_min"] > 0.999
        assert check["other_pixels"] == []
        assert check["other_draws"] == {}
        assert check["same_teacher"]


def test_live_pixels_that_differ(tiny: Any, command: Run) -> None:
    for path in (tiny.folder / "data").rglob("images_png/*.png"):
        Image.fromarray(255 - np.array(Image.open(path))).save(path)
    said = command("cache", "verify", tiny.store, "--live", "4", "--device", "cpu")
    assert said.code == 1
    assert said.out.count("OTHER PIXELS") == 8
    assert "dense: 0 views made again" in said.out


def test_live_wants_the_stored_teacher(tiny: Any, command: Run) -> None:
    other = tiny.config.with_name("other.yaml")
    other.write_text(tiny.config.read_text().replace("seed: 1", "seed: 7"))
    said = command("cache", "verify", tiny.store, "--live", "2", "--config", other, "--device", "cpu")
    assert said.code == 2
    assert "teacher 'coarse'" in said.err


@pytest.mark.parametrize("value", ["-1", "many"])
def test_live_wants_a_number(tiny: Any, command: Run, value: str) -> None:
    assert command("cache", "verify", tiny.store, "--live", value).code == 2
