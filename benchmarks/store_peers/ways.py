"""The ways to read the views: each opens one format and gives a view, or a batch of them.

A way fills memory that it is given where its library can, and else returns new arrays, as its users would have it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
import safetensors.numpy
import tensorstore
import torch
import webdataset
import zarr

from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.store import FeatureStore
from store_peers.views import Arrays, Views

ReadOne = Callable[[int, Arrays], Arrays]
"""(row, arrays of one view) -> the view, in those arrays or in new ones."""
ReadMany = Callable[[np.ndarray, Arrays], Arrays]
"""(rows, arrays of as many views) -> the batch, in those arrays or in new ones."""


@dataclass(frozen=True, kw_only=True)
class Reads:
    """An open way."""

    one: ReadOne
    many: ReadMany


@dataclass(frozen=True, kw_only=True)
class Way:
    """How one reader reads one format; `open` is a context manager over (folder, views)."""

    name: str
    format: str
    open: Callable[[Path, Views], AbstractContextManager[Reads]]
    single: bool = True
    """Whether reading one view at a time is a way that its users have."""
    batched: bool = True
    fresh_map: bool = False
    """Whether it maps its file, so that it must be opened anew to drop the file from the page cache."""


def _one_by_one(one: ReadOne) -> Reads:
    def many(rows: np.ndarray, out: Arrays) -> Arrays:
        for k, row in enumerate(rows.tolist()):
            slot = {name: values[k] for name, values in out.items()}
            found = one(row, slot)
            if found is not slot:
                for name, values in slot.items():
                    values[...] = found[name]
        return out

    return Reads(one=one, many=many)


@contextlib.contextmanager
def _memory(folder: Path, views: Views) -> Iterator[Reads]:
    def one(row: int, out: Arrays) -> Arrays:
        for name, values in out.items():
            np.copyto(values, views.arrays[name][row])
        return out

    yield _one_by_one(one)


def _pread(*, crc: bool) -> Callable[[Path, Views], AbstractContextManager[Reads]]:
    @contextlib.contextmanager
    def opened(folder: Path, views: Views) -> Iterator[Reads]:
        files = {name: os.open(folder / f"{name}.bin", os.O_RDONLY) for name in views.names}

        def one(row: int, out: Arrays) -> Arrays:
            for name, values in out.items():
                memory = values.reshape(-1).view(np.uint8)
                os.preadv(files[name], [memory], row * values.nbytes)
                if crc:
                    google_crc32c.extend(0, memory)
            return out

        try:
            yield _one_by_one(one)
        finally:
            for fd in files.values():
                os.close(fd)

    return opened


def _ours(*, verify: bool = True, threads: int = 1) -> Callable[[Path, Views], AbstractContextManager[Reads]]:
    @contextlib.contextmanager
    def opened(folder: Path, views: Views) -> Iterator[Reads]:
        store = FeatureStore.open(folder / "feats.zarr")
        with FeatureReader(store, views.spec.name, verify=verify, threads=threads) as reader:

            def many(rows: np.ndarray, out: Arrays) -> Arrays:
                reader.get_many(rows, out=out)
                return out

            def one(row: int, out: Arrays) -> Arrays:
                reader.get_many([row], out={name: values[None] for name, values in out.items()})
                return out

            yield Reads(one=one, many=many)

    return opened


@contextlib.contextmanager
def _memmap(folder: Path, views: Views) -> Iterator[Reads]:
    maps = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in views.names}

    def one(row: int, out: Arrays) -> Arrays:
        for name, values in out.items():
            np.copyto(values, maps[name][row])
        return out

    try:
        yield _one_by_one(one)
    finally:
        maps.clear()  # unmapped now, whoever keeps the reader: mapped pages never leave the page cache


@contextlib.contextmanager
def _npy(folder: Path, views: Views) -> Iterator[Reads]:
    yield _one_by_one(lambda row, out: {name: np.load(folder / f"{row}.{name}.npy") for name in out})


@contextlib.contextmanager
def _safetensors(folder: Path, views: Views) -> Iterator[Reads]:
    yield _one_by_one(lambda row, out: safetensors.numpy.load_file(folder / f"{row}.safetensors"))


@contextlib.contextmanager
def _pt(folder: Path, views: Views) -> Iterator[Reads]:
    def one(row: int, out: Arrays) -> Arrays:
        found = torch.load(folder / f"{row}.pt", weights_only=True)
        return {name: values.numpy() for name, values in found.items()}

    yield _one_by_one(one)


@contextlib.contextmanager
def _hdf5(folder: Path, views: Views) -> Iterator[Reads]:
    with h5py.File(folder / "views.h5", "r") as file:
        sets = {name: file[name] for name in views.names}

        def one(row: int, out: Arrays) -> Arrays:
            for name, values in out.items():
                sets[name].read_direct(values, np.s_[row])
            return out

        yield _one_by_one(one)


def _zarr_arrays(folder: Path, views: Views) -> dict[str, Any]:
    node = folder / "feats.zarr" / "teachers" / views.spec.name
    return {name: zarr.open_array(node / name, mode="r") for name in views.names}


@contextlib.contextmanager
def _zarr(folder: Path, views: Views) -> Iterator[Reads]:
    arrays = _zarr_arrays(folder, views)
    yield _one_by_one(lambda row, out: {name: arrays[name][row] for name in out})


@contextlib.contextmanager
def _zarr_oindex(folder: Path, views: Views) -> Iterator[Reads]:
    arrays = _zarr_arrays(folder, views)
    yield Reads(
        one=lambda row, out: {name: arrays[name].oindex[[row]][0] for name in out},
        many=lambda rows, out: {name: arrays[name].oindex[rows] for name in out},
    )


def _tensorstore(node_of: Callable[[Path, Views], Path]) -> Callable[..., AbstractContextManager[Reads]]:
    @contextlib.contextmanager
    def opened(folder: Path, views: Views) -> Iterator[Reads]:
        node = node_of(folder, views)
        arrays = {
            name: tensorstore.open(
                {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(node / name)}}, read=True
            ).result()
            for name in views.names
        }

        def one(row: int, out: Arrays) -> Arrays:
            return {name: arrays[name][row].read().result() for name in out}

        def many(rows: np.ndarray, out: Arrays) -> Arrays:
            waiting = [(name, k, arrays[name][row].read()) for k, row in enumerate(rows.tolist()) for name in out]
            for name, k, future in waiting:
                out[name][k] = future.result()
            return out

        yield Reads(one=one, many=many)

    return opened


def stream(folder: Path, views: Views) -> Any:
    """WebDataset's pipeline: shards in random order, one to a worker, through a shuffle buffer of 64 views."""
    shards = [str(f) for f in sorted(folder.glob("*.tar"))]
    found = webdataset.WebDataset(shards, shardshuffle=len(shards), workersplitter=_split, empty_check=False)
    return found.shuffle(64).decode().map(_Pick(views.names))


