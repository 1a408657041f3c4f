"""Committing one shard: data files first, then the views' status words, then each teacher's, each step durable.

Whoever is killed in between leaves either an undone shard, whose files the next writer replaces, or a done one. A
shard that is rewritten loses its done words before its data change.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rsmtdf.errors import StoreError, StoreMismatch
from rsmtdf.objects import ObjectPath, StorePath
from rsmtdf.store.checksum import crc32c
from rsmtdf.store.manifest import PIXELS, signed
from rsmtdf.store.places import put
from rsmtdf.store.segments import covered_rows, shard_runs
from rsmtdf.store.shards import shard_name, write_shard_file
from rsmtdf.store.status import DONE, HOLE, SKIPPED, TODO, StatusArray, crc_of, state_of, word
from rsmtdf.store.stored_teacher import StoredTeacher, require_own_layout

if TYPE_CHECKING:
    from rsmtdf.store.store import FeatureStore

Features = torch.Tensor | np.ndarray | Mapping[str, torch.Tensor | np.ndarray]
"""Features [k, tokens, dim], or what `StoredTeacher.encode` made of them."""


def commit_shard(
    store: FeatureStore,
    shard: int,
    *,
    view_crcs: Mapping[int, int],
    skipped: Mapping[int, str],
    features: Mapping[str, Features],
    provenance: Mapping[str, Any],
    left: Collection[int] = (),
) -> int:
    """Writes and commits a shard that the caller owns; see `FeatureStore.write_shard`."""
    rows = store.rows_of_shard(shard).tolist()
    _check_cover(store, shard, rows, [*view_crcs, *skipped, *left])
    present = [r for r in rows if r in view_crcs]
    views = store.view_status_array
    old_words = views.read_shard(shard)
    first = shard * store.shard_views
    _check_pixels(store, {r: int(old_words[r - first]) for r in present}, view_crcs)
    teachers = {name: store.teacher(name) for name in features}
    for teacher in teachers.values():
        require_own_layout(teacher)
    encoded = {name: _encoded(t, features[name], present) for name, t in teachers.items()}

    view_words = np.full(store.shard_views, word(HOLE), np.uint64)
    for row in rows:
        if row in view_crcs:
            view_words[row - first] = word(DONE, int(view_crcs[row]))
        elif state_of(old_words)[row - first] == DONE:
            view_words[row - first] = old_words[row - first]
        else:
            view_words[row - first] = word(TODO if row in left else SKIPPED)

    written = 0
    try:
        words: dict[str, np.ndarray] = {}
        for name, teacher in teachers.items():
            _withdraw(store, teacher.status, shard, keep=_unchanged(teacher, shard, present, encoded[name]))
            n, sums = _write_arrays(teacher, shard, present, encoded[name], first)
            words[name] = np.full(store.shard_views, word(HOLE), np.uint64)
            for row in rows:
                absent = word(TODO if row in left else SKIPPED)
                words[name][row - first] = word(DONE, sums[row]) if row in sums else absent
            note = {"shard": shard, "views": len(present), "bytes": n, "skipped": _text_keys(skipped), **provenance}
            _write_note(store.path, name, shard, note)
            written += n
        store.claims.still_held()
        if not np.array_equal(view_words, old_words):
            _break_seal(store, views, shard)
            views.write_shard(shard, view_words)
        for name, teacher in teachers.items():
            teacher.status.write_shard(shard, words[name])
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"shard {shard} of feature store {store.path} could not be written: {error.strerror} "
            f"({error.filename or 'temporary file'}); nothing half-written counts, what was committed before is "
            "untouched. Free space or fix the disk, then run the same command again: it goes on from here"
        ) from error
    return written


def withdraw_shard(store: FeatureStore, shard: int, teacher: str) -> None:
    """Marks a teacher's shard as not done, durably: the first step of a repair."""
    _withdraw(store, store.teacher(teacher).status, shard)


def _withdraw(store: FeatureStore, status: StatusArray, shard: int, *, keep: list[int] | None = None) -> None:
    """Sets a shard's committed words to todo before its data change, but for the slots whose bytes stay as they are."""
    words = status.read_shard(shard)
    committed = np.isin(state_of(words), (DONE, SKIPPED))
    committed[keep or []] = False
    if committed.any():
        _break_seal(store, status, shard)
        store.claims.still_held()
        status.write_shard(shard, np.where(committed, np.uint64(word(TODO)), words))


def _unchanged(teacher: StoredTeacher, shard: int, present: list[int], encoded: Mapping[str, np.ndarray]) -> list[int]:
    """The slots that are done and get the same bytes again: a kill while a shard is mended costs no sound view."""
    words, first = teacher.status.read_shard(shard), shard * teacher.shard_views
    done = state_of(words) == DONE
    slots = []
    for j, row in enumerate(present):
        if done[row - first]:
            crc = 0
            for array in teacher.arrays:
                crc = crc32c(encoded[array.name][j], start=crc)
            if crc == crc_of(words)[row - first]:
                slots.append(row - first)
    return slots


def _break_seal(store: FeatureStore, status: StatusArray, shard: int) -> None:
    if status.is_sealed(shard):
        with store.locked():
            status.unseal(shard)


