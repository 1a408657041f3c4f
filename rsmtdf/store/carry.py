"""Carrying features from one store to another: what recoding and merging share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from rsmtdf.errors import StoreCorrupt, StoreError
from rsmtdf.objects import StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.store.places import free_bytes
from rsmtdf.store.reader import FeatureReader

AT_A_TIME = 8
"""Views decoded at a time: a float32 view is four times one in int8, and only its encoded form waits for its shard."""
RECODED_FROM = "recoded_from"
"""In a teacher's statistics, beside their rule: the codecs that its values went through before."""


def tell_sound(reader: FeatureReader, rows: Sequence[int]) -> tuple[list[int], dict[int, str]]:
    """Those of `rows` that are sound, and what is wrong with each of the others."""
    good: list[int] = []
    bad: dict[int, str] = {}
    for row in rows:
        try:
            reader.get_many([row])
        except StoreCorrupt as error:
            bad[row] = str(error.__cause__ or "its checksum is not the one in the status word")
        else:
            good.append(row)
    return good, bad


def read_sound(
    reader: FeatureReader, rows: np.ndarray, bad: dict[int, str]
) -> tuple[list[int], Mapping[str, np.ndarray]]:
    """Those of `rows` that are sound, with their arrays; the others go into `bad`, each with what is wrong with it."""
    try:
        return rows.tolist(), reader.get_many(rows)
    except StoreCorrupt:
        good, found = tell_sound(reader, rows.tolist())
        bad.update(found)
        return good, reader.get_many(good)


def joined(
    kept: Sequence[int], old: Mapping[str, np.ndarray], added: Sequence[int], new: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The arrays of the rows that a shard keeps and of those that it gets, rows ascending."""
    order = np.argsort(np.array([*kept, *added], np.int64))
    return {name: np.concatenate([old[name], new[name]])[order] for name in new}


def in_parallel(
    work: Callable[[int], int], shards: Sequence[int], threads: int, stop: StopFlag, path: StorePath
) -> Iterator[int]:
    """What `work` says of each shard, in order, with at most `threads` of them in work.

    Raises:
        Interrupted: a signal came; the shards in work were finished.
    """
    queue: deque[Future[int]] = deque()
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="shards") as pool:
        for shard in shards:
            if stop:
                break  # what is in work is finished first
            if len(queue) >= max(threads, 1):
                yield queue.popleft().result()
            queue.append(pool.submit(work, shard))
        while queue:
            yield queue.popleft().result()
    stop.check(f"stopped; {path} keeps what is finished, run the same command again to go on")


def require_space(path: StorePath, payload: int) -> None:
    """Checks that the disk of `path` has room for `payload` bytes.

    Raises:
        StoreError: it has not.
    """
    free = free_bytes(path)
    if free is not None and payload > free:
        raise StoreError(
            f"{path} needs {payload / 1e9:.2f} GB more, but only {free / 1e9:.2f} GB are free there; nothing was "
            "written. Give another disk, a smaller codec, or only some teachers"
        )
