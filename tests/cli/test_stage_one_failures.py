"""Stage 1 over images that do not decode: who is to blame, what is tried again, and what a repair costs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsmtdf.cli.caching import summary_text
from rsmtdf.store.reader import CachedFeatures
from rsmtdf.store.status import DONE, SKIPPED, state_of
from rsmtdf.store.store import FeatureStore

SEEDS = 2


@pytest.fixture
def fresh(cached_tiny: Any, tmp_path: Path) -> Any:
    """The tiny world without its store."""
    tiny = type(cached_tiny)(tmp_path / "tiny")
    shutil.copytree(cached_tiny.folder, tiny.folder, ignore=shutil.ignore_patterns("feats.zarr"))
    return tiny


def break_scene(tiny: Any) -> tuple[Path, bytes]:
    """Damages the pixels of a training scene, so that its header still opens; the file and its good bytes."""
    victim = sorted((tiny.folder / "data" / "Train").rglob("images_png/*.png"))[0]
    good = victim.read_bytes()
    middle = len(good) // 2
    victim.write_bytes(good[:middle] + bytes(b ^ 0x5A for b in good[middle : middle + 400]) + good[middle + 400 :])
    return victim, good


def tiles_of(store: FeatureStore, rows: np.ndarray) -> set[str]:
    return {store.tile_ids[int(i)] for i in store.column("tile")[rows]}


def data_files(store: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in store.rglob("c.*") if "teachers" in p.parts and "status" not in p.parts}


def test_only_the_broken_tiles_are_named_and_their_partners_counted(fresh: Any) -> None:
    victim, _ = break_scene(fresh)
    result = fresh.cache()
    broken = result["unreadable_tiles"]
    assert broken
    assert all(victim.stem in tile for tile in broken), "a tile of another image is blamed"
    store = FeatureStore.open(fresh.store)
    skipped = np.flatnonzero(state_of(store.view_status()) == SKIPPED)
    tile, partner = store.column("tile"), store.column("partner")
    bad = np.array([store.tile_ids[int(i)] in broken for i in tile[skipped]])
    assert result["partners_lost"] == (~bad).sum() > 0
    assert tiles_of(store, partner[skipped[~bad]]) <= set(broken), "a view is missing for no reason"
    assert result["views"] == store.n_views - len(skipped)
    text = summary_text(result)
    assert f"{len(broken)} tiles cannot be read; {result['partners_lost']} views of other tiles lack a partner" in text


def test_only_broken_tiles_count_towards_max_failures(fresh: Any) -> None:
    break_scene(fresh)
    n = len(fresh.cache()["unreadable_tiles"])
    assert not fresh.cache(f"cache.max_failures={n}")["failed"]
    assert fresh.cache(f"cache.max_failures={n - 1}")["failed"]


def test_a_run_with_nothing_to_do_still_reports_what_is_missing_and_computes_nothing(fresh: Any) -> None:
    break_scene(fresh)
    first = fresh.cache()
    before = data_files(fresh.store)
    second = fresh.cache()
    assert second["failed"]
    assert second["unreadable_tiles"] == first["unreadable_tiles"]
    assert second["partners_lost"] == first["partners_lost"]
    assert second["views"] == second["bytes_written"] == 0
    assert data_files(fresh.store) == before
    assert "nothing to do" not in summary_text(second)


def test_after_a_repair_exactly_the_missing_views_are_computed(fresh: Any, cached_tiny: Any) -> None:
    victim, good = break_scene(fresh)
    fresh.cache()
    store = FeatureStore.open(fresh.store)
    missing = int((state_of(store.view_status()) == SKIPPED).sum())
    kept = {name: store.status(name) for name in ("dense", "coarse")}
    assert missing
    victim.write_bytes(good)
    result = fresh.cache()
    assert (result["views"], result["failed"], result["unreadable_tiles"]) == (missing, False, {})
    mended, whole = FeatureStore.open(fresh.store), FeatureStore.open(cached_tiny.store)
    assert np.array_equal(mended.view_status(), whole.view_status()), "the same pixels as if nothing had been wrong"
    rows = np.flatnonzero(state_of(whole.view_status()) == DONE)
    for name, before in kept.items():
        done = state_of(before) == DONE
        assert np.array_equal(mended.status(name)[done], before[done]), "a view that was there has changed"
        with (
            CachedFeatures(mended, [name], device="cpu", rows=rows) as a,
            CachedFeatures(whole, [name], device="cpu") as b,
        ):
            # What batch a view is in may move the last bits.
            np.testing.assert_allclose(a.fetch(rows)[name].numpy(), b.fetch(rows)[name].numpy(), rtol=1e-2, atol=1e-3)
    again = fresh.cache()
    assert (again["views"], again["failed"]) == (0, False)


def test_of_two_broken_images_the_repaired_one_comes_back(fresh: Any) -> None:
    first, good = break_scene(fresh)
    other = sorted((fresh.folder / "data" / "Train").rglob("images_png/*.png"))[1]
    bytes_ = other.read_bytes()
    middle = len(bytes_) // 2
    other.write_bytes(bytes_[:middle] + b"\0" * 400 + bytes_[middle + 400 :])
    both = fresh.cache()
    assert {first.stem, other.stem} == {
        next(s for s in (first.stem, other.stem) if s in t) for t in both["unreadable_tiles"]
    }
    first.write_bytes(good)
    result = fresh.cache()
    assert result["views"] > 0
    assert all(other.stem in tile for tile in result["unreadable_tiles"])
    store = FeatureStore.open(fresh.store)
    skipped = np.flatnonzero(state_of(store.view_status()) == SKIPPED)
    partners = store.column("partner")[skipped]
    assert all(
        other.stem in store.tile_ids[int(store.column("tile")[a])]
        or other.stem in store.tile_ids[int(store.column("tile")[b])]
        for a, b in zip(skipped, partners, strict=True)
    ), "a view that can be made is still missing"


def test_a_teacher_that_comes_later_meets_the_same_gap(fresh: Any) -> None:
    victim, good = break_scene(fresh)
    two = fresh.source().experiment.as_dict()["teachers"]
    dense = f"teachers=[{two[0]}]".replace("None", "null").replace("True", "true")
    fresh.cache(dense)
    victim.write_bytes(good)
    fresh.cache()
    info = FeatureStore.open(fresh.store).info()
    assert info["views_skipped"] == 0
    assert [info["teachers"][name]["skipped"] for name in ("dense", "coarse")] == [0, 0]
