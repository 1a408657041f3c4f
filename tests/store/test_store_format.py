"""Any Zarr v3 reader opens a store; the formulas are those of docs/store-format.md."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import zarr


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_zarr_python_reads_all_of_it(kit, path, codec):
    store = kit.full(path, codec=codec)
    root = zarr.open_group(path, mode="r")
    # Walking the whole tree meets nothing that is not Zarr: it would warn, and warnings are errors here.
    names = {name for name, _ in root.members(max_depth=None)}
    assert {"tiles/id_bytes", "views/status", "views/scale", "teachers/t/status", "provenance"} <= names
    assert sorted(root) == ["provenance", "teachers", "tiles", "views"]

    ids = root["tiles/id_bytes"][:].tobytes()
    offsets = root["tiles/id_offsets"][:]
    assert [ids[a:b].decode() for a, b in itertools.pairwise(offsets)] == list(store.tile_ids)
    for name in store.column_names:
        column = root["views"][name]
        assert column.metadata.dimension_names == ("view",)
        np.testing.assert_array_equal(column[:], store.column(name))
    # On disk, holes of committed shards are marked; all shards of this store are committed.
    np.testing.assert_array_equal(root["views/status"][:], store.view_status())
    teacher = root["teachers/t"]
    np.testing.assert_array_equal(teacher["status"][:], store.status("t"))
    mean, std = teacher["channel_mean"][:], teacher["channel_std"][:]

    rows = kit.rows(store)
    if codec == "fp16":
        values = teacher["features"][:]
        assert teacher["features"].metadata.dimension_names == ("view", "token", "channel")
        for row in rows.tolist():
            np.testing.assert_array_equal(values[row], kit.feature("t", row).numpy())
        assert np.isnan(np.delete(values, rows, axis=0)).all()
    else:
        codes, scale = teacher["codes"][:], teacher["token_scale"][:].astype(np.float32)
        decoded = codes * scale[..., None] * np.maximum(std, 1e-3) + mean
        for row in rows.tolist():
            assert np.abs(decoded[row] - kit.feature("t", row).numpy()).max() < 0.05
        assert (np.delete(codes, rows, axis=0) == -128).all()


def test_files_on_disk_are_those_documented(kit, path):
    kit.full(path).seal()
    found = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    columns = ["tile", "stream", "seed", "generation", "partner", "scale", "flip", "blur"]
    expected = {"zarr.json", "tiles/zarr.json", "views/zarr.json", "teachers/zarr.json", "teachers/t/zarr.json"}
    expected |= {"provenance/zarr.json", "provenance/locks"} | {f"provenance/t/{k}.json" for k in range(6)}
    for array in ["tiles/id_bytes", "tiles/id_offsets", *(f"views/{c}" for c in columns)]:
        expected |= {f"{array}/zarr.json", f"{array}/c.0"}
    for array in ["channel_mean", "channel_std"]:
        expected |= {f"teachers/t/{array}/zarr.json", f"teachers/t/{array}/c.0"}
    for array in ["views/status", "teachers/t/status"]:
        expected |= {f"{array}/zarr.json", f"{array}/sealed"} | {f"{array}/c.{k}" for k in range(6)}
    chunks = {name for name in expected if name.endswith("/c.0") and "status" not in name}
    expected |= {f"provenance/twins/{name}" for name in {"zarr.json", "teachers/t/zarr.json"} | chunks}
    expected |= {"teachers/t/features/zarr.json"} | {f"teachers/t/features/c.{k}.0.0" for k in range(6)}
    assert found == expected


def test_root_attributes_are_those_documented(kit, path):
    kit.full(path)
    root = json.loads((path / "zarr.json").read_text())
    assert list(root["attributes"]) == ["rsmtdf"]
    assert set(root["attributes"]["rsmtdf"]) == {
        "format", "identity", "recipe", "dataset", "data_root", "experiment", "versions", "shard_views", "n_rows",
        "tiles", "segments", "columns", "teachers", "digest",
    }  # fmt: skip
    teacher = json.loads((path / "teachers" / "t" / "zarr.json").read_text())["attributes"]["rsmtdf"]
    assert set(teacher) == {"spec", "codec", "statistics", "arrays", "digest"}


def test_xarray_reads_a_teacher(kit, path):
    xarray = pytest.importorskip("xarray", reason="xarray is not installed")
    store = kit.full(path)
    found = xarray.open_zarr(path, group="teachers/t", consolidated=False)
    assert dict(found.sizes) == {"view": 24, "token": 6, "channel": 8}
    np.testing.assert_array_equal(found.features[13].values, kit.feature("t", 13).numpy())
    np.testing.assert_array_equal(found.status.values, store.status("t"))


def test_tensorstore_reads_a_view(kit, path):
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    kit.full(path)
    node = str(path / "teachers" / "t" / "features")
    array = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": node}}).result()
    np.testing.assert_array_equal(array[13].read().result(), kit.feature("t", 13).numpy())
