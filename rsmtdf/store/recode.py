"""The same store under another codec: features decoded, encoded and verified shard by shard.

Row numbers, columns, tiles, the views' sums and the channel statistics are carried over byte for byte, so a run can go
on with either store. The source is never written. What it lacks, or has damaged, stays to be done in the new one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rsmtdf.errors import StoreError
from rsmtdf.objects import StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.store.carry import AT_A_TIME, in_parallel, joined, read_sound, require_space
from rsmtdf.store.codecs import STD_FLOOR, bytes_per_view, find_codec
from rsmtdf.store.growth import is_taken
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.recode_target import make_target, open_target
from rsmtdf.store.status import DONE, SKIPPED, TODO, crc_of, state_of
from rsmtdf.store.store import FeatureStore

Step = Callable[[str], None]
"""Called after each step with its name; if it raises, the recoding ends there."""


@dataclass(kw_only=True)
class RecodeReport:
    """How a recoding went."""

    source: StorePath
    store: StorePath
    codec: str
    views: dict[str, int] = field(default_factory=dict)
    """Teacher -> views encoded this time."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Teacher -> views that the source had skipped."""
    lacking: dict[str, int] = field(default_factory=dict)
    """Teacher -> views that the source has not, and so the new store has not either."""
    damaged: dict[str, dict[str, str]] = field(default_factory=dict)
    """Teacher -> view in words -> what is wrong with it in the source, or in the new store where only that had it."""
    rounded_before: dict[str, str] = field(default_factory=dict)
    """Teacher -> the source's codec, where it has rounded more than half precision does."""
    error: dict[str, float] = field(default_factory=dict)
    """Teacher -> relative error that this encoding adds, after standardising, over a view of each shard."""
    bytes_before: int = 0
    bytes_after: int = 0
    """Payload of the finished views of these teachers, in the source and in the new store."""
    bytes_read: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "source": str(self.source), "store": str(self.store)}


def recode(
    source: StorePath,
    path: StorePath,
    *,
    codec: str,
    teachers: Sequence[str] | None = None,
    experiment: Mapping[str, Any] | None = None,
    threads: int = 2,
    stop: StopFlag,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_step: Step = lambda step: None,
) -> RecodeReport:
    """Makes, or goes on with, the store at `path`: `source` with its features under `codec`.

    Args:
        source: a store; only read, and it may be incomplete.
        path: where the new one goes: nothing is there, or what an earlier call with these arguments has begun.
        codec: a key of `CODECS`.
        teachers: only these; None: all.
        experiment: the record that the new store keeps; None: the source's.
        threads: shards in work at a time; each needs the memory of one encoded shard.
        stop: ends it between shards; the same call goes on.
        progress: told views finished, and views in all.
        on_step: for tests that end it, or write to DST, half-way.

    Raises:
        StoreNotFound: there is no store at `source`.
        StoreMismatch: something else is at `path`, naming each difference.
        StoreError: no such codec, no space, or a value that it cannot hold, naming view and channel.
        Interrupted: a signal came.
    """
    begun = time.perf_counter()
    find_codec(codec)
    src = FeatureStore.open(source)
    names = list(src.teachers) if teachers is None else list(dict.fromkeys(teachers))
    chosen = [src.teacher(name) for name in names]
    if not chosen:
        raise StoreError(f"feature store {source} has no teachers, so there is nothing to recode")
    report = RecodeReport(source=source, store=path, codec=codec)
    report.rounded_before = {t.name: t.codec for t in chosen if t.codec not in ("fp16", codec)}
    dst = open_target(src, path, chosen, codec) if is_taken(path) else None
    lacks = {name: _lack(src, dst, name) for name in names}
    need = (int(lack.take.sum()) * bytes_per_view(codec, *_shape(src, name)) for name, lack in lacks.items())
    require_space(path, sum(need))
    if dst is None:
        make_target(src, path, chosen, codec, src.experiment if experiment is None else experiment)
        dst = FeatureStore.open(path, writable=True)
    dst.clean_partials()
    on_step("shards")
    claimed = {k for lack in lacks.values() for k in lack.shards(src.shard_views)}
    with dst.claim(sorted(claimed)):
        # What a writer has committed until then is DST's own.
        jobs = [_TeacherJob(src=src, dst=dst, name=name, shards=claimed, report=report) for name in names]
        done, total = 0, sum(job.n_views for job in jobs)
        for job in jobs:
            with job:
                for views in in_parallel(job.shard, job.shards, threads, stop, path):
                    done += views
                    progress(done, total)
    dst.seal()
    _conclude(src, dst, names, report)
    report.seconds = time.perf_counter() - begun
    return report


