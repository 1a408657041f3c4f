"""What stage 1 says when it ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsmtdf.cli.amounts import count_text, size_text, time_text
from rsmtdf.cli.pixels import pixels_text

SHOWN = 20
"""Unreadable tiles that the summary names."""


def summary_text(result: Mapping[str, Any]) -> str:
    """The end-of-run summary of stage 1."""
    lines = []
    if result["views"]:
        lines.append(
            f"cached     {count_text(result['views'], 'view')} in {time_text(result['seconds'])} "
            f"({result['views_per_second']:.1f} views/s), {size_text(result['bytes_written'])} written"
        )
        lines += [f"device     busy {result['device_busy']:.0%} of the time", f"limited by {_advice(result)}"]
    elif result["unreadable_tiles"]:
        lines.append("cached     nothing: every view is there, but those of unreadable tiles")
    else:
        lines.append("cached     nothing to do: every view is there")
    if "pixels" in result:
        lines.append(pixels_text(result["pixels"]))
    if result["left_out_tiles"]:
        lines.append(f"left out   {count_text(result['left_out_tiles'], 'tile')} with too few valid pixels")
    unreadable = result["unreadable_tiles"]
    if unreadable:
        lost = result["partners_lost"]
        tail = f"; {count_text(lost, 'view')} of other tiles lack{'s' * (lost == 1)} a partner" if lost else ""
        lines.append(
            f"failed     {count_text(len(unreadable), 'tile')} cannot be read{tail}; once mended, run this again"
        )
    for tile, reason in list(unreadable.items())[:SHOWN]:
        lines.append(f"unreadable {tile}: {reason}")
    if len(unreadable) > SHOWN:
        lines.append(f"unreadable and {len(unreadable) - SHOWN:,} more (--json lists them all)")
    if result.get("is_last_piece", True):
        lines.append(f"next       rsmtdf train --cache {result['store']}")
    return "\n".join(lines)


def _advice(result: Mapping[str, Any]) -> str:
    """What limited the run, and what would make it faster."""
    busy, what = result["busy_seconds"], result["limited_by"]
    if what == "views":
        making = max(busy["decode"] + busy["view"], 1e-9)
        decoding = busy["decode"] / making
        more = "; images on a faster disk, or in a format that decodes faster, help too" if decoding > 0.5 else ""
        return f"views: more --workers ({decoding:.0%} of their time is decoding images{more})"
    if what == "writing":
        return "writing: a faster disk for the store, or a smaller --codec"
    return (
        "teachers: a faster or a second device, a larger batch (--set cache.batch=N), or --precision bfloat16 "
        "(for a new store: it is part of what a teacher is)"
    )
