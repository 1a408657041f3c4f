"""The store that a recoding fills: made with everything but features, or what an earlier call has made."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rsmtdf.errors import StoreError, StoreMismatch, StoreNotFound
from rsmtdf.files import PARTIAL
from rsmtdf.objects import StorePath
from rsmtdf.store.arrays import group_metadata, read_metadata, write_metadata
from rsmtdf.store.carry import RECODED_FROM
from rsmtdf.store.growth import make_whole
from rsmtdf.store.manifest import Manifest, differences, load
from rsmtdf.store.places import absolute, files, put, read_each
from rsmtdf.store.status import StatusArray
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import StoredTeacher, write_teacher


def open_target(src: FeatureStore, path: StorePath, chosen: Sequence[StoredTeacher], codec: str) -> FeatureStore:
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


def make_target(
    src: FeatureStore, path: StorePath, chosen: Sequence[StoredTeacher], codec: str, experiment: Mapping[str, Any]
) -> None:
    """Makes the store at `path` with everything but features. It appears whole or not at all."""
    manifest = load(src.path)
    words = src.view_status_array.read(src.n_rows)
    for name in src.column_names:
        src.column(name)  # compares the digests of what is copied
    _ = src.tile_ids

    def fill(place: StorePath) -> Manifest:
        for name in ("tiles", "views"):
            _copy_arrays(src.path / name, place / name)
        _write_words(dataclasses.replace(src.view_status_array, path=place / "views" / "status"), words)
        write_metadata(place / "teachers", group_metadata())
        write_metadata(place / "provenance", read_metadata(src.path / "provenance"))
        digests = {t.name: write_teacher(_recoded(t, place, codec), n_rows=src.n_rows) for t in chosen}
        return dataclasses.replace(manifest, experiment=experiment, teachers=digests, has_pixels=False)

    try:
        make_whole(path, fill)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot make a feature store at {path}: {error.strerror}; nothing is left there") from error


def _copy_arrays(source: StorePath, target: StorePath) -> None:
    """Copies a folder, durably, without the files of writers at work and without status words."""
    prefix = len(str(source)) + 1
    is_words = re.compile(r"status/(c\.\d+|sealed)")
    wanted = [f for f in files(source) if not f.name.endswith(PARTIAL) and not is_words.fullmatch(str(f)[prefix:])]
    for file, data in zip(wanted, read_each(wanted), strict=True):
        if data is not None:
            put(target / str(file)[prefix:], data)


def _write_words(status: StatusArray, words: np.ndarray) -> None:
    """Writes the chunks of status words as they were read: a damaged chunk may have been read from the sealed file."""
    for shard, part in enumerate(words.reshape(-1, status.shard_views)):
        if part.any():
            status.write_shard(shard, part)
