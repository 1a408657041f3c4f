"""`rsmtdf cache repair`: a damaged store is found out and made whole, and no sound view is touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from rsmtdf.cli.training import TrainOptions, train_run
from rsmtdf.errors import StoreCorrupt
from rsmtdf.signals import StopFlag
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.status import DONE, SKIPPED, crc_of, state_of
from rsmtdf.store.store import FeatureStore

Run = Callable[..., Any]


def flip(file: Path, at: int = 100) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def cut(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


def damage_view(tiny: Any, teacher: str, row: int) -> None:
    """Flips a bit of a view's payload."""
    store = FeatureStore.open(tiny.store)
    array = store.teacher(teacher).arrays[0]
    shard, slot = divmod(row, store.shard_views)
    (file,) = (tiny.store / "teachers" / teacher / array.name).glob(f"c.{shard}.*")
    flip(file, slot * (array.view_bytes + 4) + 100)


def shard_of(tiny: Any, teacher: str, shard: int) -> Path:
    array = FeatureStore.open(tiny.store).teacher(teacher).arrays[0]
    (file,) = (tiny.store / "teachers" / teacher / array.name).glob(f"c.{shard}.*")
    return file


def contents(tiny: Any, teacher: str) -> dict[str, np.ndarray]:
    """Every stored value of a teacher's views, in the order of rows."""
    store = FeatureStore.open(tiny.store)
    rows = np.concatenate([np.arange(s.row_start, s.row_stop) for s in store.segments])
    with CachedFeatures(store, [teacher], device="cpu") as source:
        return {"features": source.fetch(rows)[teacher].numpy(), "words": store.status(teacher)}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[k], b[k]) for k in a)


def train(tiny: Any, out: Path) -> dict[str, Any]:
    options = TrainOptions(cache=tiny.store, out=out, device="cpu", train={"budget": "2-steps"})
    return train_run(options, stop=StopFlag(), say=lambda line: None)


