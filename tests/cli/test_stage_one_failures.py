"""Stage 1 where things are not smooth: broken images and their repair, plans for stores that hold other things."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsmtdf.cli.cache_summary import summary_text
from rsmtdf.cli.caching import run_cache
from rsmtdf.cli.planning import plan_cache
from rsmtdf.cli.workspace import data_root
from rsmtdf.errors import ConfigError, DatasetError
from rsmtdf.signals import StopFlag
from rsmtdf.stages import cache as stage
from rsmtdf.stages.plan import Plan
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.status import DONE, SKIPPED, state_of
from rsmtdf.store.store import FeatureStore


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
            # Statistics were measured while the tiles were broken, so the int8 steps of the two are not the same.
            x, y = (source.fetch(rows)[name].numpy() for source in (a, b))
            assert np.linalg.norm(x - y, axis=-1).max() < 0.03 * np.linalg.norm(y, axis=-1).min()
            assert np.linalg.norm(x - y) < 0.015 * np.linalg.norm(y)
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


# The plan against what is computed


VIT = "{patch_size: 14, embed_dim: 24, depth: 4, num_heads: 2}"
THIRD = f"teachers=[{{name: third, library: timm, model: vit_tiny_patch16_224, weights: random, overrides: {VIT}}}]"


def planned(tiny: Any, *overrides: str, labels: str | None = None) -> Plan:
    source = tiny.source(*overrides, labels=labels)
    return plan_cache(source, root=data_root(source, root=None), out=tiny.store).plan


def payload(plan: Plan) -> dict[str, int]:
    return {name: n * plan.bytes_per_view[name] for name, n in plan.new_features.items()}


def test_the_plan_of_another_label_set_counts_its_views(tiny: Any) -> None:
    pool, labelled = _lists(tiny)
    (tiny.folder / "other.txt").write_text("\n".join([t for t in pool if t not in labelled][: len(labelled)]))
    other = str(tiny.folder / "other.txt")
    plan = planned(tiny, labels=other)
    assert plan.new_views == 5 * len(labelled), "as many tiles as the store's, but others"
    assert plan.new_features == {"dense": plan.new_views, "coarse": plan.new_views}
    assert plan.views == {"strong": 40, "weak": 2 * 5 * len(labelled), "plain": 0, "strong2": 0}
    assert tiny.cache(labels=other)["views"] == plan.new_views
    assert planned(tiny, labels=other).new_views == planned(tiny).new_views == 0


def test_the_plan_of_a_third_teacher_counts_all_that_the_store_holds(tiny: Any) -> None:
    tiny.cache("cache.seeds=4")
    plan = planned(tiny, THIRD)
    held = FeatureStore.open(tiny.store).n_views
    assert plan.new_features == {"third": held}, "also of the seeds that this experiment does not ask for"
    assert plan.new_bytes == held * plan.bytes_per_view["third"]
    assert tiny.cache(THIRD)["views"] == plan.new_views == held


def test_a_plan_for_an_old_and_a_new_teacher_prices_each(tiny: Any) -> None:
    two = tiny.source().experiment.as_dict()["teachers"]
    both = f"teachers=[{two[0]}, {THIRD[len('teachers=[') : -1]}]".replace("None", "null").replace("True", "true")
    plan = planned(tiny, both)
    assert plan.new_features == {"dense": 0, "third": FeatureStore.open(tiny.store).n_views}
    assert plan.new_bytes == payload(plan)["third"]


def test_the_plan_of_an_interrupted_store_is_what_is_left(tiny: Any) -> None:
    store = FeatureStore.open(tiny.store, writable=True)
    store.withdraw(0, "coarse")
    plan = planned(tiny)
    left = len(store.rows_of_shard(0))
    assert (plan.new_views, plan.new_features) == (left, {"dense": 0, "coarse": left})
    assert tiny.cache()["views"] == left


def test_a_complete_store_costs_nothing_on_a_full_disk(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tiny.folder))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 0))
    for seeds in ("auto", "2"):
        plan = planned(tiny, f"cache.seeds={seeds}")
        assert (plan.amounts.strong_seeds, plan.new_views, plan.new_bytes, sum(plan.new_files.values())) == (2, 0, 0, 0)
        assert tiny.cache(f"cache.seeds={seeds}")["views"] == 0
    with pytest.raises(ConfigError, match=r"would need \d+ kB, but only 0 MB are free"):
        planned(tiny, "cache.seeds=3")


# What the store records


def recorded(tiny: Any) -> list[str]:
    return [t["name"] for t in FeatureStore.open(tiny.store).experiment["config"]["teachers"]]


def test_a_teacher_that_was_added_meanwhile_stays_in_the_record(tiny: Any) -> None:
    source = tiny.source("cache.seeds=2")
    job = plan_cache(source, root=data_root(source, root=None), out=tiny.store)
    tiny.cache(THIRD)
    run_cache(job, device="cpu", stop=StopFlag(), say=lambda line: None)
    assert sorted(recorded(tiny)) == ["coarse", "dense", "third"]


def test_a_teacher_that_could_not_be_added_is_not_recorded(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise DatasetError("none can be read")

    with monkeypatch.context() as patch:
        patch.setattr(stage, "add_teachers", refused)
        with pytest.raises(DatasetError):
            tiny.cache(THIRD, labels="8")
    assert recorded(tiny) == ["dense", "coarse"]
    tiny.cache()
    assert recorded(tiny) == ["dense", "coarse"]


def test_caching_again_from_another_folder_records_it(tiny: Any) -> None:
    moved = tiny.folder / "moved"
    (tiny.folder / "data").rename(moved)
    (tiny.folder / "data").mkdir()
    shutil.copytree(moved / "lists", tiny.folder / "data" / "lists")
    job = plan_cache(tiny.source(), root=moved, out=tiny.store)
    assert run_cache(job, device="cpu", stop=StopFlag(), say=lambda line: None)["views"] == 0
    assert Path(FeatureStore.open(tiny.store).data_root) == moved.resolve()


def _lists(tiny: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    source = tiny.source()
    workspace = plan_cache(source, root=data_root(source, root=None), out=tiny.store).workspace
    return workspace.pool, workspace.labelled
