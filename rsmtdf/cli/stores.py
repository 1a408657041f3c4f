"""Behind `rsmtdf cache repair`: the care of a store, as data and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsmtdf.cli.terminal import Bar
from rsmtdf.signals import StopFlag
from rsmtdf.store.repair import repair

VIEWS_SHOWN = 20
"""Damaged views of a teacher that a repair prints."""


def repair_store(path: Path, *, stop: StopFlag) -> tuple[dict[str, Any], str]:
    """Checks a store and withdraws what is damaged; what was found, as data and as text."""
    with Bar("checking", unit="view") as bar:
        report = repair(path, stop=stop, progress=bar.update_to)
    lines = [f"store      {report.store}"]
    for name, teacher in report.teachers.items():
        damaged = f"{len(teacher.damaged):,} damaged" if teacher.damaged else "none damaged"
        shards = f"; {len(teacher.withdrawn):,} shard(s) withdrawn" if teacher.withdrawn else ""
        lines.append(f"teacher    {name}: {teacher.checked:,} views checked, {damaged}{shards}")
        lines += [f"  view {view}: {why}" for view, why in list(teacher.damaged.items())[:VIEWS_SHOWN]]
        if (more := len(teacher.damaged) - VIEWS_SHOWN) > 0:
            lines.append(f"  and {more:,} more (--json lists all)")
    lines += [f"status     {line}" for line in report.status]
    lines += [f"NOT REPAIRED  {line}" for line in report.not_repaired]
    if any(t.withdrawn for t in report.teachers.values()):
        lines.append(
            "next       rsmtdf cache-features, with the configuration (and options) that the store was made with and "
            f"--out {report.store}: it computes the withdrawn shards again, and nothing else that is there"
        )
    if report.is_sound:
        lines.append("nothing is wrong")
    return report.as_dict(), "\n".join(lines)
