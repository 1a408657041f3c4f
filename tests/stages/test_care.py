"""The live check tells a store's own teacher from any other, and repairs show teachers exactly what is missing."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from rsmtdf.errors import DatasetError, StoreMismatch
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.specs import DatasetSpec, FeatureSpec, Tile, ViewRecipe
from rsmtdf.stages import cache
from rsmtdf.stages.care import LiveCheck, live_check
from rsmtdf.store.repair import repair
from rsmtdf.store.segments import NewSegment
from rsmtdf.store.status import DONE, SKIPPED, TODO, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.verify import verify
from rsmtdf.views.maker import ViewMaker
from rsmtdf.views.params import PARAM_DTYPE, draw_table

TILES = tuple(f"scene/{k}_0" for k in range(5))
SPEC = DatasetSpec(name="toy", classes=("a", "b"), palette=((0, 0, 0), (255, 255, 255)), tile_px=32)
RECIPE = ViewRecipe(crop_px=28)


class Images:
    """Reads tiles whose pixels are a function of their id; those in `gone` cannot be read."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self.changed: set[str] = set()

    def read_image(self, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        if tile.id in self.gone:
            raise DatasetError(f"tile {tile.id}: the file is gone")
        k = TILES.index(tile.id) + (100 if tile.id in self.changed else 0)
        pixels = np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        return pixels, np.ones((32, 32), np.bool_)

    def read_label(self, tile: Tile) -> np.ndarray:
        raise DatasetError(f"tile {tile.id} has no label")


class Means:
    """A teacher: the mean colour of each quarter, spread over channels. It counts the views it is shown."""

    def __init__(self, name: str = "t", *, seed: int = 0) -> None:
        self.spec = FeatureSpec(
            name=name, library="fake", model="means", weights_sha256="00", input_px=(28, 28), grid=(2, 2), dim=16
        )
        self.seen = 0
        self._weights = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 16)).astype(np.float32))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        x = pixels.float().reshape(-1, 2, 14, 2, 14, 3).mean(dim=(2, 4)).reshape(-1, 4, 3)
        return (x / 255 - 0.5) @ self._weights


@pytest.fixture
def images() -> Images:
    return Images()


@pytest.fixture
def store(tmp_path: Path, images: Images) -> FeatureStore:
    return build(tmp_path, images)


def build(tmp_path: Path, images: Images, *, flipped: bool = False) -> FeatureStore:
    """30 views in 8 shards of 4: weak, 5 tiles x 6 seeds; two teachers, all done.

    `flipped` stores the mirror image of what would be drawn, as another version of the recipe might have.
    """
    store = FeatureStore.create(
        tmp_path / "feats.zarr", recipe=RECIPE, dataset=SPEC, data_root=str(tmp_path), experiment={}, shard_views=4
    )
    table = np.concatenate(
        [draw_table(RECIPE, tile_ids=TILES, tile_px=32, stream="weak", seed=seed) for seed in range(6)]
    )
    table["hflip"] ^= flipped
    columns = {name: table[name] for name in PARAM_DTYPE.names or ()}
    new = NewSegment(
        stream="weak",
        seed_start=0,
        seeds=6,
        generation=0,
        tile_ids=TILES,
        columns=columns,
        partner=np.arange(30),
    )
    store.extend([new])
    teachers = {name: Means(name) for name in ("t", "u")}
    maker = make(store, images)
    cache.add_teachers(store, teachers=teachers, maker=maker, codec="fp16", batch=8, stop=StopFlag())
    fill(store, images, teachers)
    return store


def make(store: FeatureStore, images: Images) -> ViewMaker:
    tiles = {t: Tile(id=t, image=f"{t}.png", mask=None, x0=0, y0=0, width=32, height=32) for t in TILES}
    return cache.view_maker(store, reader=images, tiles=tiles)


def fill(
    store: FeatureStore,
    images: Images,
    teachers: dict[str, Means],
    *,
    stop: StopFlag | None = None,
    keep_going: bool = False,
) -> cache.CacheReport:
    return cache.fill_store(
        store,
        teachers=teachers,
        maker=make(store, images),
        batch=8,
        workers=2,
        stop=StopFlag() if stop is None else stop,
        keep_going=keep_going,
    )


def shard_file(store: FeatureStore, shard: int, teacher: str = "t") -> Path:
    return store.path / "teachers" / teacher / "features" / f"c.{shard}.0.0"


def damage(store: FeatureStore, *rows: int, teacher: str = "t") -> None:
    for row in rows:
        shard, slot = divmod(row, 4)
        file = shard_file(store, shard, teacher)
        data = bytearray(file.read_bytes())
        data[slot * (store.teacher(teacher).bytes_per_view + 4) + 5] ^= 4
        file.write_bytes(data)


def mended(store: FeatureStore) -> FeatureStore:
    repair(store.path, stop=StopFlag())
    return FeatureStore.open(store.path, writable=True)


def live(store: FeatureStore, images: Images, teachers: dict[str, Means], views: int = 12) -> dict[str, LiveCheck]:
    maker = make(store, images)
    return live_check(store, teachers=teachers, maker=maker, views=views, batch=5, stop=StopFlag())


def test_the_same_teacher(store: FeatureStore, images: Images) -> None:
    teachers = {name: Means(name) for name in ("t", "u")}
    checks = live(store, images, teachers)
    assert [t.seen for t in teachers.values()] == [12, 12]
    for check in checks.values():
        assert check.compared == 12
        assert min(check.cosine) > 0.9999
        assert max(check.relative_error) < 1e-3
        assert check.max_abs_difference < 1e-3
        assert check.is_sound
        assert (check.other_pixels, check.unreadable, check.other_draws) == ([], {}, {})


