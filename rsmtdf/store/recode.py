"""The same store under another codec: features decoded, encoded and verified shard by shard.

Row numbers, columns, tiles, the views' sums and the channel statistics are carried over byte for byte, so a run can go
on with either store. The source is never written. What it lacks, or has damaged, stays to be done in the new one.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rsmtdf.errors import StoreError, StoreMismatch, StoreNotFound
from rsmtdf.files import PARTIAL
from rsmtdf.objects import StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.store.arrays import group_metadata, read_metadata, write_metadata
from rsmtdf.store.carry import RECODED_FROM, in_parallel, read_sound, require_space
from rsmtdf.store.codecs import STD_FLOOR, bytes_per_view, find_codec
from rsmtdf.store.growth import is_taken, make_whole
from rsmtdf.store.manifest import Manifest, differences, load
from rsmtdf.store.places import absolute, files, put, read_each
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.status import DONE, SKIPPED, TODO, crc_of, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import StoredTeacher, write_teacher

AT_A_TIME = 8
"""Views decoded at a time: a float32 view is four times one in int8, and only its encoded form waits for its shard."""


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
    """Teacher -> view in words -> what is wrong with it in the source."""
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
    dst = _opened(src, path, chosen, codec) if is_taken(path) else None
    work = {t.name: _wanted(src, dst, t.name) for t in chosen}
    require_space(path, sum(len(rows) * bytes_per_view(codec, *_shape(src, name)) for name, rows in work.items()))
    if dst is None:
        _make(src, path, chosen, codec, src.experiment if experiment is None else experiment)
        dst = FeatureStore.open(path, writable=True)
    dst.clean_partials()
    shards = {name: np.unique(rows // src.shard_views).tolist() for name, rows in work.items()}
    with dst.claim(sorted({k for some in shards.values() for k in some})):
        done, total = 0, sum(len(rows) for rows in work.values())
        for name in names:
            with FeatureReader(src, name) as reader:
                job = _TeacherJob(src=src, dst=dst, reader=reader, name=name, report=report)
                for views in in_parallel(job.shard, shards[name], threads, stop, path):
                    done += views
                    progress(done, total)
                job.finish()
    dst.seal()
    _conclude(src, dst, names, report)
    report.seconds = time.perf_counter() - begun
    return report


class _TeacherJob:
    """One teacher's shards, encoded anew from several threads."""

    def __init__(
        self, *, src: FeatureStore, dst: FeatureStore, reader: FeatureReader, name: str, report: RecodeReport
    ) -> None:
        self._src, self._dst, self._reader, self._name, self._report = src, dst, reader, name, report
        self._states = state_of(src.status(name))
        self._views = src.view_status()
        self._old, self._new = src.teacher(name), dst.teacher(name)
        self._lock = threading.Lock()
        self._error = self._size = 0.0

    def shard(self, shard: int) -> int:
        """Encodes a shard and commits it; how many views it took."""
        rows = self._src.rows_of_shard(shard)
        state = self._states[rows]
        there = rows[(state == DONE) & (state_of(self._views)[rows] == DONE)]
        skipped = rows[state == SKIPPED].tolist()
        encoded, bad = self._encoded(there)
        good = [row for row in there.tolist() if row not in bad]
        left = set(rows.tolist()) - set(good) - set(skipped)
        self._dst.write_shard(
            shard,
            view_crcs={row: int(crc_of(self._views[[row]])[0]) for row in good},
            skipped=dict.fromkeys(skipped, "skipped in the store that this one was recoded from"),
            features={self._name: encoded},
            provenance={"recoded_from": self._old.codec, "torch": torch.__version__},
            left=left,
        )
        with self._lock:
            if bad:
                named = {self._src.describe(row): why for row, why in bad.items()}
                self._report.damaged.setdefault(self._name, {}).update(named)
            self._report.views[self._name] = self._report.views.get(self._name, 0) + len(good)
            self._report.bytes_read += len(there) * self._old.bytes_per_view
        return len(there) + len(skipped)

    def finish(self) -> None:
        """Reports the error, which is summed over the shards."""
        if self._size:
            self._report.error[self._name] = (self._error / self._size) ** 0.5

    def _encoded(self, rows: np.ndarray) -> tuple[dict[str, np.ndarray], dict[int, str]]:
        """The new arrays of `rows`, and why some of them are not among these."""
        bad: dict[int, str] = {}
        parts: dict[str, list[np.ndarray]] = {a.name: [] for a in self._new.arrays}
        for start in range(0, len(rows), AT_A_TIME):
            some, arrays = read_sound(self._reader, rows[start : start + AT_A_TIME], bad)
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


