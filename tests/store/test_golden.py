"""A store that was written once, and lies in `golden` ever since, opens, is right to the bit, and grows."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rsmtdf.signals import StopFlag
from rsmtdf.specs import FeatureSpec, ViewRecipe
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.segments import NewSegment
from rsmtdf.store.status import DONE, SKIPPED, crc_of, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.verify import verify

GOLDEN = Path(__file__).with_name("golden") / "format-1"
"""Written by `golden/make.py`, which also printed what follows."""
IDENTITY = "fb57da464c400ed6f15f5b0d98d3541a813254b6695f6e67c07240e66cca4f68"
ENCODED = {
    "half": "70b38fccc54ae13a53ece1d5ad99516d09c5b0bedad91db801fff55cf148fe9c",
    "byte": "62bc0d4a31dd5e15ad6f11035dd6b93b271bf1422097f33dc9f7e058e5360312",
}
DECODED = {
    "half": "2ed6b6ac8cf71412346087eed9e06da547fe7a18ec67eb837fbf0eb226d6134f",
    "byte": "dac4464df44bbb57b4c6d54c72988a9bebd2fd1d2db45c1d4b5bb6adb6d42155",
}
FIRST = {
    "half": [-3.8515625, 2.1796875, 0.234375],
    "byte": [-3.852689027786255, 2.1835074424743652, 0.24103417992591858],
}
DONE_ROWS = [0, 1, 2, 3, 4, 8, 9, 10]
SKIPPED_ROW = 5


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "feats.zarr"))


def test_it_says_what_it_is():
    store = FeatureStore.open(GOLDEN)
    assert store.identity == IDENTITY
    assert (store.n_views, store.n_rows, store.shard_views) == (9, 12, 4)
    assert list(store.tile_ids) == ["river/0_0", "river/0_1", "Zürich/3_10"]
    assert {name: t.codec for name, t in store.teachers.items()} == {"half": "fp16", "byte": "int8"}
    assert store.recipe == ViewRecipe()
    assert (store.data_root, store.dataset.classes) == ("images", ("land", "water"))
    assert store.versions["rsmtdf"] == "0.1.0"
    np.testing.assert_array_equal(store.column("tile")[:6], [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(store.column("partner")[8:11], [8, 10, 9])
    np.testing.assert_array_equal(store.column("crop_y"), [0, 1, 2, 3, 4, 5, 0, 0, 9, 9, 9, 0])
    words = store.view_status()
    assert np.flatnonzero(state_of(words) == DONE).tolist() == DONE_ROWS
    assert np.flatnonzero(state_of(words) == SKIPPED).tolist() == [SKIPPED_ROW]
    assert crc_of(words)[DONE_ROWS].tolist() == [1000 + row for row in DONE_ROWS]


@pytest.mark.parametrize("options", [{}, {"force_zarr": True}])
@pytest.mark.parametrize("teacher", ENCODED)
def test_every_view_has_the_bytes_it_always_had(teacher, options):
    with FeatureReader(FeatureStore.open(GOLDEN), teacher, **options) as reader:
        arrays = reader.get_many(DONE_ROWS)
        decoded = reader.teacher.decode(
            {name: torch.from_numpy(values) for name, values in arrays.items()}, device=torch.device("cpu")
        )
    assert hashlib.sha256(b"".join(v.tobytes() for v in arrays.values())).hexdigest() == ENCODED[teacher]
    assert decoded[0, 0, :3].tolist() == FIRST[teacher]
    assert hashlib.sha256(decoded.numpy().astype("<f4").tobytes()).hexdigest() == DECODED[teacher]


def test_nothing_is_wrong_with_it(copy):
    assert verify(copy, stop=StopFlag()).is_sound


def test_it_grows(copy):
    store = FeatureStore.open(copy, writable=True)
    store.extend(
        [
            NewSegment(
                stream="weak",
                seed_start=2,
                seeds=1,
                generation=0,
                tile_ids=("river/0_0", "lake/1_1"),
                columns={"crop_y": np.array([7, 8], np.uint16), "hflip": np.array([1, 0], np.uint8)},
                partner=np.arange(2),
            )
        ]
    )
    assert store.missing_shards(["half", "byte"]) == [3]
    new = torch.linspace(-2, 2, 2 * 48).reshape(2, 6, 8)
    rows = store.rows_of_shard(3).tolist()
    features = {"half": new, "byte": new}
    store.write_shard(3, view_crcs=dict.fromkeys(rows, 1), skipped={}, features=features, provenance={})
    store.seal()

    grown = FeatureStore.open(copy)
    assert grown.identity == IDENTITY
    np.testing.assert_array_equal(grown.column("hflip"), [0] * 12 + [1, 0, 0, 0])
    assert list(grown.tile_ids)[-1] == "lake/1_1"
    with CachedFeatures(grown, ["half", "byte"], device="cpu") as source:
        found = source.fetch(np.array(rows))
        assert torch.equal(found["half"], new.half().float())
        assert float((found["byte"] - new).abs().max()) < 0.03
        old = source.fetch(np.array(DONE_ROWS))
    for teacher, values in old.items():
        assert hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest() == DECODED[teacher]


def test_its_skipped_view_can_be_made_after_all(copy):
    store = FeatureStore.open(copy, writable=True)
    assert store.missing_shards(["half"], retry_skipped=True) == [1]
    with FeatureReader(store, "half") as reader:
        kept = torch.from_numpy(reader.get_many([4])["features"]).float()
    features = torch.cat([kept, torch.ones(1, 6, 8)])
    store.write_shard(1, view_crcs={4: 1004, 5: 1005}, skipped={}, features={"half": features}, provenance={})
    with FeatureReader(store, "half") as reader:
        assert (reader.get_many([5])["features"] == 1).all()


def test_a_teacher_can_join_it(copy):
    store = FeatureStore.open(copy, writable=True)
    spec = FeatureSpec(
        name="more", library="none", model="m", weights_sha256="1", input_px=(28, 42), grid=(2, 3), dim=8
    )
    store.add_teacher(spec, codec="int8", statistics=_Moments(), rule={"views": 4})
    assert FeatureStore.open(copy).missing_shards(["more"]) == [0, 1, 2]


class _Moments:
    mean = np.zeros(8, np.float32)
    std = np.ones(8, np.float32)

    def summary(self) -> dict[str, object]:
        return {"views": 4}
