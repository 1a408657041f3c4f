from __future__ import annotations

import json

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec

from rsmtdf.errors import StoreCorrupt, StoreError
from rsmtdf.store.arrays import PlainArray, array_metadata, chunk_length, read_metadata, same_layout, set_length

DTYPES = ["bool", "uint8", "int8", "int32", "uint64", "int64", "float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_metadata_is_what_zarr_python_writes(tmp_path, dtype):
    options = {
        "compressors": [Crc32cCodec()],
        "filters": None,
        "chunk_key_encoding": {"name": "default", "separator": "."},
        "fill_value": float("nan") if np.dtype(dtype).kind == "f" else 0,
        "dtype": dtype,
    }
    zarr.create_array(tmp_path / "a", shape=(9, 3), chunks=(1, 3), shards=(4, 3), dimension_names=["x", "y"], **options)
    ours = array_metadata(shape=(9, 3), dtype=dtype, chunk=(1, 3), shard=(4, 3), dims=("x", "y"))
    assert ours == json.loads((tmp_path / "a" / "zarr.json").read_text())
    zarr.create_array(tmp_path / "b", shape=(9,), chunks=(4,), dimension_names=["x"], **options)
    ours = array_metadata(shape=(9,), dtype=dtype, chunk=(4,), dims=("x",))
    assert ours == json.loads((tmp_path / "b" / "zarr.json").read_text())


def make(path, dtype="int64", chunk=4) -> PlainArray:
    return PlainArray(path=path / "a", dtype=dtype, chunk=chunk, dim="view")


@pytest.mark.parametrize("sizes", [[1], [4], [5, 3], [3, 1, 9], [0, 2]])
def test_grows_and_reads_back_as_zarr_python_does(tmp_path, sizes):
    array = make(tmp_path)
    expected = np.empty(0, np.int64)
    for k, n in enumerate(sizes):
        array.replace_tail(np.arange(n) + 100 * k, keep=len(expected))
        expected = np.concatenate([expected, np.arange(n) + 100 * k])
    np.testing.assert_array_equal(array.read(len(expected)), expected)
    np.testing.assert_array_equal(zarr.open_array(array.path, mode="r")[:], expected)


def test_a_shorter_reading_ignores_what_lies_past_it(tmp_path):
    array = make(tmp_path)
    array.replace_tail(np.arange(3), keep=0)
    array.replace_tail(np.arange(10, 17), keep=3)
    np.testing.assert_array_equal(array.read(3), [0, 1, 2])
    array.replace_tail(np.array([7]), keep=3)  # as after a grow that was never committed
    np.testing.assert_array_equal(array.read(4), [0, 1, 2, 7])


def test_every_flipped_bit_is_found(tmp_path):
    array = make(tmp_path, "uint8", chunk=3)
    array.replace_tail(np.array([1, 2, 3], np.uint8), keep=0)
    file = array.chunk_file(0)
    good = file.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(StoreCorrupt, match=r"c\.0: checksum"):
            array.read(3)


@pytest.mark.parametrize("damage", ["missing", "short", "metadata", "no metadata"])
def test_missing_and_cut_files_are_named(tmp_path, damage):
    array = make(tmp_path)
    array.replace_tail(np.arange(6), keep=0)
    file = array.path / "zarr.json" if "metadata" in damage else array.chunk_file(1)
    if damage in ("missing", "no metadata"):
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(StoreCorrupt, match=str(file)):
        array.read(6)


def test_a_compressed_array_is_read_through_zarr_but_cannot_grow(tmp_path):
    array = make(tmp_path)
    zarr.create_array(array.path, shape=(6,), chunks=(5,), dtype="int64")[:] = np.arange(6)
    np.testing.assert_array_equal(array.read(6), np.arange(6))
    with pytest.raises(StoreError, match="cannot grow"):
        array.replace_tail(np.arange(2), keep=6)
    with pytest.raises(StoreCorrupt, match="at least 7"):
        array.read(7)


def test_set_length_keeps_the_layout(tmp_path):
    array = make(tmp_path)
    array.replace_tail(np.arange(6), keep=0)
    set_length(array.path, 2)
    assert read_metadata(array.path)["shape"] == [2]
    assert same_layout(read_metadata(array.path), array.metadata(6))


def test_chunk_lengths():
    assert [chunk_length(n) for n in (0, 1, 1024, 1025, 10**6)] == [1024, 1024, 1024, 2048, 65536]
