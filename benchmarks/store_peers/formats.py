"""How each peer keeps the views: what its users do by default, chunks of one view, no compression."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import safetensors.numpy
import tensorstore
import torch
import webdataset
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from store_peers.views import Arrays, Views, fill_store, make_store

Fill = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to keep views on disk."""

    name: str
    begin: Callable[[Path, Views], Fill]
    """Prepares a new folder; what it returns writes the payload, and is what is timed."""
    durable: bool = False
    """Whether it fsyncs its files by itself; the others leave that to the caller."""


def _store(folder: Path, views: Views) -> Fill:
    store = make_store(folder / "feats.zarr", views)
    return lambda: fill_store(store, views)


def _raw(folder: Path, views: Views) -> Fill:
    def fill() -> None:
        for name, values in views.arrays.items():
            (folder / f"{name}.bin").write_bytes(values.data)

    return fill


def _npy(folder: Path, views: Views) -> Fill:
    def fill() -> None:
        for name, values in views.arrays.items():
            np.save(folder / f"{name}.npy", values)

    return fill


def _file_per_view(suffix: str, save: Callable[[Arrays, Path], object]) -> Callable[[Path, Views], Fill]:
    def begin(folder: Path, views: Views) -> Fill:
        def fill() -> None:
            for k in range(len(views)):
                save(views.view(k), folder / f"{k}{suffix}")

        return fill

    return begin


def _save_npy(view: Arrays, file: Path) -> None:
    for name, values in view.items():
        np.save(file.with_suffix(f".{name}.npy"), values)


def _save_pt(view: Arrays, file: Path) -> None:
    torch.save({name: torch.from_numpy(values) for name, values in view.items()}, file)


def _hdf5(*, fletcher32: bool) -> Callable[[Path, Views], Fill]:
    def begin(folder: Path, views: Views) -> Fill:
        def fill() -> None:
            with h5py.File(folder / "views.h5", "w") as file:
                for name, values in views.arrays.items():
                    file.create_dataset(name, data=values, chunks=(1, *values.shape[1:]), fletcher32=fletcher32)

        return fill

    return begin


def _webdataset(folder: Path, views: Views) -> Fill:
    def fill() -> None:
        with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=64, verbose=0) as out:
            for k in range(len(views)):
                out.write({"__key__": str(k), **{f"{n}.npy": _npy_bytes(v) for n, v in views.view(k).items()}})

    return fill


def _npy_bytes(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def _zarr_python(folder: Path, views: Views) -> Fill:
    def fill() -> None:
        for name, values in views.arrays.items():
            endian = BytesCodec() if values.itemsize > 1 else BytesCodec(endian=None)
            array = zarr.create_array(
                folder / name,
                shape=values.shape,
                dtype=values.dtype,
                chunks=(64, *values.shape[1:]),
                serializer=ShardingCodec(
                    chunk_shape=(1, *values.shape[1:]),
                    codecs=[endian, Crc32cCodec()],
                    index_codecs=[BytesCodec(), Crc32cCodec()],
                ),
                compressors=None,
                filters=None,
            )
            for at, part in _shards(values):
                array[at : at + len(part)] = part

    return fill


def _tensorstore(*, crc: bool) -> Callable[[Path, Views], Fill]:
    def begin(folder: Path, views: Views) -> Fill:
        def fill() -> None:
            for name, values in views.arrays.items():
                array = tensorstore.open(_tensorstore_spec(folder / name, values, crc=crc), create=True).result()
                writes = [array[at : at + len(part)].write(part) for at, part in _shards(values)]
                for write in writes:
                    write.result()

        return fill

    return begin


def _tensorstore_spec(node: Path, values: np.ndarray, *, crc: bool) -> dict[str, Any]:
    endian: dict[str, Any] = {"name": "bytes"}
    if values.itemsize > 1:
        endian["configuration"] = {"endian": "little"}
    sharding = {
        "chunk_shape": [1, *values.shape[1:]],
        "codecs": [endian, {"name": "crc32c"}] if crc else [endian],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(node)},
        "metadata": {
            "shape": list(values.shape),
            "data_type": values.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [64, *values.shape[1:]]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "fill_value": 0,
        },
    }


def _shards(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    return ((at, values[at : at + 64]) for at in range(0, len(values), 64))


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(name="raw file", begin=_raw),
        Format(name="rsmtdf", begin=_store, durable=True),
        Format(name="zarr-python", begin=_zarr_python),
        Format(name="tensorstore, crc32c", begin=_tensorstore(crc=True), durable=True),
        Format(name="tensorstore, no crc", begin=_tensorstore(crc=False), durable=True),
        Format(name="one .npy", begin=_npy),
        Format(name=".npy per view", begin=_file_per_view(".x", _save_npy)),
        Format(
            name=".safetensors per view",
            begin=_file_per_view(".safetensors", lambda v, f: safetensors.numpy.save_file(v, f)),
        ),
        Format(name=".pt per view", begin=_file_per_view(".pt", _save_pt)),
        Format(name="HDF5, fletcher32", begin=_hdf5(fletcher32=True)),
        Format(name="HDF5", begin=_hdf5(fletcher32=False)),
        Format(name="WebDataset", begin=_webdataset),
    )
}
