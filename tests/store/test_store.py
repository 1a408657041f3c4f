from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pytest
import torch

from rsmtdf.errors import StoreError, StoreIncomplete, StoreMismatch, StoreNotFound
from rsmtdf.specs import STREAMS
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.locks import StoreLocks
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.status import DONE, HOLE, SKIPPED, TODO, crc_of, state_of
from rsmtdf.store.store import FeatureStore


def check_features(kit, store, teacher="t") -> None:
    """Every view reads back bit for bit."""
    spec = store.teacher(teacher).spec
    rows = kit.rows(store)
    with CachedFeatures(store, [teacher], device="cpu", rows=rows) as source:
        found = source.fetch(rows)[teacher]
    expected = torch.stack([kit.feature(teacher, r, (spec.tokens, spec.dim)) for r in rows.tolist()])
    assert torch.equal(found, expected)


def test_what_goes_in_comes_out(kit, path):
    kit.full(path)
    store = FeatureStore.open(path)
    assert store.recipe == kit.recipe
    assert store.dataset == kit.dataset
    assert store.data_root == "images"
    assert store.experiment == {"n": 1}
    assert store.versions["zarr"]
    assert (store.n_views, store.n_rows, store.shard_views, store.n_shards) == (18, 24, 4, 6)
    assert [s.stream for s in store.segments] == ["weak", "strong", "strong"]
    assert list(store.tile_ids) == [f"scène/{k}_0" for k in (0, 1, 2, 3, 4, 7, 6, 5)]
    assert store.tile_ids.indices["scène/7_0"] == 5
    assert store.tile_ids[:2] == ["scène/0_0", "scène/1_0"]
    assert store.teachers["t"].spec == kit.spec()
    np.testing.assert_array_equal(store.teachers["t"].mean, kit.statistics().mean)
    np.testing.assert_array_equal(store.teachers["t"].std, kit.statistics().std)
    np.testing.assert_array_equal(store.column("scale")[:10], np.linspace(0.5, 2, 10))
    assert store.column("flip").dtype == bool
    strong = store.segments[1]
    assert (store.column("stream")[strong.row_start : strong.row_stop] == STREAMS.index("strong")).all()
    np.testing.assert_array_equal(store.column("partner")[strong.row_start : strong.row_stop], [13, 12, 15, 14, 16])
    np.testing.assert_array_equal(store.rows(stream="strong"), [12, 13, 14, 15, 16, 20, 21, 22])
    np.testing.assert_array_equal(store.rows(stream="strong", generation=1), [20, 21, 22])
    np.testing.assert_array_equal(store.rows(stream="weak", seed=1), [5, 6, 7, 8, 9])
    assert len(store.rows(stream="strong2")) == 0
    check_features(kit, store)


