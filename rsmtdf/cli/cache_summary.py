"""What stage 1 says when it ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsmtdf.cli.pixels import pixels_text

SHOWN = 20
"""Unreadable tiles that the summary names."""


def summary_text(result: Mapping[str, Any]) -> str:
    """The end-of-run summary of stage 1."""
    lines = []
    if result["views"]:
        gb = result["bytes_written"] / 1e9
        lines.append(
            f"cached     {result['views']:,} views in {result['seconds']:.1f} s ({result['views_per_second']:.1f} "
            f"views/s, {gb:.2f} GB); limited by {result['limited_by']}"
        )
    elif result["unreadable_tiles"]:
        lines.append("cached     nothing: every view is there, but those of unreadable tiles")
    else:
        lines.append("cached     nothing to do: every view is there")
    if "pixels" in result:
        lines.append(pixels_text(result["pixels"]))
    if result["left_out_tiles"]:
        lines.append(f"left out   {result['left_out_tiles']:,} tiles with too few valid pixels")
    unreadable = result["unreadable_tiles"]
    if unreadable:
        tail = f"; {result['partners_lost']:,} views of other tiles lack a partner" if result["partners_lost"] else ""
        lines.append(f"failed     {len(unreadable):,} tiles cannot be read{tail}; once mended, run this again")
    for tile, reason in list(unreadable.items())[:SHOWN]:
        lines.append(f"unreadable {tile}: {reason}")
    if len(unreadable) > SHOWN:
        lines.append(f"unreadable and {len(unreadable) - SHOWN:,} more (--json lists them all)")
    lines.append(f"next       rsmtdf train --cache {result['store']}")
    return "\n".join(lines)