@dataclass(frozen=True)
class _Lack:
    """What DST lacks of a teacher and SRC has; bool [n_rows] each."""

    take: np.ndarray
    """Views whose features SRC has."""
    skip: np.ndarray
    """Views that SRC could not read."""

    def shards(self, shard_views: int) -> list[int]:
        shards: list[int] = np.unique(np.flatnonzero(self.take | self.skip) // shard_views).tolist()
        return shards

    def views(self, rows: np.ndarray) -> int:
        """How many of `rows`."""
        return int((self.take | self.skip)[rows].sum())


class _TeacherJob:
    """One teacher's shards on their way from SRC to DST, from several threads. The caller has claimed them."""

    def __init__(
        self, *, src: FeatureStore, dst: FeatureStore, name: str, shards: Collection[int], report: RecodeReport
    ) -> None:
        self._src, self._dst, self._name, self._report = src, dst, name, report
        self._old, self._new = src.teacher(name), dst.teacher(name)
        self._lack = _lack(src, dst, name)
        self._there, self._kept = src.usable([name]), dst.usable([name])
        self._was_skipped = state_of(dst.status(name)) == SKIPPED
        # After the features' words, for SRC may be written to: of what is done, the sums are then there.
        self._their_views, self._our_views = src.view_status(), dst.view_status()
        self.shards = [k for k in self._lack.shards(src.shard_views) if k in shards]
        self._lock = threading.Lock()
        self._error = self._size = 0.0
        self._readers = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._from_src = self._readers.enter_context(FeatureReader(self._src, self._name))
        self._from_dst = self._readers.enter_context(FeatureReader(self._dst, self._name))

    def __exit__(self, *exception: object) -> None:
        self._readers.close()
        if self._size:  # summed over the shards
            self._report.error[self._name] = (self._error / self._size) ** 0.5

    @property
    def n_views(self) -> int:
        return sum(self._lack.views(self._src.rows_of_shard(k)) for k in self.shards)

    def shard(self, shard: int) -> int:
        """Commits a shard with what DST has of it and what SRC adds; how many views SRC adds."""
        rows = self._src.rows_of_shard(shard)
        bad_here: dict[int, str] = {}
        ours, old = read_sound(self._from_dst, rows[self._kept[rows]], bad_here)
        wanted = self._lack.take[rows] | (np.isin(rows, list(bad_here)) & self._there[rows])
        taken = rows[wanted]
        new, bad = self._encoded(taken)
        theirs = [row for row in taken.tolist() if row not in bad]
        crcs = {row: int(crc_of(self._our_views[[row]])[0]) for row in ours}
        crcs |= {row: int(crc_of(self._their_views[[row]])[0]) for row in theirs}
        skipped = rows[(self._lack.skip | self._was_skipped)[rows] & ~np.isin(rows, list(crcs))].tolist()
        self._dst.write_shard(
            shard,
            view_crcs=crcs,
            skipped=dict.fromkeys(skipped, "skipped in the store that this one was recoded from"),
            features={self._name: joined(ours, old, theirs, new)},
            provenance={"recoded_from": self._old.codec, "recoded": theirs, "torch": torch.__version__},
            left=set(rows.tolist()) - set(crcs) - set(skipped),
        )
        bad |= {row: f"in {self._dst.path}: {why}" for row, why in bad_here.items() if not self._there[row]}
        with self._lock:
            if bad:
                named = {self._src.describe(row): why for row, why in bad.items()}
                self._report.damaged.setdefault(self._name, {}).update(named)
            self._report.views[self._name] = self._report.views.get(self._name, 0) + len(theirs)
            self._report.bytes_read += len(taken) * self._old.bytes_per_view
        return self._lack.views(rows)

    def _encoded(self, rows: np.ndarray) -> tuple[dict[str, np.ndarray], dict[int, str]]:
        """The new arrays of `rows`, and why some of them are not among these."""
        bad: dict[int, str] = {}
        parts: dict[str, list[np.ndarray]] = {a.name: [] for a in self._new.arrays}
        for start in range(0, len(rows), AT_A_TIME):
            some, arrays = read_sound(self._from_src, rows[start : start + AT_A_TIME], bad)
            if not some:
                continue
            stored = {name: torch.from_numpy(values) for name, values in arrays.items()}
            if self._new.codec == self._old.codec:
                new = stored
            else:
                values = self._old.decode(stored, device=torch.device("cpu"))
                new = self._new.encode(values, rows=some)
                if start == 0:
                    self._measure(values[:1], {name: part[:1] for name, part in new.items()})
            for name, part in new.items():
                parts[name].append(part.numpy())
        return {
            a.name: np.concatenate(parts[a.name]) if parts[a.name] else np.empty((0, *a.shape), a.dtype)
            for a in self._new.arrays
        }, bad

    def _measure(self, values: torch.Tensor, encoded: Mapping[str, torch.Tensor]) -> None:
        spread = torch.from_numpy(self._new.std).clamp(min=STD_FLOOR)
        z = (values - torch.from_numpy(self._new.mean)) / spread
        error = (self._new.decode(encoded, device=torch.device("cpu")) - values) / spread
        with self._lock:
            self._error += float(error.square().sum(dtype=torch.float64))
            self._size += float(z.square().sum(dtype=torch.float64))


def _lack(src: FeatureStore, dst: FeatureStore | None, name: str) -> _Lack:
    """What SRC has of a teacher and DST (None: not made yet) has not."""
    take, skip = src.usable([name]), state_of(src.status(name)) == SKIPPED
    if dst is not None:
        take &= ~dst.usable([name])
        skip &= state_of(dst.status(name)) == TODO
    return _Lack(take, skip)


def _shape(src: FeatureStore, name: str) -> tuple[int, int]:
    spec = src.teacher(name).spec
    return spec.tokens, spec.dim


def _conclude(src: FeatureStore, dst: FeatureStore, names: Sequence[str], report: RecodeReport) -> None:
    """What the new store has now, and what it lacks because the source does."""
    for name in names:
        state = state_of(dst.status(name))
        n = int((state == DONE).sum())
        report.bytes_before += n * src.teacher(name).bytes_per_view
        report.bytes_after += n * dst.teacher(name).bytes_per_view
        if skipped := int((state == SKIPPED).sum()):
            report.skipped[name] = skipped
        if lacking := int((state == TODO).sum()) - len(report.damaged.get(name, ())):
            report.lacking[name] = lacking