@pytest.mark.parametrize("views", [1, 3, 4, 5, 9])
def test_any_number_of_views(kit, path, views):
    store = kit.create(path)
    store.extend([kit.weak(views, seeds=1)])
    kit.add_teacher(store)
    assert store.n_rows == -(-views // 4) * 4
    assert kit.fill(store) == list(range(store.n_shards))
    check_features(kit, FeatureStore.open(path))
    state = state_of(store.status("t"))
    assert (state[:views] == DONE).all()
    assert (state[views:] == HOLE).all()


def test_status_words(kit, path):
    store = kit.full(path)
    words = store.view_status()
    rows = kit.rows(store)
    assert (state_of(words)[rows] == DONE).all()
    assert crc_of(words)[rows].tolist() == [kit.crc(r) for r in rows.tolist()]
    assert (np.delete(state_of(words), rows) == HOLE).all()
    assert (words >> np.uint64(40) == 0).all()


def test_two_arrays_are_summed_together(kit, path):
    import google_crc32c

    store = kit.full(path, codec="int8")
    with FeatureReader(store, "t") as reader:
        stored = reader.get_many([7])
    with CachedFeatures(store, ["t"], device="cpu") as source:
        decoded = source.fetch(np.array([7]))["t"]
    raw = stored["codes"].tobytes() + stored["token_scale"].tobytes()
    assert int(crc_of(store.status("t"))[7]) == google_crc32c.value(raw)
    assert torch.equal(decoded, store.teachers["t"].roundtrip(kit.feature("t", 7)[None]))


class TestCreateAndOpen:
    def test_no_store_here(self, tmp_path):
        with pytest.raises(StoreNotFound, match=r"no feature store at .*nothing.*cache-features"):
            FeatureStore.open(tmp_path / "none")
        with pytest.raises(StoreNotFound, match="a folder without"):
            FeatureStore.open(tmp_path)
        (tmp_path / "file").touch()
        with pytest.raises(StoreNotFound, match="a file"):
            FeatureStore.open(tmp_path / "file")
        (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
        with pytest.raises(StoreNotFound, match="no feature store of rsmtdf"):
            FeatureStore.open(tmp_path)

    def test_never_over_something_else(self, kit, tmp_path):
        (tmp_path / "x").mkdir()
        kit.create(tmp_path / "x")
        with pytest.raises(StoreError, match="something is there already"):
            kit.create(tmp_path / "x")
        (tmp_path / "f").touch()
        with pytest.raises(StoreError, match="something is there already"):
            kit.create(tmp_path / "f")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "x"]

    def test_bad_settings_leave_nothing(self, kit, tmp_path):
        for experiment in ({"x": object()}, {"x": float("nan")}):
            with pytest.raises(StoreError, match="no JSON"):
                kit.create(tmp_path / "s", experiment=experiment)
        with pytest.raises(StoreError, match="at least 1 view"):
            FeatureStore.create(
                tmp_path / "s", recipe=kit.recipe, dataset=kit.dataset, data_root="", experiment={}, shard_views=0
            )
        assert not list(tmp_path.iterdir())

    def test_a_newer_format_says_so(self, kit, path):
        from rsmtdf.specs import digest

        kit.create(path)
        root = json.loads((path / "zarr.json").read_text())
        body = root["attributes"]["rsmtdf"]
        body["format"] = 2
        del body["digest"]
        body["digest"] = digest(body)
        (path / "zarr.json").write_text(json.dumps(root))
        with pytest.raises(StoreError, match="has format 2, this rsmtdf reads format 1; it was written by rsmtdf 0"):
            FeatureStore.open(path)

    def test_a_store_open_for_reading_stays_as_it_is(self, kit, path):
        kit.full(path)
        store = FeatureStore.open(path)
        for change in (
            lambda: store.extend([kit.weak(start=9)]),
            lambda: kit.add_teacher(store, "u"),
            lambda: kit.write(store, 0),
            lambda: store.seal(),
            lambda: store.clean_partials(),
            lambda: store.amend(data_root="x"),
        ):
            with pytest.raises(StoreError, match="open for reading"):
                change()

    def test_it_may_move(self, kit, path, tmp_path):
        kit.full(path)
        path.rename(tmp_path / "elsewhere")
        check_features(kit, FeatureStore.open(tmp_path / "elsewhere"))

    def test_100_000_views_open_within_a_second(self, kit, path):
        store = FeatureStore.create(path, recipe=kit.recipe, dataset=kit.dataset, data_root="", experiment={})
        store.extend([kit.weak(100, seeds=1000)])
        kit.add_teacher(store)
        kit.write(store, 17)
        start = time.perf_counter()
        store = FeatureStore.open(path, writable=True)
        missing = store.missing_shards(["t"])
        tiles = store.column("tile")
        assert time.perf_counter() - start < 1
        assert len(missing) == store.n_shards - 1 == 1562
        assert tiles[99_999] == 99


class TestIdentity:
    def test_what_is_in_it(self, kit, tmp_path):
        base = kit.create(tmp_path / "a").identity
        same = dataclasses.replace(kit.dataset, classes=("x",), palette=((1, 2, 3),), masks="elsewhere", name="other")
        assert kit.create(tmp_path / "b", dataset=same, data_root="/elsewhere", experiment={}).identity == base
        bands = dataclasses.replace(kit.dataset, bands=(4, 1, 2))
        assert kit.create(tmp_path / "c", dataset=bands).identity != base
        recipe = dataclasses.replace(kit.recipe, hue=0.3)
        assert kit.create(tmp_path / "d", recipe=recipe).identity != base

    def test_each_difference_is_listed(self, kit, path):
        store = kit.create(path)
        store.expect(recipe=kit.recipe, dataset=kit.dataset)
        with pytest.raises(StoreMismatch) as caught:
            store.expect(
                recipe=dataclasses.replace(kit.recipe, hue=0.5, crop_px=266),
                dataset=dataclasses.replace(kit.dataset, bands=(4, 1, 2), classes=("c",)),
            )
        lines = str(caught.value).splitlines()
        assert [x.strip() for x in lines[1:-1]] == [
            "pixels.bands: expected (4, 1, 2), found None",
            "recipe.crop_px: expected 266, found 518",
            "recipe.hue: expected 0.5, found 0.25",
        ]

    def test_teachers_differences_are_listed(self, kit, path):
        store = kit.full(path)
        store.expect_teacher(kit.spec(), "fp16", rule={"views": 4})
        with pytest.raises(StoreMismatch) as caught:
            store.expect_teacher(kit.spec(layer=3, weights_sha256="11"), "int8", rule={"views": 8})
        text = str(caught.value)
        assert "layer: expected 3, found -1" in text
        assert "weights_sha256: expected '11', found '00'" in text
        assert "codec: expected 'int8', found 'fp16'" in text
        assert "statistics rule.views: expected 8, found 4" in text
        with pytest.raises(StoreIncomplete, match="no teacher 'u'; it has: t"):
            store.expect_teacher(kit.spec("u"), "fp16")

    def test_masks_and_places_may_change(self, kit, path):
        store = kit.full(path)
        before = store.identity
        store.amend(dataset=dataclasses.replace(kit.dataset, classes=("c", "d")), data_root="/new", experiment={"n": 2})
        again = FeatureStore.open(path)
        assert (again.dataset.classes, again.data_root, again.experiment) == (("c", "d"), "/new", {"n": 2})
        assert again.identity == before
        with pytest.raises(StoreMismatch, match="tile_px"):
            store.amend(dataset=dataclasses.replace(kit.dataset, tile_px=256))


class TestGrowth:
    def test_only_what_is_missing_is_written(self, kit, path):
        store = kit.full(path)
        files = {p: p.stat().st_mtime_ns for p in (path / "teachers" / "t").rglob("c.*")}
        assert store.missing_shards(["t"]) == []

        added = store.extend([kit.weak(2, seeds=2, first_tile=30, generation=1), kit.strong(8, seed=1)])
        assert [s.row_start for s in added] == [24, 28]
        assert len(store.tile_ids) == 10
        assert kit.fill(store) == [6, 7, 8]
        assert all(p.stat().st_mtime_ns == t for p, t in files.items() if p.parent.name.startswith("feat"))

        kit.add_teacher(store, "clip", dim=4, grid=(1, 2))
        assert store.missing_shards(["t"]) == []
        assert kit.fill(store, ["clip"]) == list(range(9))
        store = FeatureStore.open(path)
        assert store.missing_shards(["t", "clip"]) == []
        check_features(kit, store)
        check_features(kit, store, "clip")

    def test_two_teachers_at_once(self, kit, path):
        store = kit.create(path)
        kit.add_teacher(store)
        kit.add_teacher(store, "u", dim=4)
        store.extend([kit.weak()])
        kit.write(store, 1, ["t"])
        assert store.missing_shards(["t"]) == [0, 2]
        assert store.missing_shards(["u", "t"]) == [0, 1, 2]
        assert store.pending_rows(["t"]).tolist() == [0, 1, 2, 3, 8, 9]
        assert store.pending_views(["t"]) == 6
        kit.fill(store, ["t", "u"])
        check_features(kit, store)
        check_features(kit, store, "u")
        assert store.usable(["t", "u"]).sum() == 10

    def test_a_new_column_is_filled_for_old_rows(self, kit, path):
        store = kit.create(path)
        store.extend([kit.weak()])
        store.extend([kit.strong()])
        blur = FeatureStore.open(path).column("blur")
        assert np.isnan(blur[:12]).all()
        assert (blur[12:17] == 0.25).all()
        assert np.isnan(blur[17:]).all()
        assert not FeatureStore.open(path).column("flip")[12:].any()

    def test_another_process_sees_it_after_refresh(self, kit, path):
        store = kit.full(path)
        other = FeatureStore.open(path, writable=True)
        store.extend([kit.strong(seed=1)])
        assert other.n_rows == 24
        assert len(other.column("tile")) == 24
        with pytest.raises(StoreError, match="already has the strong view"):
            other.extend([kit.strong(seed=1)])
        assert other.n_rows == store.n_rows

    def test_growth_between_reading_and_locking_is_not_undone(self, kit, path, monkeypatch):
        """Opening to write settles lengths: those of now, not those of a moment before it had the lock."""
        writer = kit.full(path)
        mutex = StoreLocks.mutex

        def grown_meanwhile(locks, *, timeout_s):
            monkeypatch.setattr(StoreLocks, "mutex", mutex)
            writer.extend([kit.strong(seed=1)])
            return mutex(locks, timeout_s=timeout_s)

        monkeypatch.setattr(StoreLocks, "mutex", grown_meanwhile)
        opened = FeatureStore.open(path, writable=True)
        nodes = ("views/tile", "views/status", "teachers/t/features", "teachers/t/status")
        lengths = [json.loads((path / node / "zarr.json").read_bytes())["shape"][0] for node in nodes]
        assert writer.n_rows == 32
        assert lengths == [32] * 4
        assert opened.n_rows == 32

    def test_never_while_somebody_writes(self, kit, path):
        store = kit.full(path)
        with FeatureStore.open(path, writable=True).claim([2]):
            with pytest.raises(StoreError, match=r"cannot extend .* while process"):
                store.extend([kit.strong(seed=1)])
            kit.add_teacher(store, "u")  # touches no shard that is being written
        assert store.extend([]) == ()

    def test_a_teacher_is_added_once(self, kit, path):
        store = kit.create(path)
        kit.add_teacher(store)
        with pytest.raises(StoreError, match="already has a teacher 't'"):
            kit.add_teacher(store)
        with pytest.raises(StoreError, match="cannot be a folder"):
            kit.add_teacher(store, "../t")
        with pytest.raises(StoreError, match="no codec 'zip'"):
            kit.add_teacher(store, "u", codec="zip")
        with pytest.raises(StoreError, match=r"channel_mean .* \(4,\); expected finite float32 \(8,\)"):
            store.add_teacher(kit.spec("u"), codec="fp16", statistics=kit.statistics(4))
        assert list(FeatureStore.open(path).teachers) == ["t"]

    def test_a_siblings_statistics(self, kit, path, tmp_path):
        store = kit.full(path)
        sibling = kit.create(tmp_path / "sibling")
        sibling.add_teacher(kit.spec(), codec="int8", statistics=store.teachers["t"], rule={"views": 4})
        np.testing.assert_array_equal(sibling.teachers["t"].mean, store.teachers["t"].mean)
        assert sibling.teachers["t"].statistics == store.teachers["t"].statistics


class TestWriting:
    def test_skipped_views_count_as_finished(self, kit, path):
        store = kit.create(path)
        store.extend([kit.weak()])
        kit.add_teacher(store)
        kit.write(store, 0, skipped=(1, 2))
        kit.write(store, 1)
        kit.write(store, 2, skipped=(8, 9))
        assert store.missing_shards(["t"]) == []
        assert store.missing_shards(["t"], retry_skipped=True) == [0, 2]
        assert state_of(store.status("t"))[:4].tolist() == [DONE, SKIPPED, SKIPPED, DONE]
        assert state_of(store.view_status())[8:].tolist() == [SKIPPED, SKIPPED, HOLE, HOLE]
        note = json.loads((path / "provenance" / "t" / "0.json").read_text())
        assert note["skipped"] == {"1": "truncated file", "2": "truncated file"}
        assert note["device"] == "cpu"
        assert store.usable(["t"]).sum() == 6
        kit.write(store, 0)
        assert store.usable(["t"]).sum() == 8

    def test_other_pixels_are_refused(self, kit, path):
        store = kit.full(path)
        kit.add_teacher(store, "u")
        crcs = {r: kit.crc(r) for r in range(4)} | {2: 5}
        with pytest.raises(StoreMismatch, match=r"view 2 \(tile scène/2_0, weak, seed 0\) .* found 00000005"):
            kit.write(store, 0, ["u"], view_crcs=crcs)
        assert state_of(store.status("u"))[0] == TODO
        assert not (path / "teachers" / "u" / "features" / "c.0.0.0").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"view_crcs": {0: 1, 1: 1, 2: 1}}, r"lacking: \[3\]"),
            ({"view_crcs": dict.fromkeys(range(5), 1)}, r"unknown or doubled: \[4\]"),
            ({"view_crcs": dict.fromkeys(range(4), 1), "skipped": {0: "x"}}, "unknown or doubled: 1"),
            ({"features": {"t": torch.zeros(4, 6, 7)}}, r"shape \(4, 6, 7\), expected \[views, 6 tokens, 8"),
            ({"features": {"t": torch.zeros(3, 6, 8)}}, r"float16 \(3, 6, 8\), expected float16 \(4, 6, 8\)"),
            ({"features": {"t": {"codes": np.zeros(4)}}}, "lack the array 'features'"),
            ({"features": {"u": torch.zeros(4, 6, 8)}}, "no teacher 'u'"),
            ({"features": {"t": torch.full((4, 6, 8), float("nan"))}}, "teacher 't', view 0: feature nan at token 0"),
        ],
    )
    def test_what_does_not_fit_writes_nothing(self, kit, path, change, message):
        store = kit.create(path)
        store.extend([kit.weak()])
        kit.add_teacher(store)
        with pytest.raises(StoreError, match=message):
            kit.write(store, 0, **change)
        assert store.missing_shards(["t"]) == [0, 1, 2]
        assert not list(path.rglob("*.partial"))
        assert not list((path / "teachers" / "t" / "features").glob("c.*"))

    def test_no_such_shard(self, kit, path):
        store = kit.full(path)
        for shard in (-1, 6):
            with pytest.raises(StoreError, match=r"shards 0\.\.5"):
                kit.write(store, shard)

    def test_encoded_elsewhere_and_numpy(self, kit, path):
        store = kit.create(path)
        store.extend([kit.weak()])
        kit.add_teacher(store)
        tokens = torch.stack([kit.feature("t", r) for r in range(4)])
        written = kit.write(store, 0, features={"t": store.teachers["t"].encode(tokens)})
        assert written == (path / "teachers" / "t" / "features" / "c.0.0.0").stat().st_size
        kit.write(store, 1, features={"t": torch.stack([kit.feature("t", r) for r in range(4, 8)]).numpy()})
        kit.write(store, 2)
        check_features(kit, store)

    def test_two_writers_of_a_shard(self, kit, path):
        store = kit.create(path)
        store.extend([kit.weak()])
        kit.add_teacher(store)
        other = FeatureStore.open(path, writable=True)
        with store.claim(range(2)):
            kit.write(store, 0)
            with pytest.raises(StoreError, match=r"shard 1 of .* already claimed by process"):
                kit.write(other, 1)
            kit.write(other, 2)
        kit.write(other, 1)
        check_features(kit, store)

    def test_partials_of_the_dead_go_those_of_the_living_stay(self, kit, path):
        store = kit.full(path)
        features = path / "teachers" / "t" / "features"
        litter = [
            features / "c.1.0.0.abc.partial",
            path / "views" / "status" / "c.1.abc.partial",
            path / "views" / "tile" / "c.0.abc.partial",
            path / "provenance" / "t" / "1.json.abc.partial",
            path / "zarr.json.abc.partial",
        ]
        alive = features / "c.2.0.0.abc.partial"
        for file in (*litter, alive):
            file.touch()
        with FeatureStore.open(path, writable=True).claim([2]):
            assert store.clean_partials() == len(litter)
        assert list(path.rglob("*.partial")) == [alive]


