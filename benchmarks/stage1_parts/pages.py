"""Figures as Markdown tables, put between two marks of a page, and where they were measured."""

from __future__ import annotations

import datetime as dt
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def put_between(page: Path, script: str, text: str) -> None:
    """Replaces what stands in `page` between the marks of `script`.

    Raises:
        SystemExit: the marks are not there.
    """
    begin, end = (f"<!-- tables of benchmarks/{script}: {edge} -->" for edge in ("begin", "end"))
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page} lacks the lines {begin} and {end}, between which the tables belong")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def machine(device: torch.device | None = None) -> str:
    """Where, with which versions and under which load."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())
    gpu = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else "no GPU used"
    return (
        f"{dt.datetime.now(tz=dt.UTC).date().isoformat()}; {os.cpu_count()} cores of an {cpu}, {gpu}; Python "
        f"{platform.python_version()}, torch {torch.__version__}; load average {os.getloadavg()[0]:.1f}."
    )
