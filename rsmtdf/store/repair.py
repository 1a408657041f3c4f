"""Repair: what `verify` finds is written again where the manifest says how, and withdrawn where it must be computed.

Nothing is recomputed here and no sound view is touched: the words of damaged views are set to do, durably and before
anything else, and stage 1 then finds these views missing. What follows from nothing else in the store (the manifest,
teachers' attributes and statistics, columns, tile ids) comes from its second copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rsmtdf.errors import StoreCorrupt, StoreError
from rsmtdf.objects import StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.store.arrays import METADATA, write_metadata
from rsmtdf.store.audit import Contents, check_tables, expected_metadata, read_contents
from rsmtdf.store.damage import Damage
from rsmtdf.store.leases import for_writing, locks_of
from rsmtdf.store.places import explained, remove
from rsmtdf.store.status import DONE, HOLE, SKIPPED, TODO, StatusArray, state_of, word
from rsmtdf.store.store import LOCK_TIMEOUT_S, FeatureStore
from rsmtdf.store.twins import keep_twins, restore_twins, twins_state
from rsmtdf.store.verify import Progress, VerifyReport, is_view, verify

_IRREPLACEABLE = ("manifest", "teacher", "table")
_HIDING = ("manifest", "teacher")
"""Damage behind which other damage cannot be seen."""


@dataclass(kw_only=True)
class RepairReport:
    """What `repair` found and did."""

    found: VerifyReport
    withdrawn: dict[str, list[int]] = field(default_factory=dict)
    """Teacher -> rows to be computed again, ascending."""
    withdrawn_pixels: list[int] = field(default_factory=list)
    """Rows whose stored pixels are to be made again, ascending."""
    repaired: list[str] = field(default_factory=list)
    """Files that were written again or dropped, and why."""
    not_repaired: list[Damage] = field(default_factory=list)
    """Damage that nothing in the store can undo."""

    @property
    def is_sound(self) -> bool:
        """Whether nothing was wrong."""
        return self.found.is_sound

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "found": self.found.as_dict(),
            "withdrawn": self.withdrawn,
            "withdrawn_pixels": self.withdrawn_pixels,
            "repaired": self.repaired,
            "not_repaired": [d.as_dict() for d in self.not_repaired],
        }


def repair(
    path: StorePath,
    *,
    stop: StopFlag,
    progress: Progress = lambda done, total: None,
    before: Callable[[VerifyReport], None] = lambda found: None,
) -> RepairReport:
    """Verifies the store at `path` and puts it in order: whatever is then called done is sound.

    Args:
        path: the store; nobody may be writing to it meanwhile.
        stop: ends the check between shards; nothing was changed then.
        progress: told bytes checked, and bytes in all.
        before: called with what was found, before anything is changed; an error it raises ends the repair there.

    Raises:
        StoreNotFound: there is no store.
        StoreError: somebody is writing to it, it cannot be written, or its format is of another version.
        Interrupted: a signal came.
    """
    path = for_writing(path)
    read_contents(path)  # whatever its state, it is a store
    locks = locks_of(path)  # a damaged store could not be opened
    with explained(path), locks.mutex(timeout_s=LOCK_TIMEOUT_S), locks.all_shards(purpose="repair"):
        found = verify(path, stop=stop, progress=progress)
        before(found)
        report = RepairReport(found=found)
        if any(d.kind in _IRREPLACEABLE for d in found.damage):
            locks.still_held()
            _restore(path, report)
            if any(d.kind in _HIDING for d in found.damage):
                # Only now can the rest be looked at.
                rest = verify(path, stop=stop, progress=progress)
                found.damage += [d for d in rest.damage if d not in found.damage]
                found.teachers = rest.teachers
                found.bytes_read, found.seconds = found.bytes_read + rest.bytes_read, found.seconds + rest.seconds
        contents = read_contents(path)
        if isinstance(contents, Damage):
            report.not_repaired = [contents]
        else:
            _Mender(contents, report, still_held=locks.still_held).mend()
    if report.repaired:
        with contextlib.suppress(StoreError):  # of what cannot be opened yet, nothing is sealed
            FeatureStore.open(path, writable=True).seal()
    return report


def _restore(path: StorePath, report: RepairReport) -> None:
    """Takes what nothing can recompute from its second copy."""
    with contextlib.suppress(StoreCorrupt):  # not even the copy of the manifest is sound
        for file in restore_twins(path):
            late = "; what the very last change added may have to be added again" if file == METADATA else ""
            report.repaired.append(f"{path / file}: restored from its second copy{late}")


class _Mender:
    """Acts on each kind of damage; the caller owns the store and all its shards."""

    def __init__(self, contents: Contents, report: RepairReport, *, still_held: Callable[[], None]) -> None:
        self._contents, self._report, self._still_held = contents, report, still_held
        self._real = is_view(contents)
        self._rows: dict[str, set[int]] = {name: set() for name in contents.teachers}
        per = contents.manifest.shard_views
        self._views = StatusArray(path=contents.path / "views" / "status", shard_views=per)

    def mend(self) -> None:
        """Everything that was found, in an order in which a kill at any moment leaves no damaged view called done."""
        by_kind: dict[str, list[Damage]] = {}
        for damage in self._report.found.damage:
            by_kind.setdefault(damage.kind, []).append(damage)
        self._statuses([*by_kind.get("seal", []), *by_kind.get("status", [])])
        # Nothing can be written into an archive, so its damaged views stay named, and readers refuse them.
        foreign = self._report.found.foreign
        self._features(d for d in by_kind.get("features", []) if d.teacher not in foreign)
        self._report.not_repaired += [d for d in by_kind.get("features", []) if d.teacher in foreign]
        self._pixels(by_kind.get("pixels", []))
        self._metadata(by_kind.get("metadata", []))
        for damage in by_kind.get("note", []):
            remove(damage.file)
            self._did(damage, "removed, for nothing reads it back")
        path, manifest = self._contents.path, self._contents.manifest
        keep_twins(path, manifest)
        still = {path / name for name in twins_state(path, manifest)[0]}
        self._report.not_repaired += self._contents.damage
        self._report.not_repaired += check_tables(self._contents)
        for damage in by_kind.get("twin", []):
            if damage.file in still:
                self._report.not_repaired.append(damage)
            else:
                self._did(damage, "written again")
        self._report.withdrawn = {name: sorted(rows) for name, rows in self._rows.items() if rows}

    def _statuses(self, damage: Iterable[Damage]) -> None:
        broken = {d.teacher: [x for x in damage if x.teacher == d.teacher] for d in damage}
        for teacher, some in broken.items():
            self._still_held()
            status = self._views if teacher is None else self._contents.teachers[teacher].status
            if status.drop_damaged_seal():
                self._report.repaired.append(f"{status.sealed_file}: dropped, the chunk files beside it hold the same")
            rewritten, _ = status.mend(self._contents.manifest.n_rows)
            lines = [f"{status.chunk_file(k)}: written again from the sealed copy" for k in rewritten]
            self._report.repaired += lines
            for shard in sorted({d.shard for d in some if d.shard is not None} - set(rewritten)):
                self._lost(status, shard, [teacher] if teacher is not None else list(self._contents.teachers))

    def _lost(self, status: StatusArray, shard: int, teachers: Iterable[str]) -> None:
        """Withdraws a shard whose words are lost: of pixels, for every teacher, for nobody can tell any more whether
        a view made again is the one that the teachers saw.
        """
        rows = self._rows_of(shard)
        for name in teachers:
            other = self._contents.teachers[name].status
            if other.path != status.path:
                _withdraw(other, shard, range(other.shard_views))
            self._rows[name].update(rows)
        pixels = self._contents.pixels
        if pixels is not None and status.path == self._views.path:
            _withdraw(pixels.status, shard, range(status.shard_views))
            self._report.withdrawn_pixels = sorted({*self._report.withdrawn_pixels, *rows})
        words = np.full(status.shard_views, word(HOLE), np.uint64)
        words[[row - shard * status.shard_views for row in rows]] = word(TODO)
        if status.is_sealed(shard):
            status.unseal(shard)
        status.write_shard(shard, words)
        self._report.repaired.append(f"{status.chunk_file(shard)}: its views are to be computed again")

    def _features(self, damage: Iterable[Damage]) -> None:
        slots: dict[tuple[str, int], list[int]] = {}
        per = self._contents.manifest.shard_views
        for d in damage:
            if d.teacher is not None and d.shard is not None and d.row is not None:
                slots.setdefault((d.teacher, d.shard), []).append(d.row - d.shard * per)
        for (name, shard), some in slots.items():
            self._still_held()
            _withdraw(self._contents.teachers[name].status, shard, some)
            self._rows[name].update(shard * per + slot for slot in some)

    def _pixels(self, damage: Sequence[Damage]) -> None:
        """Withdraws stored pixels that are damaged, or whose words are lost."""
        if (pixels := self._contents.pixels) is None or not damage:
            return
        self._still_held()
        status, per = pixels.status, self._contents.manifest.shard_views
        if status.drop_damaged_seal():
            self._report.repaired.append(f"{status.sealed_file}: dropped, the chunk files beside it hold the same")
        rewritten, _ = status.mend(self._contents.manifest.n_rows)
        self._report.repaired += [f"{status.chunk_file(k)}: written again from the sealed copy" for k in rewritten]
        rows: set[int] = set()
        for shard in sorted({d.shard for d in damage if d.shard is not None}):
            bad = [d.row for d in damage if d.shard == shard and d.row is not None]
            if bad:
                _withdraw(status, shard, [row - shard * per for row in bad])
                rows.update(bad)
            elif shard not in rewritten:
                if status.is_sealed(shard):
                    status.unseal(shard)
                remove(status.chunk_file(shard))  # a shard without words is to do
                rows.update(self._rows_of(shard))
                self._report.repaired.append(f"{status.chunk_file(shard)}: its pixels are to be made again")
        self._report.withdrawn_pixels = sorted({*self._report.withdrawn_pixels, *rows})

    def _metadata(self, damage: Iterable[Damage]) -> None:
        expected = expected_metadata(self._contents)
        for d in damage:
            self._still_held()
            write_metadata(d.file.parent, expected[d.file.parent])
            self._did(d, "written again")

    def _rows_of(self, shard: int) -> list[int]:
        per = self._contents.manifest.shard_views
        return [int(row) for row in shard * per + np.flatnonzero(self._real[shard * per : (shard + 1) * per])]

    def _did(self, damage: Damage, what: str) -> None:
        self._report.repaired.append(f"{damage.file}: {damage.what}; {what}")


def _withdraw(status: StatusArray, shard: int, slots: Iterable[int]) -> None:
    """Sets the committed words of `slots` to do, durably. The caller holds the store's mutex and the shard."""
    words = status.read_shard(shard)
    mine = np.zeros(len(words), bool)
    mine[list(slots)] = True
    mine &= np.isin(state_of(words), (DONE, SKIPPED))
    if mine.any():
        if status.is_sealed(shard):
            status.unseal(shard)
        status.write_shard(shard, np.where(mine, np.uint64(word(TODO)), words))
