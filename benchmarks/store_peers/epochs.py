"""Shuffled epochs: every view once, in random order, in batches, by each reader as its users train with it.

In the process: our reader and those whose users call them there. Through torch's DataLoader (2 worker processes, kept
alive, each item read and then stacked): the formats that are read that way. WebDataset streams its shards through a
shuffle buffer, so its order is not the sampler's and only near-by views mix: it is no random access, by design.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from store_peers.views import Arrays, Views
from store_peers.ways import WAYS, Reads, stream

BATCH = 32
WORKERS = 2
IN_PROCESS = (
    "memcpy (limit)",
    "raw pread (limit)",
    "pread + crc32c (limit)",
    "rsmtdf, verified",
    "rsmtdf, verified, 2 threads",
    "rsmtdf, unverified",
    "rsmtdf, unverified, 2 threads",
    "tensorstore, crc32c",
    "tensorstore, no crc",
    "zarr-python a[i]",
    "npy memmap",
)
THROUGH_DATALOADER = (
    "npy memmap",
    ".npy per view",
    ".safetensors per view",
    ".pt per view",
    "h5py, fletcher32",
    "h5py",
    "zarr-python a[i]",
)
WEBDATASET = "WebDataset, DataLoader"
_PRELOADED = ["torch", "h5py", "tensorstore", "webdataset", "zarr", "safetensors.numpy", "rsmtdf.store.reader"]


@contextlib.contextmanager
def open_epochs(root: Path, views: Views) -> Iterator[dict[str, Callable[[int], int]]]:
    """Label -> one epoch, by the number of its round; it returns how many views it gave.

    `root` has a folder per format.
    """
    # Plain fork would copy the threads' locks of libraries that this process has used: tensorstore aborts on it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with contextlib.ExitStack() as stack:
        epochs: dict[str, Callable[[int], int]] = {}
        buffers = views.buffers(min(BATCH, len(views)))
        for name in IN_PROCESS:
            reads = stack.enter_context(WAYS[name].open(root / WAYS[name].format, views))
            epochs[name] = _in_process(reads, views, buffers)
        for name in THROUGH_DATALOADER:
            items = Items(root, views.without_values(), name)
            epochs[f"{name}, DataLoader"] = _dataloader(items, context, shuffle=True)
        epochs[WEBDATASET] = _dataloader(stream(root / "WebDataset", views), context, shuffle=None)
        try:
            yield epochs
        finally:
            epochs.clear()  # ends the workers, whose maps would keep pages from leaving the cache


class Items(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Views as a map-style dataset, opened by each worker when it first reads."""

    def __init__(self, root: Path, views: Views, way: str) -> None:
        self._root, self._views, self._way = root, views, way
        self._reads: Reads | None = None

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if self._reads is None:
            torch.set_num_threads(1)
            way = WAYS[self._way]
            self._stack = contextlib.ExitStack()  # open until the worker ends
            self._reads = self._stack.enter_context(way.open(self._root / way.format, self._views))
        new = {a.name: np.empty(a.shape, a.dtype) for a in self._views.layout}
        return {name: torch.from_numpy(values) for name, values in self._reads.one(row, new).items()}


def _in_process(reads: Reads, views: Views, buffers: Arrays) -> Callable[[int], int]:
    def epoch(k: int) -> int:
        order = np.random.default_rng(k).permutation(len(views))
        for at in range(0, len(order), BATCH):
            rows = order[at : at + BATCH]
            reads.many(rows, {name: values[: len(rows)] for name, values in buffers.items()})
        return len(order)

    return epoch


def _dataloader(items: Any, context: Any, *, shuffle: bool | None) -> Callable[[int], int]:
    loader = torch.utils.data.DataLoader(
        items,
        batch_size=BATCH,
        shuffle=shuffle,
        num_workers=WORKERS,
        persistent_workers=True,
        multiprocessing_context=context,
    )

    def epoch(k: int) -> int:
        return sum(len(next(iter(batch.values()))) for batch in loader)

    return epoch