def test_another_teacher_under_the_same_name(store: FeatureStore, images: Images) -> None:
    (check,) = live(store, images, {"t": Means("t", seed=5)}).values()
    assert not check.is_same_teacher
    assert not check.is_sound
    assert check.as_dict()["cosine_min"] < check.min_cosine


def test_a_teacher_of_another_identity_is_refused(store: FeatureStore, images: Images) -> None:
    other = Means("t")
    other.spec = dataclasses.replace(other.spec, model="medians")
    with pytest.raises(StoreMismatch, match="model"):
        live(store, images, {"t": other})


def test_the_sample_is_keyed_and_no_larger_than_the_store(store: FeatureStore, images: Images) -> None:
    assert live(store, images, {"t": Means()}, views=1000)["t"].compared == 30
    once, twice = (live(store, images, {"t": Means()}, views=3)["t"].cosine for _ in range(2))
    assert once == twice


def test_pixels_and_images_are_told_apart(store: FeatureStore, images: Images) -> None:
    images.changed, images.gone = {TILES[0]}, {TILES[1]}
    check = live(store, images, {"t": Means()}, views=30)["t"]
    assert (len(check.other_pixels), len(check.unreadable), check.compared) == (6, 6, 18)
    assert check.is_same_teacher
    assert not check.is_sound


def test_parameters_that_would_not_be_drawn_today_are_a_warning(tmp_path: Path, images: Images) -> None:
    """What is stored counts: the views are made from it, and the features are theirs."""
    store = build(tmp_path, images, flipped=True)
    check = live(store, images, {"t": Means()}, views=4)["t"]
    assert list(check.other_draws.values()) == [["hflip"]] * 4
    assert check.is_sound


def test_a_repair_shows_a_teacher_only_the_damaged_views(store: FeatureStore, images: Images) -> None:
    words = {t: store.status(t) for t in ("t", "u")}
    bytes_u = [shard_file(store, k, "u").read_bytes() for k in range(8)]
    damage(store, 2, 9, 10)
    store = mended(store)
    teachers = {name: Means(name) for name in ("t", "u")}
    report = fill(store, images, teachers)
    assert (teachers["t"].seen, teachers["u"].seen) == (3, 0)
    assert report.features == {"t": 3}
    assert all(np.array_equal(store.status(t), words[t]) for t in words)
    assert [shard_file(store, k, "u").read_bytes() for k in range(8)] == bytes_u
    assert verify(store.path, stop=StopFlag()).is_complete


def test_sound_views_keep_their_bytes_under_a_teacher_that_differs_in_the_last_bit(
    store: FeatureStore, images: Images
) -> None:
    """Another device would give a mended view other bits; its neighbours keep theirs."""
    words = store.status("t")
    damage(store, 6)
    store = mended(store)
    teacher = Means()
    teacher._weights = teacher._weights * (1 + 1e-3)
    fill(store, images, {"t": teacher})
    after = store.status("t")
    assert np.flatnonzero(after != words).tolist() == [6]
    assert verify(store.path, stop=StopFlag()).is_sound


def test_a_repair_that_is_cut_short_goes_on(store: FeatureStore, images: Images) -> None:
    damage(store, 2, 9, 14, 21)
    store = mended(store)
    stop = StopFlag()

    class Slow(Means):
        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            stop.signum = 15  # a signal while it is at work
            return super().__call__(pixels)

    with pytest.raises(Interrupted):
        fill(store, images, {"t": Slow()}, stop=stop)
    left = store.pending_rows(["t"]).tolist()
    assert 0 < len(left) < 4
    assert verify(store.path, stop=StopFlag()).is_sound
    again = Means()
    fill(store, images, {"t": again})
    assert again.seen == len(left)
    assert verify(store.path, stop=StopFlag()).is_complete


def test_a_kill_while_a_shard_is_mended_costs_no_sound_view(
    store: FeatureStore, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data file is replaced, its status is not: what was done stays done, and is what it was."""
    words = store.status("t")
    damage(store, 6)
    store = mended(store)

    class Killed(BaseException):
        pass

    replace = os.replace

    def killed(source, target):
        if str(target).endswith("teachers/t/status/c.1"):
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        fill(store, images, {"t": Means()})
    monkeypatch.undo()
    store = FeatureStore.open(store.path, writable=True)
    assert store.pending_rows(["t"]).tolist() == [6]
    assert verify(store.path, stop=StopFlag()).is_sound
    again = Means()
    fill(store, images, {"t": again})
    assert again.seen == 1
    assert np.array_equal(store.status("t"), words)


def test_a_withdrawn_view_without_its_image_becomes_skipped(store: FeatureStore, images: Images) -> None:
    damage(store, 0, 1)  # tiles 0 and 1
    store = mended(store)
    assert state_of(store.status("t"))[:2].tolist() == [TODO, TODO]
    images.gone = {TILES[0]}
    report = fill(store, images, {"t": Means()}, keep_going=True)
    assert list(report.unreadable) == [TILES[0]]
    assert state_of(store.status("t"))[:3].tolist() == [SKIPPED, DONE, DONE]
    images.gone = set()
    fill(store, images, {"t": Means()})
    assert state_of(store.status("t"))[0] == DONE


def test_changed_pixels_stop_the_caching_but_not_a_repair(store: FeatureStore, images: Images) -> None:
    damage(store, 0, 1)
    store = mended(store)
    images.changed = {TILES[0]}
    with pytest.raises(StoreMismatch, match="other pixels"):
        fill(store, images, {"t": Means()})
    report = fill(store, images, {"t": Means()}, keep_going=True)
    assert list(report.changed) == [0]
    assert state_of(store.status("t"))[:3].tolist() == [SKIPPED, DONE, DONE]
    assert report.partners_lost == 0
