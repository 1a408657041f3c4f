"""Behind `rsmtdf cache verify` and `rsmtdf cache repair`: check, withdraw, and compute again, as data and as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsmtdf.cli.terminal import Bar, say
from rsmtdf.errors import RsmtdfError, StoreError
from rsmtdf.objects import StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.store.damage import Damage
from rsmtdf.store.repair import RepairReport, repair
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.twins import damaged_files
from rsmtdf.store.verify import VerifyReport, verify

if TYPE_CHECKING:
    from rsmtdf.stages.care import LiveCheck

_SUM = re.compile(r"\b[0-9a-f]{8}\b")
FEW = 3
"""Views of a file with the same thing wrong that are named one by one."""
SHOWN = 20
"""Findings of one kind that are printed."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """What the command line says of images and teachers; the store's own record says the rest."""

    root: Path | None = None
    config: Path | None = None
    device: str = "auto"
    workers: int | None = None


def verify_store(path: StorePath, *, live: int, means: Means, stop: StopFlag) -> tuple[dict[str, Any], str]:
    """Checks a store without changing it, and with `live` that many views of each teacher against the teacher."""
    with Bar("checking", unit="B") as bar:
        report = verify(path, stop=stop, progress=bar.update_to)
    lines = _found_text(report)
    result = report.as_dict()
    if live and report.is_sound:
        from rsmtdf.cli.recompute import compare

        checks = compare(FeatureStore.open(path), live, means, stop)
        result["live"] = {name: check.as_dict() for name, check in checks.items()}
        result["sound"] = all(check.is_sound for check in checks.values())
        lines += [line for name, check in checks.items() for line in _live_text(name, check)]
    elif live:
        lines.append("live       not done: the store is damaged, repair it first")
    if not report.is_sound:
        lines.append(f"next       rsmtdf cache repair {path}")
    return result, "\n".join(lines)


def repair_store(
    path: StorePath, *, means: Means, stop: StopFlag, dry_run: bool = False, withdraw_only: bool = False
) -> tuple[dict[str, Any], str]:
    """Puts a store in order and computes what it lacks; `result["failed"]` says whether something is left to do."""
    with Bar("checking", unit="B") as bar:
        if dry_run:
            report = RepairReport(found=verify(path, stop=stop, progress=bar.update_to))
        else:

            def before(found: VerifyReport) -> None:
                pixels = found.pixels is None or found.pixels.is_complete
                if not withdraw_only and not (found.is_sound and found.is_complete and pixels):
                    _require_means(path, means)

            report = repair(path, stop=stop, progress=bar.update_to, before=before)
    found = report.found
    result: dict[str, Any] = {"store": str(path), **report.as_dict(), "computed": {}, "missing": {}}
    lines = _found_text(found)
    lines += _several("repaired", report.repaired)
    lines += [f"withdrawn  teacher {name}: {len(rows):,} views" for name, rows in report.withdrawn.items()]
    if report.withdrawn_pixels:
        lines.append(f"withdrawn  stored pixels: {len(report.withdrawn_pixels):,} views")
    lines += _several("NOT REPAIRED", [d.text() for d in report.not_repaired])
    if report.not_repaired:
        lines.append(
            "next       restore these files from a copy of the store, then repair it again; nothing was computed"
        )
        result["failed"] = True
    elif dry_run or withdraw_only:
        result["failed"] = not found.is_sound
        if dry_run:
            lines += _plan_text(path, found)
        elif report.withdrawn or report.withdrawn_pixels:
            lines.append(f"next       rsmtdf cache repair {path}, which computes what was withdrawn")
    else:
        from rsmtdf.cli.recompute import compute, make_pixels

        try:
            store = FeatureStore.open(path, writable=True)
            computed, missing = compute(store, means, stop)
            pixels_made, without_pixels = make_pixels(store, means, stop)
            missing = without_pixels | missing
        except RsmtdfError:
            say("\n".join(lines))  # what was found and done must not be lost with what could not be
            raise
        result |= {"computed": dict(computed.features), "missing": missing, "failed": bool(missing)}
        result["pixels_stored"] = pixels_made
        lines += [f"computed   teacher {name}: {n:,} views" for name, n in computed.features.items()]
        if pixels_made:
            lines.append(f"stored     pixels of {pixels_made:,} views")
        lines += _several("missing", [f"view {view}: {why}" for view, why in missing.items()])
        lines.append(
            f"{len(missing):,} views stay missing; once their images are as they were, repair the store again"
            if missing
            else "the store is sound and complete"
        )
    return result, "\n".join(lines)


def _require_means(path: StorePath, means: Means) -> None:
    """Refuses a repair whose images or teachers are not at hand, while nothing is changed yet."""
    from rsmtdf.cli.recompute import require_images

    try:
        store = FeatureStore.open(path)
    except StoreError:
        return  # only once the store can be opened again, it says what it was made by
    require_images(store, means)


