"""Behind `rsmtdf cache ...`: what a store holds, and its care, as data and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsmtdf.cli.terminal import Bar
from rsmtdf.signals import StopFlag
from rsmtdf.store.repair import repair
from rsmtdf.store.store import FeatureStore

VIEWS_SHOWN = 20
"""Damaged views of a teacher that a repair prints."""


def store_info(path: Path) -> tuple[dict[str, Any], str]:
    """What a store holds, as data and as text."""
    info = FeatureStore.open(path).info()
    state = "complete" if info["complete"] else "INCOMPLETE: run rsmtdf cache-features again"
    lines = [
        f"store      {info['path']} ({info['bytes'] / 1e9:.2f} GB), {state}",
        f"identity   {info['identity'][:16]}  data set {info['dataset']}, images at {info['data_root']}",
        f"made by    {', '.join(f'{name} {version}' for name, version in info['versions'].items())}",
        f"views      {info['views']:,} of {info['tiles']:,} tiles in {info['shards']:,} shards"
        + (f"; {info['views_skipped']:,} skipped (unreadable)" if info["views_skipped"] else ""),
    ]
    for segment in info["segments"]:
        last = segment["seed_start"] + segment["seeds"] - 1
        seeds = f"seed {last}" if segment["seeds"] == 1 else f"seeds {segment['seed_start']}-{last}"
        lines.append(
            f"  {segment['stream']:<8} {seeds}, generation {segment['generation']}: {segment['tiles']:,} tiles, "
            f"{segment['rows']:,} views"
        )
    for name, teacher in info["teachers"].items():
        spec, massive = teacher["spec"], teacher["statistics"].get("outlier_channels", [])
        lines.append(
            f"teacher    {name}: {teacher['done']:,} of {info['views']:,} views, {spec['grid'][0]}x{spec['grid'][1]} "
            f"tokens of {spec['dim']}, {teacher['codec']}, {teacher['bytes_per_view'] / 1e6:.2f} MB a view"
            + (f"; {len(massive)} massive channels" if massive else "")
        )
    return info, "\n".join(lines)


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