def _write_arrays(
    teacher: StoredTeacher, shard: int, present: list[int], encoded: Mapping[str, np.ndarray], first: int
) -> tuple[int, dict[int, int]]:
    """Writes a shard of each of a teacher's arrays; bytes written, and per row the crc over all arrays in order."""
    total = 0
    sums: dict[int, int] = dict.fromkeys(present, 0)
    for k, array in enumerate(teacher.arrays):
        slots: list[np.ndarray | None] = [None] * teacher.shard_views
        for j, row in enumerate(present):
            slots[row - first] = encoded[array.name][j]
        file = teacher.path / array.name / shard_name(shard, 1 + len(array.shape))
        n, slot_sums = write_shard_file(file, slots)
        total += n
        for j, row in enumerate(present):
            # The first array's sum is its chunk's; the others continue from it.
            sums[row] = crc32c(encoded[array.name][j], start=sums[row]) if k else slot_sums[row - first]
    return total, sums


def _encoded(teacher: StoredTeacher, features: Features, present: list[int]) -> dict[str, np.ndarray]:
    """Host arrays [k, ...] by name, of the stored dtypes.

    Raises:
        StoreError: shapes or dtypes do not fit the teacher, or a value cannot be stored.
    """
    if not isinstance(features, Mapping):
        tensor = features if isinstance(features, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(features))
        features = teacher.encode(tensor, rows=present)
    out: dict[str, np.ndarray] = {}
    for array in teacher.arrays:
        found = features.get(array.name)
        if found is None:
            raise StoreError(f"encoded features of teacher {teacher.name!r} lack the array {array.name!r}")
        values = found.detach().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
        if values.shape != (len(present), *array.shape) or values.dtype.name != array.dtype:
            raise StoreError(
                f"array {array.name!r} of teacher {teacher.name!r} is {values.dtype} {values.shape}, expected "
                f"{array.dtype} {(len(present), *array.shape)}: one entry per view that is not skipped, rows ascending"
            )
        out[array.name] = np.ascontiguousarray(values)
    return out


def _check_cover(store: FeatureStore, shard: int, rows: list[int], given: Sequence[int]) -> None:
    if sorted(given) != rows:
        lacking = sorted(set(rows) - set(given))
        raise StoreError(
            f"shard {shard} of feature store {store.path} has {len(rows)} views; a commit must give each of them "
            f"once, written, skipped or left (lacking: {lacking[:5]}, unknown or doubled: "
            f"{sorted(set(given) - set(rows))[:5] or len(given) - len(set(given))})"
        )


def _check_pixels(store: FeatureStore, old: Mapping[int, int], view_crcs: Mapping[int, int]) -> None:
    """A view that another teacher has seen must have the same pixels now."""
    for row, value in old.items():
        words = np.array([value], np.uint64)
        if state_of(words)[0] == DONE and int(crc_of(words)[0]) != int(view_crcs[row]):
            raise StoreMismatch(
                f"view {store.describe(row)} of feature store {store.path} has other pixels than when it was first "
                f"cached: checksum expected {int(crc_of(words)[0]):08x}, found {int(view_crcs[row]):08x}. The image "
                "has changed, or another JPEG decoder or Pillow version reads it differently; use the environment "
                "the store was written in (`rsmtdf cache info`), or write a new store"
            )


def _write_note(path: StorePath, teacher: str, shard: int, note: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(note, default=str))
    put(path / "provenance" / teacher / f"{shard}.json", json.dumps(signed(plain)).encode())


def _text_keys(skipped: Mapping[int, str]) -> dict[str, str]:
    return {str(row): reason for row, reason in skipped.items()}


def clean_partials(store: FeatureStore) -> int:
    """Removes temporary files of writers that died; see `FeatureStore.clean_partials`."""
    if isinstance(store.path, ObjectPath):
        return 0  # a put that was cut short leaves nothing
    removed = 0
    for file in store.path.rglob("*.partial"):
        shard = _shard_of(file)
        with contextlib.ExitStack() as stack:
            try:
                # The caller holds the mutex, so metadata's leftovers have no owner; shards may have one.
                stack.enter_context(store.claims.claim([shard]) if shard is not None else contextlib.nullcontext())
            except StoreError:
                continue
            file.unlink(missing_ok=True)
            removed += 1
    return removed


def _shard_of(file: Path) -> int | None:
    """The shard that a temporary file of features, status or provenance belongs to."""
    parts = file.name.split(".")
    if file.parent.parent.name == "provenance" and parts[0].isdigit():
        return int(parts[0])
    is_shard = parts[0] == "c" and len(parts) > 1 and parts[1].isdigit()
    # Columns have chunk files of the same names, but change under the mutex only.
    owned = file.parent.name == "status" or file.parent.parent.parent.name == "teachers"
    owned |= file.parent.parent.name == PIXELS
    return int(parts[1]) if is_shard and owned else None


def seal_finished(store: FeatureStore) -> None:
    """Seals the finished segments; see `FeatureStore.seal`. The caller holds the mutex."""
    real = covered_rows(store.segments, store.n_rows)
    ranges: list[tuple[int, int]] = []
    with contextlib.ExitStack() as stack:
        for start, stop in shard_runs(store.segments, store.shard_views):
            with contextlib.suppress(StoreError):
                # Claimed until all is written, or a repair could withdraw a shard behind our back.
                stack.enter_context(store.claims.claim(range(start // store.shard_views, stop // store.shard_views)))
                ranges.append((start, stop))
        store.claims.still_held()
        for array in (store.view_status_array, *(t.status for t in store.teachers.values())):
            finished = np.isin(state_of(array.read(store.n_rows)), (DONE, SKIPPED)) | ~real
            array.seal([r for r in ranges if finished[slice(*r)].all()], store.n_rows)
