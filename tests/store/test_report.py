"""What a store tells about itself: seeds in few lines, sizes that add up, sealed or not, identities."""

from __future__ import annotations

import dataclasses
import json

from rsmtdf.signals import StopFlag
from rsmtdf.store.codecs import CODECS
from rsmtdf.store.remove import remove
from rsmtdf.store.report import TYPICAL_ERROR, completeness, seed_runs
from rsmtdf.store.store import FeatureStore


def lines(store) -> list[tuple]:
    """(stream, first, last, views, done per teacher)."""
    runs = seed_runs(completeness(store), store)
    return [(r.stream, r.first, r.last, r.views, {n: tuple(p) for n, p in r.teachers.items()}) for r in runs]


def test_complete_seeds_are_one_line(kit, path):
    store = kit.full(path)
    store.extend([kit.strong(2, seed=1), kit.weak(5, start=2, seeds=1)])
    kit.fill(store)
    assert lines(store) == [
        ("strong", 0, 1, 10, {"t": (10, 0, 10)}),
        ("weak", 0, 2, 15, {"t": (15, 0, 15)}),
    ]


def test_seeds_that_are_begun_stand_alone(kit, path, withdraw):
    store = kit.create(path)
    store.extend([kit.weak(4, seeds=5)])
    kit.add_teacher(store)
    kit.add_teacher(store, "u")
    kit.write(store, 0, ["t", "u"])
    kit.write(store, 1, ["t"], skipped=[5])
    assert lines(store) == [
        ("weak", 0, 0, 4, {"t": (4, 0, 4), "u": (4, 0, 4)}),
        ("weak", 1, 1, 4, {"t": (3, 1, 4), "u": (0, 0, 4)}),
        ("weak", 2, 4, 12, {"t": (0, 0, 12), "u": (0, 0, 12)}),
    ]
    withdraw(store, 0, "u")
    kit.write(store, 2, ["t"], skipped=[8])
    kit.write(store, 3, ["t"])
    assert [line[1:3] for line in lines(store)] == [(0, 3), (4, 4)]


def test_a_half_finished_seed(kit, path):
    store = kit.create(path)
    store.extend([kit.weak(6, seeds=3)])
    kit.add_teacher(store)
    kit.write(store, 0)
    kit.write(store, 2)
    assert lines(store) == [
        ("weak", 0, 0, 6, {"t": (4, 0, 6)}),
        ("weak", 1, 1, 6, {"t": (4, 0, 6)}),
        ("weak", 2, 2, 6, {"t": (0, 0, 6)}),
    ]


def test_removed_seeds_leave_a_gap(kit, path):
    kit.full(path)
    remove(path, seed=0, stream="weak", stop=StopFlag())
    store = FeatureStore.open(path)
    assert [line[:4] for line in lines(store)] == [("strong", 0, 0, 8), ("weak", 1, 1, 5)]
    info = store.info()
    assert (info["views"], info["views_removed"], info["complete"]) == (13, 5, True)


def test_info_is_json_and_sizes_add_up(kit, path):
    store = kit.full(path, codec="int8")
    info = json.loads(json.dumps(store.info()))
    teacher = info["teachers"]["t"]
    data = {f.name: f.stat().st_size for f in path.glob("teachers/t/codes/c.*")}
    scales = {f.name: f.stat().st_size for f in path.glob("teachers/t/token_scale/c.*")}
    assert teacher["bytes_by_stream"] == {
        "weak": sum(data[f"c.{k}.0.0"] + scales[f"c.{k}.0"] for k in range(3)),
        "strong": sum(data[f"c.{k}.0.0"] + scales[f"c.{k}.0"] for k in range(3, 6)),
    }
    assert info["bytes"] == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert info["seeds"][1] == {
        "stream": "weak", "first": 0, "last": 1, "views": 10,
        "teachers": {"t": {"done": 10, "skipped": 0, "total": 10}},
    }  # fmt: skip


def test_sealed(kit, path, withdraw):
    store = kit.full(path)
    assert store.info()["sealed"] is False
    store.seal()
    assert store.info()["sealed"] is True
    withdraw(store, 0, "t")
    assert store.info()["sealed"] is False
    assert kit.create(path.with_name("empty.zarr")).info()["sealed"] is False


def test_a_teachers_identity(kit, path, tmp_path):
    """The feature, the codec and how the statistics were made; not the name, not the numbers measured."""

    def identity(name: str, rule: int = 4, codec: str = "int8", **changes) -> str:
        store = kit.create(tmp_path / f"{name}{rule}{codec}{len(changes)}.zarr")
        spec = dataclasses.replace(kit.spec(), name=name, **changes)
        store.add_teacher(spec, codec=codec, statistics=kit.statistics(), rule={"views": rule})
        return store.info()["teachers"][name]["identity"]

    same = identity("a")
    assert identity("b") == same
    assert len({same, identity("a", rule=5), identity("a", codec="fp16"), identity("a", layer=3)}) == 4


def test_every_codec_has_its_usual_error():
    assert TYPICAL_ERROR.keys() >= CODECS.keys()