def first_row_read(tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The first view whose features training asks for."""
    rows: list[int] = []

    def stream(source: CachedFeatures, batches: Iterable[np.ndarray], *, ahead: int) -> NoReturn:
        rows.extend(next(iter(batches)).tolist())
        raise StoreCorrupt("enough")

    with monkeypatch.context() as patched, pytest.raises(StoreCorrupt, match="enough"):
        patched.setattr(CachedFeatures, "stream", stream)
        train(tiny, out)
    return rows[0]


def test_a_flipped_bit_is_never_trained_on_and_computed_again(
    tiny: Any, tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore.open(tiny.store)
    row = first_row_read(tiny, tmp_path / "asked", monkeypatch)
    before = contents(tiny, "dense")
    damage_view(tiny, "dense", row)
    with pytest.raises(StoreCorrupt, match=f"rsmtdf cache repair {tiny.store}"):
        train(tiny, tmp_path / "refused")
    others = {f: f.stat().st_mtime_ns for f in tiny.store.glob("teachers/*/*/c.*.0*")}

    said = command("cache", "repair", tiny.store, "--device", "cpu")
    assert said.code == 0, said.err + said.out
    assert f"view {store.describe(row)}" in said.out
    assert "withdrawn  teacher dense: 1 views" in said.out
    assert "computed   teacher dense: 1 views" in said.out
    assert "computed   teacher coarse" not in said.out
    assert same(contents(tiny, "dense"), before)
    assert {f.parent.parent.name for f, t in others.items() if f.stat().st_mtime_ns != t} == {"dense"}
    assert train(tiny, tmp_path / "run")["steps"] == 2
    assert command("cache", "verify", tiny.store).code == 0


DAMAGES: dict[str, Callable[[Any], dict[str, int]]] = {}
"""Name -> what damages a store and returns how many views each teacher must see again."""


def damages(act: Callable[[Any], dict[str, int]]) -> Callable[[Any], dict[str, int]]:
    DAMAGES[act.__name__.replace("_", " ")] = act
    return act


def views_of(tiny: Any, shard: int) -> int:
    return len(FeatureStore.open(tiny.store).rows_of_shard(shard))


@damages
def index_flipped(tiny: Any) -> dict[str, int]:
    flip(shard_of(tiny, "dense", 0), -30)
    return {"dense": views_of(tiny, 0)}


@damages
def shard_removed(tiny: Any) -> dict[str, int]:
    shard_of(tiny, "coarse", 1).unlink()
    return {"coarse": views_of(tiny, 1)}


@damages
def shard_short_by_a_byte(tiny: Any) -> dict[str, int]:
    cut(shard_of(tiny, "coarse", 1), -1)
    return {"coarse": views_of(tiny, 1)}


@damages
def shard_emptied(tiny: Any) -> dict[str, int]:
    cut(shard_of(tiny, "coarse", 1), 0)
    return {"coarse": views_of(tiny, 1)}


@damages
def garbage_appended(tiny: Any) -> dict[str, int]:
    with shard_of(tiny, "dense", 1).open("ab") as file:
        file.write(b"garbage")
    return {"dense": views_of(tiny, 1)}


@damages
def status_chunk_flipped_and_no_seal(tiny: Any) -> dict[str, int]:
    (tiny.store / "teachers/dense/status/sealed").unlink()
    flip(tiny.store / "teachers/dense/status/c.0", 3)
    return {"dense": views_of(tiny, 0)}


@damages
def status_chunk_removed_and_no_seal(tiny: Any) -> dict[str, int]:
    """No damage that anybody could tell from work to do; it is done all the same."""
    (tiny.store / "teachers/dense/status/sealed").unlink()
    (tiny.store / "teachers/dense/status/c.0").unlink()
    return {"dense": views_of(tiny, 0)}


@damages
def status_chunk_flipped(tiny: Any) -> dict[str, int]:
    flip(tiny.store / "teachers/dense/status/c.0", 3)
    return {}


@damages
def sealed_copy_flipped(tiny: Any) -> dict[str, int]:
    flip(tiny.store / "views/status/sealed", 50)
    return {}


@damages
def array_metadata_damaged(tiny: Any) -> dict[str, int]:
    for name in ("views/seed", "teachers/dense/status", "tiles", "teachers/coarse/channel_mean"):
        flip(tiny.store / name / "zarr.json", 30)
    return {}


@damages
def two_views_of_a_shard(tiny: Any) -> dict[str, int]:
    damage_view(tiny, "dense", 3)
    damage_view(tiny, "dense", 7)
    return {"dense": 2}


@damages
def a_view_of_each_teacher(tiny: Any) -> dict[str, int]:
    damage_view(tiny, "dense", 3)
    damage_view(tiny, "coarse", 4)
    return {"dense": 1, "coarse": 1}


@damages
def every_view(tiny: Any) -> dict[str, int]:
    store = FeatureStore.open(tiny.store)
    for shard in range(store.n_shards):
        for row in store.rows_of_shard(shard).tolist():
            damage_view(tiny, "dense", row)
    return {"dense": store.n_views}


@pytest.mark.parametrize("name", DAMAGES)
def test_exactly_what_is_damaged_is_computed_again(tiny: Any, command: Run, name: str) -> None:
    before = {t: contents(tiny, t) for t in ("dense", "coarse")}
    expected = DAMAGES[name](tiny)
    found = command("cache", "verify", tiny.store)
    is_silent = name == "status chunk removed and no seal"
    assert found.code == (0 if is_silent else 1), found.out
    assert "incomplete" in found.out if is_silent else f"next       rsmtdf cache repair {tiny.store}" in found.out

    would = command("cache", "repair", tiny.store, "--dry-run")
    for teacher, n in expected.items():
        assert f"would do   teacher {teacher}: compute {n:,} views" in would.out
    said = command("cache", "repair", tiny.store, "--device", "cpu", "--json")
    assert said.code == 0, said.err + said.out
    result = json.loads(said.out)
    assert (result["computed"], result["missing"]) == (expected, {})
    assert {t: same(contents(tiny, t), before[t]) for t in before} == {"dense": True, "coarse": True}
    again = json.loads(command("cache", "verify", tiny.store, "--json").out)
    assert (again["sound"], again["complete"], again["damage"]) == (True, True, [])


def test_a_sound_store_stays_as_it_is(tiny: Any, command: Run) -> None:
    files = {f: f.read_bytes() for f in tiny.store.rglob("*") if f.is_file() and f.name != "locks"}
    shutil.rmtree(tiny.folder / "data")  # neither images nor teachers are looked at
    said = command("cache", "repair", tiny.store, "--json")
    found = json.loads(said.out)
    assert (said.code, found["failed"], found["withdrawn"], found["repaired"]) == (0, False, {}, [])
    n = FeatureStore.open(tiny.store).n_views
    assert {t["checked"] for t in found["found"]["teachers"].values()} == {n}
    assert {f: f.read_bytes() for f in files} == files


def test_withdraw_only_needs_no_teacher(tiny: Any, command: Run) -> None:
    damage_view(tiny, "dense", 5)
    shutil.move(tiny.folder / "data", tiny.folder / "elsewhere")
    said = command("cache", "repair", tiny.store, "--withdraw-only")
    assert said.code == 1
    assert "withdrawn  teacher dense: 1 views" in said.out
    assert FeatureStore.open(tiny.store).pending_rows(["dense"]).tolist() == [5]
    refused = command("cache", "repair", tiny.store)
    assert refused.code == 2
    assert "--root" in refused.err
    done = command("cache", "repair", tiny.store, "--root", tiny.folder / "elsewhere", "--device", "cpu")
    assert done.code == 0, done.err
    assert "computed   teacher dense: 1 views" in done.out


def test_cache_features_finishes_a_repair(tiny: Any, command: Run) -> None:
    before = contents(tiny, "dense")
    damage_view(tiny, "dense", 5)
    assert command("cache", "repair", tiny.store, "--withdraw-only").code == 1
    result = tiny.cache()
    assert (result["views"], result["features"]) == (1, {"dense": 1})
    assert same(contents(tiny, "dense"), before)


def image_of(tiny: Any, row: int) -> Path:
    store = FeatureStore.open(tiny.store)
    scene = store.tile_ids[int(store.column("tile")[row])].rpartition("/")[0]
    (file,) = (tiny.folder / "data").rglob(f"images_png/{scene.rpartition('/')[2]}.png")
    return file


def weak_row(tiny: Any) -> int:
    """A view of one tile alone."""
    return int(FeatureStore.open(tiny.store).rows(stream="weak")[2])


@pytest.mark.parametrize("what", ["removed", "cut short"])
def test_views_of_an_image_that_is_gone_stay_missing(tiny: Any, command: Run, what: str) -> None:
    row = weak_row(tiny)
    damage_view(tiny, "dense", row)
    damage_view(tiny, "dense", 0)
    view = FeatureStore.open(tiny.store).describe(row)
    image = image_of(tiny, row)
    good = image.read_bytes()
    if image == image_of(tiny, 0):
        pytest.skip("both views are of one scene")
    image.unlink() if what == "removed" else cut(image, 2000)
    before = contents_words(tiny)
    said = command("cache", "repair", tiny.store, "--device", "cpu", "--json")
    result = json.loads(said.out)
    assert said.code == 1, said.err
    assert view in result["missing"]
    assert image.name.removesuffix(".png") in result["missing"][view]
    state = state_of(FeatureStore.open(tiny.store).status("dense"))
    assert state[row] == SKIPPED
    assert command("cache", "verify", tiny.store).code == 0

    image.write_bytes(good)
    assert command("cache", "repair", tiny.store, "--device", "cpu").code == 0
    assert np.array_equal(contents_words(tiny), before)


def contents_words(tiny: Any) -> np.ndarray:
    return FeatureStore.open(tiny.store).status("dense")


def test_views_whose_pixels_have_changed_stay_missing(tiny: Any, command: Run) -> None:
    row = weak_row(tiny)
    before = contents_words(tiny)
    damage_view(tiny, "dense", row)
    image = image_of(tiny, row)
    good = image.read_bytes()
    pixels = np.array(Image.open(image))
    Image.fromarray(255 - pixels).save(image)
    said = command("cache", "repair", tiny.store, "--device", "cpu", "--json")
    result = json.loads(said.out)
    store = FeatureStore.open(tiny.store)
    assert said.code == 1, said.err
    assert list(result["missing"]) == [store.describe(row)]
    assert "its pixels differ from those that were recorded" in result["missing"][store.describe(row)]
    assert int(crc_of(store.view_status())[row]) != 0
    assert state_of(store.view_status())[row] == DONE, "the sum of the pixels that the teachers saw is kept"
    assert tiny.cache()["views"] == 0, "an image that has changed does not stop later caching"

    image.write_bytes(good)
    assert command("cache", "repair", tiny.store, "--device", "cpu").code == 0
    assert np.array_equal(contents_words(tiny), before)


def test_what_only_a_copy_can_restore(tiny: Any, command: Run) -> None:
    for place in (tiny.store, tiny.store / "provenance" / "twins"):
        flip(place / "views" / "seed" / "c.0", 2)
    damage_view(tiny, "dense", 1)
    said = command("cache", "repair", tiny.store)
    assert said.code == 1
    assert f"NOT REPAIRED file {tiny.store / 'views/seed/c.0'}: checksum is" in said.out
    assert "nothing was computed" in said.out
    assert FeatureStore.open(tiny.store).pending_rows(["dense"]).tolist() == [1]


def test_another_teacher_is_not_written_into_the_store(tiny: Any, command: Run) -> None:
    damage_view(tiny, "dense", 1)
    other = tiny.config.with_name("other.yaml")
    other.write_text(tiny.config.read_text().replace("seed: 1", "seed: 7").replace("depth: 4", "depth: 3"))
    said = command("cache", "repair", tiny.store, "--config", other, "--device", "cpu")
    assert said.code == 2
    assert "teacher 'dense' in feature store" in said.err
    assert "weights_sha256" in said.err


def test_there_is_no_store(command: Run) -> None:
    said = command("cache", "repair", "nowhere.zarr")
    assert said.code == 2
    assert "nowhere.zarr" in said.err