class TestSeal:
    def test_sealed_words_are_the_same(self, kit, path):
        store = kit.full(path)
        store.extend([kit.strong(seed=1)])
        kit.write(store, 6)
        words = store.status("t"), store.view_status()
        store.seal()
        again = FeatureStore.open(path)
        np.testing.assert_array_equal(again.status("t"), words[0])
        np.testing.assert_array_equal(again.view_status(), words[1])
        for file in (path / "teachers" / "t" / "status").glob("c.[0-5]"):
            file.unlink()  # only the sealed file holds these words now
        assert again.missing_shards(["t"]) == [7]
        kit.write(store, 7)
        assert FeatureStore.open(path).missing_shards(["t"]) == []

    def test_a_rewritten_shard_breaks_the_seal(self, kit, path):
        store = kit.full(path)
        store.seal()
        kit.write(store, 0, skipped=(3,))
        assert state_of(FeatureStore.open(path).status("t"))[:4].tolist() == [DONE, DONE, DONE, SKIPPED]

    def test_a_shard_being_written_is_not_sealed(self, kit, path):
        store = kit.full(path)
        with FeatureStore.open(path, writable=True).claim([3]):
            store.seal()
        assert store.teachers["t"].status.is_sealed(0)
        assert not store.teachers["t"].status.is_sealed(3)


class TestReport:
    def test_info(self, kit, path):
        store = kit.full(path)
        info = json.loads(json.dumps(store.info()))
        assert info["views"] == 18
        assert info["complete"] is True
        assert info["identity"] == store.identity
        assert info["bytes_per_view"] == {"t": 96}
        assert info["teachers"]["t"]["done"] == 18
        assert info["teachers"]["t"]["streams"]["strong"]["0"] == {"done": 8, "skipped": 0, "total": 8}
        assert info["teachers"]["t"]["statistics"]["outlier_channels"] == []
        assert info["bytes"] > info["teachers"]["t"]["bytes"] > 18 * 96
        assert info["tiles"] == 8

    def test_completeness(self, kit, path):
        store = kit.create(path)
        assert store.info()["complete"] is False
        store.extend([kit.weak()])
        kit.add_teacher(store)
        kit.write(store, 1, skipped=(4,))
        found = store.completeness()["t"]["weak"]
        assert found == {0: (0, 1, 5), 1: (3, 0, 5)}
        assert store.info()["complete"] is False
        kit.fill(store)
        assert all(p.complete for p in store.completeness()["t"]["weak"].values())
        assert store.info()["complete"] is True
