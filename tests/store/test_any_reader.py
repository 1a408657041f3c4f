"""Any Zarr v3 reader opens a store, and one line of NumPy, taken from docs/store-format.md, decodes a view."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from rsmtdf.store.codecs import CODECS
from rsmtdf.store.reader import FeatureReader

Arrays = Mapping[str, Any]
GRID, DIM = (2, 3), 64
"""Wide enough for a codec whose groups are of 32 channels."""


def documented(repo: Path) -> dict[str, str]:
    """Codec -> its line of NumPy, out of the documentation."""
    lines = re.compile(rf"^    ({'|'.join(CODECS)}) = (.+)$", re.MULTILINE)
    return dict(lines.findall((repo / "docs" / "store-format.md").read_text()))


def by_zarr_python(path: Path, group: str) -> Arrays:
    return dict(zarr.open_group(path, mode="r")[group].arrays())


def by_tensorstore(path: Path, group: str) -> Arrays:
    """Arrays that are read whole when they are indexed: the formula is NumPy's."""
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is not installed (it is in rsmtdf[dev])")

    class Values:
        def __init__(self, node: Path) -> None:
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(node)}}
            self._array = tensorstore.open(spec, read=True).result()

        def __getitem__(self, index: Any) -> np.ndarray:
            return np.asarray(self._array[index].read().result())

    return {node.name: Values(node) for node in (path / group).iterdir() if node.is_dir()}


def by_xarray(path: Path, group: str) -> Arrays:
    xarray = pytest.importorskip("xarray", reason="xarray is not installed (it is in rsmtdf[dev])")
    found = xarray.open_zarr(path, group=group, consolidated=False)

    class Values:
        def __init__(self, array: Any) -> None:
            self._array = array

        def __getitem__(self, index: Any) -> np.ndarray:
            return np.asarray(self._array[index].values)

    return {str(name): Values(array) for name, array in found.data_vars.items()}


READERS: dict[str, Callable[[Path, str], Arrays]] = {
    "zarr-python": by_zarr_python,
    "tensorstore": by_tensorstore,
    "xarray": by_xarray,
}


@pytest.fixture(params=list(CODECS))
def stored(kit, path, request):
    """A full store under each codec: 18 views in 6 shards of 4."""
    store = kit.create(path)
    store.extend([kit.weak(), kit.strong(), kit.strong(3, generation=1, first_tile=5)])
    kit.add_teacher(store, codec=request.param, grid=GRID, dim=DIM)
    kit.fill(store)
    return store


@pytest.mark.parametrize("reader", READERS)
def test_one_documented_line_decodes_a_view(kit, repo, stored, reader):
    codec = stored.teacher("t").codec
    formulas = documented(repo)
    assert codec in formulas, f"docs/store-format.md has no line for {codec}"
    arrays = READERS[reader](stored.path, "teachers/t")
    names = {a.name for a in stored.teacher("t").arrays} | {"channel_mean", "channel_std"}
    scope: dict[str, Any] = {"np": np, "t": GRID[0] * GRID[1], "c": DIM} | {name: arrays[name] for name in names}
    scope |= {name: arrays[name][:] for name in ("channel_mean", "channel_std")}
    with FeatureReader(stored, "t") as features:
        for row in kit.rows(stored).tolist():
            encoded = {k: torch.from_numpy(v) for k, v in features.get_many([row]).items()}
            expected = stored.teacher("t").decode(encoded, device=torch.device("cpu"))[0].numpy()
            found = eval(formulas[codec], scope, {"i": row})  # noqa: S307 - our own documentation is under test
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("reader", READERS)
def test_status_words_and_columns_are_plain_arrays(stored, reader):
    views = READERS[reader](stored.path, "views")
    np.testing.assert_array_equal(views["status"][:], stored.view_status())
    for name in stored.column_names:
        np.testing.assert_array_equal(views[name][:], stored.column(name))
    np.testing.assert_array_equal(READERS[reader](stored.path, "teachers/t")["status"][:], stored.status("t"))


@pytest.mark.parametrize("reader", READERS)
def test_holes_read_as_the_fill_values_that_no_view_has(kit, stored, reader):
    arrays = READERS[reader](stored.path, "teachers/t")
    holes = np.setdiff1d(np.arange(stored.n_rows), kit.rows(stored))
    for array in stored.teacher("t").arrays:
        for row in holes.tolist():
            found = arrays[array.name][row]
            np.testing.assert_array_equal(found, np.full(array.shape, array.fill, array.dtype))


def test_walking_the_whole_store_meets_nothing_strange(stored):
    # A warning would be an error here.
    found = dict(zarr.open_group(stored.path, mode="r").members(max_depth=None))
    assert {"tiles/id_bytes", "views/status", "views/scale", "teachers/t/status", "provenance"} <= set(found)
    arrays = [node for node in found.values() if isinstance(node, zarr.Array)]
    assert len(arrays) >= 12
    for array in arrays:
        np.asarray(array[:])
