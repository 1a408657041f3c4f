"""A store of other versions opens, or the message says precisely what is not understood, where, and what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from rsmtdf.cli.main import main
from rsmtdf.errors import StoreCorrupt, StoreError
from rsmtdf.stages.cache import view_maker
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.codecs import CODECS
from rsmtdf.store.manifest import FORMAT, signed
from rsmtdf.store.store import FeatureStore

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def store(kit, path) -> FeatureStore:
    return kit.full(path)


@pytest.fixture
def told(monkeypatch, capsys):
    """`rsmtdf cache info STORE`: exit code and what it printed."""

    def run(path: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rsmtdf", "cache", "info", str(path)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return run


def edit_manifest(path: Path, edit: Edit) -> None:
    """Changes the manifest as another version of rsmtdf would have written it: under its own digest."""
    _edit(path, edit)


def edit_teacher(path: Path, edit: Edit, name: str = "t") -> None:
    digest = _edit(path / "teachers" / name, edit)
    _edit(path, lambda manifest: manifest["teachers"].update({name: digest}))


def _edit(node: Path, edit: Edit) -> str:
    file = node / "zarr.json"
    metadata = json.loads(file.read_text())
    body = metadata["attributes"]["rsmtdf"]
    del body["digest"]
    edit(body)
    metadata["attributes"]["rsmtdf"] = signed(body)
    file.write_text(json.dumps(metadata))
    return str(metadata["attributes"]["rsmtdf"]["digest"])


def test_versions_of_other_libraries_matter_to_nobody_but_are_shown(kit, path, store, told):
    versions = {"python": "3.14.2", "machine": "aarch64", "rsmtdf": "0.2.0", "zarr": "4.0", "somelib": "9"}
    edit_manifest(path, lambda m: m.update(versions=versions))
    found = FeatureStore.open(path)
    assert found.versions == versions
    with CachedFeatures(found, ["t"], device="cpu") as source:
        assert torch.equal(source.fetch(np.array([13]))["t"][0], kit.feature("t", 13))
    code, said = told(path)
    assert code == 0
    for part in ("aarch64", "rsmtdf 0.2.0", "zarr 4.0", "somelib 9"):
        assert part in said


NEWER = [
    pytest.param(
        edit_manifest,
        lambda m: m.update(format=FORMAT + 1),
        [f"has format {FORMAT + 1}, this rsmtdf reads format {FORMAT}", "use that version or a newer one"],
        id="format",
    ),
    pytest.param(
        edit_manifest,
        lambda m: m["recipe"].update(solarise_p=0.2),
        ["ViewRecipe has no field solarise_p", "use that version or a newer one"],
        id="view recipe field",
    ),
    pytest.param(
        edit_manifest,
        lambda m: m["dataset"].update(sensor="sar"),
        ["DatasetSpec has no field sensor", "use that version or a newer one"],
        id="dataset field",
    ),
    pytest.param(
        edit_manifest,
        lambda m: m["dataset"].pop("classes"),
        ["DatasetSpec lacks classes", "use that version or a newer one"],
        id="dataset field that is gone",
    ),
    pytest.param(
        edit_manifest,
        lambda m: m["segments"][0].update(orbit=3),
        ["Segment has no field orbit", "use that version or a newer one"],
        id="segment field",
    ),
    pytest.param(
        edit_manifest,
        lambda m: m.pop("columns"),
        ["'columns'", "use that version or a newer one"],
        id="manifest key that is gone",
    ),
    pytest.param(
        edit_teacher,
        lambda t: t["spec"].update(registers="kept"),
        ["teachers/t", "FeatureSpec has no field registers", "use a newer one"],
        id="teacher field",
    ),
    pytest.param(
        edit_teacher,
        lambda t: t.update(codec="int2"),
        ["teachers/t", "codec 'int2'", ", ".join(CODECS), "newer"],
        id="codec",
    ),
]


@pytest.mark.parametrize(("where", "edit", "parts"), NEWER)
def test_what_a_newer_version_wrote_is_named(path, store, told, where, edit, parts):
    edit_manifest(path, lambda m: m["versions"].update(rsmtdf="7.1"))
    where(path, edit)
    with pytest.raises(StoreError) as raised:
        FeatureStore.open(path)
    assert not isinstance(raised.value, StoreCorrupt)  # nothing is damaged
    for part in [*parts, str(path)]:
        assert part in str(raised.value)
    code, said = told(path)
    assert code == 2
    assert str(raised.value) in said
    with pytest.raises(StoreError):
        FeatureStore.open(path, writable=True)


def replace_array(node: Path, **layout: Any) -> np.ndarray:
    """Writes an array anew in another layout, as an archive has it; what it holds."""
    values = np.asarray(zarr.open_array(node, mode="r")[:])
    fields = {"chunks": (1, *values.shape[1:]), "compressors": None, "filters": None, "fill_value": float("nan")}
    array = zarr.create_array(node, shape=values.shape, dtype=values.dtype, overwrite=True, **(fields | layout))
    array[:] = values
    return values


LAYOUTS = {
    "big-endian": {"serializer": BytesCodec(endian="big"), "compressors": [Crc32cCodec()]},
    "chunks of two views": {"chunks": (2, 6, 8)},
    "shards of eight views": {"chunks": (1, 6, 8), "shards": (8, 6, 8)},
    "tokens in chunks of their own": {"chunks": (4, 2, 8)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_array_in_another_layout_reads_the_same(kit, path, store, layout):
    replace_array(path / "teachers" / "t" / "features", **LAYOUTS[layout])
    rows = kit.rows(store)
    with CachedFeatures(FeatureStore.open(path), ["t"], device="cpu", rows=rows) as source:
        found = source.fetch(rows)["t"]
    assert torch.equal(found, torch.stack([kit.feature("t", r) for r in rows.tolist()]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_array_in_another_layout_is_not_written_to(kit, path, store, layout):
    node = path / "teachers" / "t" / "features"
    replace_array(node, **LAYOUTS[layout])
    before = {f: f.read_bytes() for f in node.rglob("*") if f.is_file()}
    words = store.status("t")
    writable = FeatureStore.open(path, writable=True)
    for change in (lambda: kit.write(writable, 0), lambda: writable.extend([kit.weak(start=9)])):
        with pytest.raises(StoreError, match=r"teachers/t/features is archived: .* cache recode"):
            change()
    assert {f: f.read_bytes() for f in node.rglob("*") if f.is_file()} == before
    np.testing.assert_array_equal(store.status("t"), words)
    assert FeatureStore.open(path).n_rows == store.n_rows


def test_metadata_that_lie_about_the_byte_order_are_found(path, store):
    file = path / "teachers" / "t" / "features" / "zarr.json"
    text = file.read_text()
    changed = text.replace('"little"', '"big"', 1)
    assert changed != text
    file.write_text(changed)
    with (
        CachedFeatures(FeatureStore.open(path), ["t"], device="cpu") as source,
        pytest.raises(StoreCorrupt, match=r"teacher 't', view 3 .*the status word says .* rsmtdf cache repair"),
    ):
        source.fetch(np.array([3]))


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"shape": (24, 6, 9), "chunks": (1, 6, 9)}])
def test_an_array_of_another_type_or_shape_is_refused(path, store, change):
    node = path / "teachers" / "t" / "features"
    fields: dict[str, Any] = {"shape": (24, 6, 8), "chunks": (1, 6, 8), "dtype": "float16"}
    zarr.create_array(node, overwrite=True, **(fields | change))
    with pytest.raises(StoreCorrupt, match=r"file .*features/zarr.json: .*expected float16 \(24, 6, 8\)"):
        CachedFeatures(FeatureStore.open(path), ["t"], device="cpu")


def test_views_of_another_recipe_version_are_not_made(store, path):
    """Their pixels would differ, and the message must not blame an image library for it."""
    edit_manifest(path, lambda manifest: manifest["recipe"].update(version=2))
    newer = FeatureStore.open(path)
    with CachedFeatures(newer, ["t"], device="cpu") as source:
        assert source.fetch(newer.rows(stream="weak"))["t"].shape[0] == 10
    with pytest.raises(StoreError, match=r"are of version 2 of the recipe, and this rsmtdf makes version 1"):
        view_maker(newer, reader=None, tiles={})