class _Pick:
    """A sample as tensors, and its key."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        return {name: torch.from_numpy(sample[f"{name}.npy"]) for name in self._names} | {"row": int(sample["__key__"])}


def _split(shards: Any) -> Any:
    """Each worker takes every so-manieth shard."""
    info = torch.utils.data.get_worker_info()
    return shards if info is None else itertools.islice(shards, info.id, None, info.num_workers)


@contextlib.contextmanager
def _webdataset(folder: Path, views: Views) -> Iterator[Reads]:
    def one(row: int, out: Arrays) -> Arrays:
        sample = next(s for s in stream(folder, views) if s["row"] == row)
        return {name: sample[name].numpy() for name in out}

    yield _one_by_one(one)


_tensorstore_crc = _tensorstore(lambda folder, views: folder / "feats.zarr" / "teachers" / views.spec.name)
_tensorstore_plain = _tensorstore(lambda folder, views: folder)

WAYS: dict[str, Way] = {
    w.name: w
    for w in (
        Way(name="memcpy (limit)", format="raw file", open=_memory),
        Way(name="raw pread (limit)", format="raw file", open=_pread(crc=False)),
        Way(name="pread + crc32c (limit)", format="raw file", open=_pread(crc=True)),
        Way(name="rsmtdf, verified", format="rsmtdf", open=_ours()),
        Way(
            name="rsmtdf, verified, 2 threads",
            format="rsmtdf",
            open=_ours(threads=2),
            single=False,
        ),
        Way(name="rsmtdf, unverified", format="rsmtdf", open=_ours(verify=False)),
        Way(
            name="rsmtdf, unverified, 2 threads",
            format="rsmtdf",
            open=_ours(verify=False, threads=2),
            single=False,
        ),
        Way(name="zarr-python a[i]", format="rsmtdf", open=_zarr),
        Way(name="zarr-python oindex", format="rsmtdf", open=_zarr_oindex),
        Way(name="tensorstore, crc32c", format="rsmtdf", open=_tensorstore_crc),
        Way(name="tensorstore, no crc", format="tensorstore, no crc", open=_tensorstore_plain),
        Way(name="h5py, fletcher32", format="HDF5, fletcher32", open=_hdf5),
        Way(name="h5py", format="HDF5", open=_hdf5),
        Way(name="npy memmap", format="one .npy", open=_memmap, fresh_map=True),
        Way(name=".npy per view", format=".npy per view", open=_npy),
        Way(name=".safetensors per view", format=".safetensors per view", open=_safetensors),
        Way(name=".pt per view", format=".pt per view", open=_pt),
        # Only to check what it gives: a stream has no random access to time.
        Way(name="WebDataset", format="WebDataset", open=_webdataset, single=False, batched=False),
    )
}
"""Every way by its name."""
