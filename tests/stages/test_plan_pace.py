"""Time: what overlaps, what adds up, and a calibration by a clock that only the teachers move."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from rsmtdf.errors import DatasetError, TeacherError
from rsmtdf.specs import FeatureSpec, Tile, ViewRecipe
from rsmtdf.stages.plan import Cost, Pace, draw_sample, measure_pace
from rsmtdf.stages.plan.measure import _fitting
from rsmtdf.stages.plan.sample import Sample

FREE = Cost(wall=0.0, cpu=0.0)
SIZES = {"a": 100, "b": 10}


def pace(
    *,
    view: Cost = FREE,
    decode: Cost = FREE,
    a: Cost = FREE,
    b: Cost = FREE,
    encode: Cost = FREE,
    write: Cost | None = FREE,
    cores: int = 4,
    build: float = 0.0,
) -> Pace:
    return Pace(
        device="cuda",
        cores=cores,
        workers=2,
        batch=8,
        view=view,
        decode=decode,
        teachers={"a": a, "b": b},
        encode={"a": encode, "b": encode},
        write=write,
        read_bytes_per_second=None,
        build_seconds=build,
    )


def seconds(p: Pace, *, views: int = 1000, features: Mapping[str, int] | None = None, **more: object) -> float:
    given: dict[str, object] = {"statistics": {}, "decodes": 0.0, "in_flight": 1, **more}
    features = {"a": views, "b": views} if features is None else features
    return p.estimate(views=views, features=features, bytes_per_view=SIZES, **given).seconds  # type: ignore[arg-type]


def test_the_slowest_part_sets_the_time_not_the_sum() -> None:
    p = pace(view=Cost(wall=0.3, cpu=0), a=Cost(wall=0.2, cpu=0), write=Cost(wall=0.001, cpu=0))
    assert seconds(p) == pytest.approx(1000 * 0.3 + 0.2 + 0.11), "and one view's way through the rest"
    assert p.estimate(
        views=1000, features={"a": 1000}, bytes_per_view=SIZES, statistics={}, decodes=0, in_flight=1
    ).busy == pytest.approx({"views": 300, "teachers": 200, "writing": 100, "processor": 0})


def test_parts_that_share_the_processor_add_up() -> None:
    """A teacher on all four cores leaves none to the views."""
    p = pace(view=Cost(wall=0.1, cpu=0.2), a=Cost(wall=0.5, cpu=2.0))
    estimate = p.estimate(views=1000, features={"a": 1000}, bytes_per_view=SIZES, statistics={}, decodes=0, in_flight=1)
    assert estimate.limited_by == "processor"
    assert estimate.seconds == pytest.approx(1000 * (0.2 + 2.0) / 4)
    assert estimate.cpu_seconds == pytest.approx(2200)


def test_in_a_small_run_nothing_overlaps() -> None:
    p = pace(view=Cost(wall=0.3, cpu=0), a=Cost(wall=0.2, cpu=0))
    assert seconds(p, views=50, in_flight=64) == pytest.approx(50 * 0.5)
    assert seconds(p, views=640, in_flight=64) == pytest.approx(640 * 0.3 + 64 * 0.2)


def test_a_teacher_costs_only_the_views_that_it_lacks() -> None:
    p = pace(a=Cost(wall=0.2, cpu=0), b=Cost(wall=0.1, cpu=0), encode=Cost(wall=0.05, cpu=0))
    assert seconds(p, features={"a": 0, "b": 1000}) == pytest.approx(1000 * 0.15)
    assert seconds(p, views=0, features={"a": 0, "b": 0}) == 0


def test_statistics_of_new_teachers_come_before_the_first_shard() -> None:
    p = pace(view=Cost(wall=0.1, cpu=0.2), a=Cost(wall=1.0, cpu=0), build=7.0)
    assert seconds(p, statistics={"a": 256}) == pytest.approx(7 + 256 * (0.2 + 1.0) + 1000 * 1.0 + 0.1)


def test_decoding_is_paid_for_by_the_scene() -> None:
    p = pace(view=Cost(wall=0.1, cpu=0.1), decode=Cost(wall=0.5, cpu=0.5))
    assert seconds(p, decodes=10.0) == pytest.approx(1000 * 0.1 + 10 * 0.5)


# The calibration


class Watch:
    """Time that passes only when told so: no other load on the machine can change a result."""

    def __init__(self) -> None:
        self.wall = 0.0

    def __call__(self) -> tuple[float, float]:
        return self.wall, 2 * self.wall


class SlowTeacher:
    """Takes `per_view` seconds of the watch for each view, and the first time ten times that."""

    def __init__(self, watch: Watch, *, per_view: float) -> None:
        self._watch, self._per_view, self._cold = watch, per_view, True
        self.batches: list[int] = []

    @property
    def spec(self) -> FeatureSpec:
        return FeatureSpec(
            name="slow", library="fake", model="fake", weights_sha256="0", input_px=(8, 8), grid=(2, 2), dim=32
        )

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(pixels))
        self._watch.wall += self._per_view * len(pixels) * (10 if self._cold else 1)
        self._cold = False
        return torch.ones(len(pixels), 4, 32)


class Reader:
    """Grey tiles of 16 px; some cannot be read."""

    def __init__(self, broken: frozenset[str] = frozenset()) -> None:
        self._broken = broken

    def read_image(self, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        if tile.id in self._broken:
            raise DatasetError(f"{tile.image} is broken")
        return np.full((16, 16, 3), 90, np.uint8), np.ones((16, 16), bool)

    def read_label(self, tile: Tile) -> np.ndarray:
        raise NotImplementedError


def sample(n: int = 24, *, weak_share: float = 0.25, broken: frozenset[str] = frozenset(), views: int = 8) -> Sample:
    tiles = {
        f"s{i // 4}/{i % 4}_0": Tile(f"s{i // 4}/{i % 4}_0", f"s{i // 4}.png", None, 0, 0, 16, 16) for i in range(n)
    }
    return draw_sample(
        reader=Reader(broken),
        tiles=tiles,
        pool=sorted(tiles),
        labelled=sorted(tiles)[:5],
        recipe=ViewRecipe(crop_px=14),
        tile_px=16,
        weak_share=weak_share,
        views=views,
    )


def test_the_sample_has_the_streams_in_proportion_and_images_before_tiles() -> None:
    found = sample(views=8)
    assert found.views == 8
    assert sorted(map(len, found.units)) == [1, 1, 2, 2, 2], "two weak views, three pairs of strong ones"
    assert len({tile.id for tile in found.tiles}) == 8
    strong = [tile for unit in found.units if len(unit) == 2 for tile in map(found.maker.tile, unit)]
    assert len({tile.image for tile in strong}) == 6, "each of another image"
    assert [t.id for t in sample(views=8).tiles] == [t.id for t in found.tiles], "the same at every call"
    assert sample(3, views=8).views == 3, "no more than there are"


@pytest.mark.parametrize(("per_view", "batch", "shown"), [(0.125, 8, 2), (0.0625, 4, 4), (5.0, 8, 1)])
def test_a_teacher_is_timed_warm_and_in_batches_of_bearable_length(per_view: float, batch: int, shown: int) -> None:
    watch = Watch()
    slow = SlowTeacher(watch, per_view=per_view)
    found = measure_pace(
        sample(),
        teachers={"slow": slow},
        codec="int8",
        batch=batch,
        workers=1,
        folder=None,
        shard_bytes=1000,
        clock=watch,
    )
    assert found.teachers["slow"] == Cost(wall=per_view, cpu=2 * per_view)
    assert (found.batch, found.write, found.read_bytes_per_second) == (shown, None, None)
    assert slow.batches[0] == 1, "the warm-up"
    assert len(slow.batches) >= 3
    assert set(slow.batches[1:]) == {shown}


NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


@pytest.mark.parametrize("error", NO_MEMORY)
def test_a_batch_that_does_not_fit_is_halved_however_that_is_said(error: Exception) -> None:
    def trial(batch: int) -> None:
        if batch > 3:
            raise error

    assert _fitting(trial, 16) == 2


@pytest.mark.parametrize("error", NO_MEMORY)
def test_a_teacher_that_does_not_fit_at_all_is_an_error_that_says_so(error: Exception) -> None:
    class Huge(SlowTeacher):
        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            raise error

    with pytest.raises(TeacherError, match="not even one view at a time fits into the memory of cpu with slow"):
        measure_pace(
            sample(),
            teachers={"slow": Huge(Watch(), per_view=0.1)},
            codec="int8",
            batch=4,
            workers=1,
            folder=None,
            shard_bytes=1000,
        )


def test_broken_tiles_do_not_stop_a_calibration_unless_all_are() -> None:
    ids = {tile.id for tile in sample().tiles}

    def measured(broken: set[str]) -> Pace:
        return measure_pace(
            sample(broken=frozenset(broken)),
            teachers={},
            codec="int8",
            batch=4,
            workers=2,
            folder=None,
            shard_bytes=1000,
        )

    assert measured({min(ids)}).view.wall > 0
    with pytest.raises(DatasetError, match=r"none of 8 tiles.*can be read: s\d.png is broken"):
        measured(ids)


def test_the_trial_file_leaves_no_trace(tmp_path) -> None:
    found = measure_pace(sample(), teachers={}, codec="int8", batch=4, workers=2, folder=tmp_path, shard_bytes=100_000)
    assert found.write is not None
    assert found.write.wall > 0
    assert not list(tmp_path.iterdir())
    gone = measure_pace(
        sample(), teachers={}, codec="int8", batch=4, workers=2, folder=tmp_path / "none", shard_bytes=1000
    )
    assert gone.write is None, "stage 1 itself will say that the folder is not there"