def _found_text(report: VerifyReport) -> list[str]:
    state = "sound" if report.is_sound else f"DAMAGED: {len(report.damage):,} findings"
    skipped = max((t.skipped for t in report.teachers.values()), default=0)
    whole = "complete" if report.is_complete else "incomplete"
    if report.is_complete and skipped:
        whole = f"complete but for {skipped:,} skipped view(s); cache repair tries them again"
    size, rate = report.bytes_read / 1e9, report.bytes_read / max(report.seconds, 1e-9) / 1e9
    lines = [
        f"store      {report.store}: {state}, {whole}",
        f"read       {size:.2f} GB in {report.seconds:.1f} s ({rate:.2f} GB/s, {report.threads} threads)",
    ]
    parts = [(f"teacher    {name}", t) for name, t in report.teachers.items()]
    parts += [] if report.pixels is None else [("pixels     stored", report.pixels)]
    for what, t in parts:
        missing = t.total - t.done - t.skipped
        lines.append(
            f"{what}: {t.checked:,} views checked, {t.done:,} of {t.total:,} done"
            + (f", {t.skipped:,} skipped" if t.skipped else "")
            + (f", {missing:,} to do" if missing else "")
        )
    lines += _several("damaged", [f"store {report.store}, {line}" for line in _by_file(report.damage)])
    return lines + _several("remark", report.remarks)


def _plan_text(path: StorePath, found: VerifyReport) -> list[str]:
    lines = [f"would do   restore {file} from its second copy" for file in _restorable(path)]
    derived = [d for d in found.damage if d.kind in {"metadata", "seal", "note", "twin"}]
    lines += [f"would do   write again, or drop, {d.file}" for d in derived[:SHOWN]]
    for name, t in found.teachers.items():
        damaged = sum(d.kind == "features" and d.teacher == name for d in found.damage)
        if n := damaged + t.total - t.done:
            lines.append(f"would do   teacher {name}: compute {n:,} views")
    if (kept := found.pixels) is not None:
        damaged = sum(d.kind == "pixels" and d.row is not None for d in found.damage)
        if n := damaged + kept.total - kept.done - kept.skipped:
            lines.append(f"would do   store the pixels of {n:,} views")
    if any(d.kind in {"manifest", "teacher"} for d in found.damage):
        lines.append("would do   check again what could not be looked at without these files, and repair that too")
    return lines or ["would do   nothing"]


def _restorable(path: StorePath) -> list[str]:
    try:
        return damaged_files(path)
    except StoreError:
        return []  # neither the root nor its copy


def _live_text(name: str, check: LiveCheck) -> list[str]:
    line = f"live       {name}: {check.compared} views made again"
    if check.cosine:
        line += (
            f": cosine mean {np.mean(check.cosine):.6f}, min {min(check.cosine):.6f}; max abs difference "
            f"{check.max_abs_difference:.3g}; relative L2 error {np.mean(check.relative_error):.2%}"
        )
    lines = [line]
    if not check.is_same_teacher:
        lines.append(
            f"NOT THIS TEACHER'S  {name}: a cosine is below {check.min_cosine:g}; weights, library or device have "
            "changed, or the store was made otherwise than it says"
        )
    lines += _several("OTHER PIXELS", check.other_pixels)
    lines += _several("unreadable", [f"view {view}: {why}" for view, why in check.unreadable.items()])
    draws = [f"view {view}: {', '.join(fields)}" for view, fields in check.other_draws.items()]
    return lines + _several("warning", [f"stored parameters are not today's draw: {line}" for line in draws])


def _by_file(damage: Sequence[Damage]) -> list[str]:
    """One line per finding, and one per file where many of its views have the same kind of thing wrong."""
    same: dict[tuple[str, str], list[Damage]] = {}
    for d in damage:
        same.setdefault((str(d.file), _SUM.sub("...", d.what)), []).append(d)
    lines = []
    for (file, what), some in same.items():
        rows = [d.row for d in some if d.row is not None]
        if len(rows) > FEW:
            span = f"{len(rows):,} views (rows {min(rows)} to {max(rows)})"
            what_of = "stored pixels" if some[0].teacher is None else f"teacher {some[0].teacher!r}"
            lines.append(f"{what_of}, {span}, file {file}: {what}")
        else:
            lines += [d.text() for d in some]
    return lines


def _several(label: str, found: Sequence[str]) -> list[str]:
    lines = [f"{label:<10} {line}" for line in found[:SHOWN]]
    if (more := len(found) - SHOWN) > 0:
        lines.append(f"{label:<10} and {more:,} more (--json lists all)")
    return lines
