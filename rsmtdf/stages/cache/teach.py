"""Showing views to teachers and encoding what they say, on the device, in batches that fit into memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from rsmtdf.errors import StoreError, TeacherError
from rsmtdf.memory import is_out_of_memory
from rsmtdf.signals import StopFlag
from rsmtdf.specs import Teacher
from rsmtdf.stages.cache.supply import Batch, Finished
from rsmtdf.stages.cache.trace import Trace
from rsmtdf.stages.cache.transfer import Lane, Sent, device_of, lanes
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import StoredTeacher

T = TypeVar("T")
_Answer = tuple[StoredTeacher, dict[str, torch.Tensor], Lane, "torch.cuda.Event | None"]
"""A teacher as the store has it, encoded features, the way they come, and when they are there."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shown:
    """A batch on its way to the devices of its teachers."""

    batch: Batch
    sent: Mapping[torch.device, Sent]


class Harvest:
    """Encoded features of one shard, on the host or on their way there."""

    def __init__(self) -> None:
        self._rows: dict[str, list[int]] = {}
        self._arrays: dict[str, dict[str, torch.Tensor]] = {}
        self._arrivals: list[torch.cuda.Event] = []
        self._sizes: set[int] = set()

    @property
    def rows(self) -> Mapping[str, Sequence[int]]:
        """Teacher -> the views that it has seen, ascending."""
        return self._rows

    @property
    def batches(self) -> Sequence[int]:
        """Sizes of the batches that were asked for, descending: more than one where memory ran out on the way."""
        return sorted(self._sizes, reverse=True)

    def take(
        self,
        stored: StoredTeacher,
        rows: Sequence[int],
        encoded: Mapping[str, torch.Tensor],
        lane: Lane,
        *,
        batch: int,
        after: torch.cuda.Event | None,
    ) -> None:
        """Starts to fetch the encoded features of `rows`, which follow those that are there, computed in a batch of
        `batch` views or, where there were fewer, of all of them.
        """
        self._sizes.add(batch)
        mine = self._rows.setdefault(stored.name, [])
        arrays = self._arrays.setdefault(stored.name, {})
        for name, values in encoded.items():
            if name not in arrays:
                arrays[name] = lane.host_memory((stored.shard_views, *values.shape[1:]), values.dtype)
            target = arrays[name][len(mine) : len(mine) + len(rows)]
            arrival = lane.fetch(values, target, after=after)
            if arrival is not None:
                self._arrivals.append(arrival)
        mine.extend(rows)

    def wait(self) -> None:
        """Returns when everything is there."""
        for arrival in self._arrivals:
            arrival.synchronize()

    def encoded(self, stored: StoredTeacher) -> dict[str, np.ndarray]:
        """Array name -> values [k, ...] of the k views that the teacher has seen; `wait` comes first.

        Where all tiles of a shard are unreadable k is 0, and it is committed as skipped all the same.
        """
        mine, k = self._arrays.get(stored.name, {}), len(self._rows.get(stored.name, ()))
        return {a.name: mine[a.name][:k].numpy() if k else np.empty((0, *a.shape), a.dtype) for a in stored.arrays}


class Lesson:
    """Teachers of a store, and how many views they are shown at a time: `batch`, halved when memory runs out."""

    def __init__(
        self,
        store: FeatureStore,
        teachers: Mapping[str, Teacher],
        *,
        batch: int,
        stop: StopFlag,
        trace: Trace,
        turn: AbstractContextManager[object],
    ) -> None:
        self.batch = batch
        self._stopped = f"stopped; run the same command again to go on ({store.path})"
        self._store, self._teachers, self._lanes = store, teachers, lanes(teachers)
        self._stop, self._trace, self._turn = stop, trace, turn

    def check(self) -> None:
        """Raises `Interrupted` if a signal came."""
        self._stop.check(self._stopped)

    def show(self, items: Iterable[Batch | Finished]) -> Iterator[Shown | Finished]:
        """`items` with the pixels of each batch on their way."""
        for item in items:
            if isinstance(item, Finished):
                yield item
            else:
                devices = {device_of(self._teachers[name]) for name in item.names}
                yield Shown(item, {device: self._lanes[device].send(item.views) for device in devices})

    def teach(self, shown: Shown, harvest: Harvest) -> None:
        """Has a batch's teachers see it, and adds what they say to `harvest`.

        Raises:
            TeacherError: not one view at a time fits into memory, or a teacher's features are not finite.
            StoreError: features cannot be stored.
            Interrupted: a signal came.
        """
        rows, start = shown.batch.rows, 0
        while start < len(rows):
            self.check()
            part = slice(start, start + self.batch)
            try:
                found = self._asked(shown, part)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                # Its frames hold the tensors that have to go now.
                out_of_memory = error.with_traceback(None)
            else:
                for stored, encoded, lane, after in found:
                    with self._trace.span("copy"):
                        harvest.take(stored, rows[part], encoded, lane, batch=self.batch, after=after)
                start += self.batch
                continue
            self._halve(shown, out_of_memory)

    def _asked(self, shown: Shown, part: slice) -> list[_Answer]:
        """What each teacher says of the views in `part`, encoded, on its device."""
        rows = shown.batch.rows[part]
        answers: list[_Answer] = []
        begun = time.perf_counter()
        with self._turn:
            self._trace.add("turn", time.perf_counter() - begun)
            for name in shown.batch.names:
                teacher, stored = self._teachers[name], self._store.teacher(name)
                lane = self._lanes[device_of(teacher)]
                pixels = lane.arrived(shown.sent[lane.device], part)
                with self._trace.span("teacher"):
                    tokens = self._blaming(teacher, rows, teacher, pixels)
                with self._trace.span("encode"):
                    encoded = self._blaming(teacher, rows, stored.encode, tokens)
                answers.append((stored, encoded, lane, lane.computed()))
        return answers

    def _blaming(self, teacher: Teacher, rows: Sequence[int], step: Callable[[torch.Tensor], T], x: torch.Tensor) -> T:
        """`step(x)`; an error about it names the first view that brings it about alone."""
        try:
            return step(x)
        except (TeacherError, StoreError) as error:
            found, where = error, f"one of the views {rows[0]} to {rows[-1]}"
            for k, row in enumerate(rows):
                try:
                    step(x[k : k + 1])
                except (TeacherError, StoreError) as alone:
                    found, where = alone, f"view {self._store.describe(row)}"
                    break
            raise type(found)(
                f"{found}. It is {where}. Nothing of shard {rows[0] // self._store.shard_views} was committed, all "
                f"before it was. Where numbers overflow (this teacher computes in {teacher.spec.compute_dtype}), "
                "--precision float32 or bfloat16 helps: that makes it another teacher, which a store with features of "
                "this one takes under another name only"
            ) from error

    def _halve(self, shown: Shown, error: RuntimeError) -> None:
        """Half the batch from now on.

        Raises:
            TeacherError: one view is too much.
        """
        tried = min(self.batch, len(shown.batch.rows))
        if tried == 1:
            devices = ", ".join(sorted(str(lane.device) for lane in self._lanes.values()))
            raise TeacherError(
                f"not even one view at a time fits into the memory of {devices} with teacher(s) "
                f"{', '.join(shown.batch.names)}: {error}. Cache one teacher at a time (--teacher NAME), compute in "
                "--precision bfloat16, free memory that other programs hold, or take another --device"
            ) from error
        self.batch = tried // 2
        log.warning("out of memory: going on with batches of %d", self.batch)
        if any(lane.is_cuda for lane in self._lanes.values()):
            torch.cuda.empty_cache()  # or what is left stays cut into pieces of the old size
