"""The plan as a person reads it: a few lines for a terminal."""

from __future__ import annotations

import math

from rsmtdf.stages.plan.pace import Estimate
from rsmtdf.stages.plan.plan import Outlook, Plan
from rsmtdf.stages.plan.units import count_text, duration_text, size_text


def plan_text(plan: Plan) -> str:
    """Tiles, views, bytes by codec and teacher, files, time, and what training will need."""
    streams = " + ".join(f"{n:,} {stream}" for stream, n in plan.views.items() if n) or "none"
    total = sum(plan.views.values())
    free = "no limit known there" if plan.free_bytes is None else f"{size_text(plan.free_bytes)} free"
    files = count_text(sum(plan.new_files.values()), "file")
    lines = [
        f"tiles      {plan.pool_tiles:,} in the pool, {plan.labelled_tiles:,} labelled",
        f"views      {streams} = {count_text(total, 'view')}; {plan.new_views:,} to compute",
        *_codec_table(plan),
        *_pixel_lines(plan),
        f"disk       {size_text(plan.new_bytes)} in {files} to write, {size_text(plan.store_bytes)} then; {free}",
        f"time       {'not measured' if plan.estimate is None else time_text(plan)}",
        *_training_lines(plan.outlook, plan.train.recipe),
    ]
    return "\n".join(lines)


def time_text(plan: Plan) -> str:
    """How long stage 1 takes, at what rate, and what limits it."""
    estimate, pace = plan.estimate, plan.pace
    if estimate is None or pace is None:
        return "not measured"
    if not plan.new_views:
        return "nothing to compute"
    rate = plan.new_views / max(estimate.seconds - estimate.start_seconds, 1e-9)
    about = f"{duration_text(estimate.seconds)} on {pace.device or 'this machine'} ({rate:,.1f} views/s)"
    unwritten = "" if pace.write is not None else "; writing not measured"
    return f"{about}, limited by {_limit_text(estimate)}{unwritten}"


def _codec_table(plan: Plan) -> list[str]:
    """What the finished store's features take up in each codec, for each teacher; the chosen one is marked."""
    names = list(plan.bytes_per_view)
    widths = [max(len(name), 9) for name in names]
    head = " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines = [f"codec      {'':6} {head} {'total':>9}"]
    for codec, sizes in plan.codec_bytes.items():
        cells = " ".join(f"{size_text(sizes[name]):>{width}}" for name, width in zip(names, widths, strict=True))
        mark = "  <- chosen" if codec == plan.codec else ""
        lines.append(f"           {codec:6} {cells} {size_text(sum(sizes.values())):>9}{mark}")
    return lines


def _pixel_lines(plan: Plan) -> list[str]:
    """What stored pixels add, where any are to be stored."""
    if not any(plan.new_pixels.values()):
        return []
    each = " or ".join(f"{size_text(n)} a {stream} view" for stream, n in plan.pixel_bytes.items())
    views = count_text(sum(plan.new_pixels.values()), "view")
    return [f"pixels     of {views} stored too: {size_text(plan.new_pixel_bytes)} ({each})"]


def _limit_text(estimate: Estimate) -> str:
    part = estimate.limited_by
    return {"processor": "the processor (all parts share it)", "writing": "the disk"}.get(part, f"the {part}")


def _training_lines(outlook: Outlook, recipe: str) -> list[str]:
    step = size_text(outlook.bytes_per_step)
    length = "" if outlook.steps is None else f"{count_text(outlook.steps, 'step')} of recipe {recipe}"
    if outlook.hours is not None and outlook.peak_bytes is not None:
        memory = f"{size_text(outlook.peak_bytes)} of memory on {outlook.memory_of}"
        training = f"{length}: about {duration_text(outlook.hours * 3600)}, {memory} (measured on one micro-batch)"
    else:
        training = f"{length or f'recipe {recipe}'}: time and memory not measured"
    if outlook.read_bytes_per_second is not None:
        reading = f"{size_text(outlook.read_bytes_per_second)}/s of features ({step} a step)"
    else:
        reading = f"{step} of features a step: that much a second at 1 step/s"
    if outlook.disk_bytes_per_second is not None:
        reading += f"; this disk read {size_text(outlook.disk_bytes_per_second)}/s"
    return [f"training   {training}", f"reading    {reading}", f"pays off   {_break_even_text(outlook)}"]


def _break_even_text(outlook: Outlook) -> str:
    if math.isinf(outlook.epochs_to_break_even):
        return "never: features take longer to read from this disk than these teachers take to compute them"
    runs = outlook.runs_to_break_even
    or_runs = "" if runs is None else f", or {runs:.1f} runs of this recipe,"
    return f"after {outlook.epochs_to_break_even:.1f} epochs{or_runs} against teachers in every training step"
