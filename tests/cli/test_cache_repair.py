"""`rsmtdf cache repair`: a damaged store is found, cut down to what is good, and made whole by stage 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from rsmtdf.cli.training import TrainOptions, train_run
from rsmtdf.errors import StoreCorrupt
from rsmtdf.signals import StopFlag
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.store import FeatureStore

Run = Callable[..., Any]


def flip(file: Path, at: int = 100) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def train(tiny: Any, out: Path) -> dict[str, Any]:
    options = TrainOptions(cache=tiny.store, out=out, device="cpu", train={"budget": "2-steps"})
    return train_run(options, stop=StopFlag(), say=lambda line: None)


def shard_files(store: Path) -> dict[str, int]:
    return {str(f.relative_to(store)): f.stat().st_mtime_ns for f in store.glob("teachers/*/codes/c.*")}


def first_row_read(tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The first view whose features training asks for."""
    rows: list[int] = []

    def fetch(source: CachedFeatures, asked: np.ndarray, pixels: object = None) -> NoReturn:
        rows.extend(asked.tolist())
        raise StoreCorrupt("enough")

    with monkeypatch.context() as patched, pytest.raises(StoreCorrupt, match="enough"):
        patched.setattr(CachedFeatures, "fetch", fetch)
        train(tiny, out)
    return rows[0]


def test_a_flipped_byte_is_found_withdrawn_and_computed_again(
    tiny: Any, tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore.open(tiny.store)
    row = first_row_read(tiny, tmp_path / "asked", monkeypatch)
    shard, slot = divmod(row, store.shard_views)
    name = f"teachers/dense/codes/c.{shard}.0.0"
    file = tiny.store / name
    good = file.read_bytes()
    flip(file, slot * (store.teacher("dense").arrays[0].view_bytes + 4) + 100)
    with pytest.raises(StoreCorrupt, match=f"rsmtdf cache repair {tiny.store}"):
        train(tiny, tmp_path / "refused")

    said = command("cache", "repair", tiny.store)
    assert said.code == 1, said.err
    views = store.n_views
    assert f"dense: {views} views checked, 1 damaged; 1 shard(s) withdrawn" in said.out
    assert f"coarse: {views} views checked, none damaged\n" in said.out
    assert f"view {store.describe(row)}: payload checksum is" in said.out
    assert "next       rsmtdf cache-features, with the configuration" in said.out

    store = FeatureStore.open(tiny.store)
    assert (store.missing_shards(["dense"]), store.missing_shards(["coarse"])) == ([shard], [])
    before = shard_files(tiny.store)
    tiny.cache()
    after = shard_files(tiny.store)
    assert [f for f in after if after[f] != before[f]] == [name]
    assert file.read_bytes() == good
    assert train(tiny, tmp_path / "run")["steps"] == 2

    again = command("cache", "repair", tiny.store)
    assert again.code == 0, again.out
    assert "nothing is wrong" in again.out


def test_a_sound_store_stays_as_it_is(tiny: Any, command: Run) -> None:
    files = {f: f.read_bytes() for f in tiny.store.rglob("*") if f.is_file() and f.name != "locks"}
    said = command("cache", "repair", tiny.store, "--json")
    found = json.loads(said.out)
    assert (said.code, found["sound"], found["status"], found["not_repaired"]) == (0, True, [], [])
    assert {t["checked"] for t in found["teachers"].values()} == {FeatureStore.open(tiny.store).n_views}
    assert {f: f.read_bytes() for f in files} == files


def test_json_names_every_damaged_view(tiny: Any, command: Run) -> None:
    (tiny.store / "teachers" / "coarse" / "codes" / "c.1.0.0").unlink()
    said = command("cache", "repair", tiny.store, "--json")
    coarse = json.loads(said.out)["teachers"]["coarse"]
    store = FeatureStore.open(tiny.store)
    assert said.code == 1
    assert coarse["withdrawn_shards"] == store.missing_shards(["coarse"]) == [1]
    assert list(coarse["damaged"]) == [store.describe(r) for r in store.rows_of_shard(1).tolist()]
    assert set(coarse["damaged"].values()) == {"the shard file is missing"}


def test_there_is_no_store(command: Run) -> None:
    said = command("cache", "repair", "nowhere.zarr")
    assert said.code == 2
    assert "nowhere.zarr" in said.err
