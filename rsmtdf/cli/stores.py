"""Behind `rsmtdf cache info`: what a store holds, as data and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsmtdf.store.store import FeatureStore


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