def _wanted(src: FeatureStore, dst: FeatureStore | None, name: str) -> np.ndarray:
    """Rows that `src` has finished and `dst` has not."""
    state = state_of(src.status(name))
    there = (state == DONE) & (state_of(src.view_status()) == DONE) | (state == SKIPPED)
    if dst is not None:
        there &= state_of(dst.status(name)) == TODO
    return np.flatnonzero(there)


def _shape(src: FeatureStore, name: str) -> tuple[int, int]:
    spec = src.teacher(name).spec
    return spec.tokens, spec.dim


def _opened(src: FeatureStore, path: StorePath, chosen: Sequence[StoredTeacher], codec: str) -> FeatureStore:
    """The store at `path`, if it is what recoding `src` has begun.

    Raises:
        StoreMismatch: it is not.
    """
    if absolute(path) == absolute(src.path):
        raise StoreMismatch(f"{path} cannot be recoded into itself; give another DST")
    try:
        dst = FeatureStore.open(path, writable=True)
    except StoreNotFound as error:
        raise StoreMismatch(f"{path} exists and is not a feature store; give another DST") from error
    expected, found = (_rows_of(load(p)) for p in (src.path, path))
    lines = differences(expected, found)
    names = [t.name for t in chosen]
    if sorted(dst.teachers) != sorted(names):
        lines.append(f"teachers: expected {sorted(names)}, found {sorted(dst.teachers)}")
    for old in chosen:
        if new := dst.teachers.get(old.name):
            lines += [f"teacher {old.name}, {line}" for line in _teacher_differences(_recoded(old, path, codec), new)]
    if lines:
        raise StoreMismatch(
            f"{path} is not what recoding {src.path} to {codec} would go on with:\n  "
            + "\n  ".join(lines)
            + "\nGive another DST, or remove that one"
        )
    return dst


def _rows_of(manifest: Manifest) -> dict[str, Any]:
    """What two stores with the same rows have in common."""
    fields = ("identity", "shard_views", "n_rows", "tiles", "segments", "columns")
    return {k: v for k, v in manifest.to_json().items() if k in fields}


def _teacher_differences(expected: StoredTeacher, found: StoredTeacher) -> list[str]:
    lines = found.expect(expected.spec, expected.codec, expected.statistics.get("rule"))
    came = {"recoded from": expected.statistics[RECODED_FROM]}
    lines += differences(came, {"recoded from": found.statistics.get(RECODED_FROM)})
    if not (np.array_equal(expected.mean, found.mean) and np.array_equal(expected.std, found.std)):
        lines.append("channel statistics: other values")
    return lines


def _recoded(old: StoredTeacher, path: StorePath, codec: str) -> StoredTeacher:
    """The teacher as the store at `path` has it: the same but for the codec, and where its values came from."""
    came = [*old.statistics.get(RECODED_FROM, []), old.codec]
    return dataclasses.replace(
        old, path=path / "teachers" / old.name, codec=codec, statistics={**old.statistics, RECODED_FROM: came}
    )


def _make(
    src: FeatureStore, path: StorePath, chosen: Sequence[StoredTeacher], codec: str, experiment: Mapping[str, Any]
) -> None:
    """Makes the store at `path` with everything but features. It appears whole or not at all."""
    manifest = load(src.path)
    for name in src.column_names:
        src.column(name)  # compares the digests of what is copied
    _ = src.tile_ids

    def fill(place: StorePath) -> Manifest:
        for name in ("tiles", "views"):
            _copy_arrays(src.path / name, place / name)
        write_metadata(place / "teachers", group_metadata())
        write_metadata(place / "provenance", read_metadata(src.path / "provenance"))
        digests = {t.name: write_teacher(_recoded(t, place, codec), n_rows=src.n_rows) for t in chosen}
        return dataclasses.replace(manifest, experiment=experiment, teachers=digests)

    try:
        make_whole(path, fill)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot make a feature store at {path}: {error.strerror}; nothing is left there") from error


def _copy_arrays(source: StorePath, target: StorePath) -> None:
    """Copies a folder, durably, without the files of writers at work."""
    prefix = len(str(source)) + 1
    # The sealed words repeat those of the chunks.
    wanted = [f for f in files(source) if not f.name.endswith(PARTIAL) and f.name != "sealed"]
    for file, data in zip(wanted, read_each(wanted), strict=True):
        if data is not None:
            put(target / str(file)[prefix:], data)


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
