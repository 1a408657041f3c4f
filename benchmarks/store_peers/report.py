"""The figures as tables: Markdown for docs/benchmarks.md, and the same, stripped, for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from store_peers import machine

GOALS_BYTES = {"fp16": 2.63e6, "int8": 1.33e6, "int4": 0.75e6}
OURS = "rsmtdf, verified"
VERIFYING = "pread + crc32c (limit)"
"""What no reader that sums every byte can be faster than: a bare read, and the same checksum over it."""
_CHECKED = ("zarr-python", "tensorstore, crc32c", "HDF5, fletcher32")
"""Formats of peers that write a checksum per view."""
_READS = {
    "views_one": ("one view", "One random view at a time"),
    "views_batch": ("batches", "Batches of 16 random views"),
    "epochs": ("epochs", "Shuffled epochs, batches of 32"),
    "cold": ("cold", "One random view that is not in the page cache"),
}
"""Key of the figures -> in short, and as a title."""
BEGIN = "<!-- tables of benchmarks/store.py: begin -->"
END = "<!-- tables of benchmarks/store.py: end -->"


def markdown(found: Mapping[str, Any]) -> str:
    """Everything, ready to paste."""
    return "\n\n".join(_parts(found))


def text(found: Mapping[str, Any]) -> str:
    """The same tables for a terminal."""
    return "\n\n".join(_aligned(part) if part.startswith("|") else part for part in _parts(found))


def put_into(page: Path, found: Mapping[str, Any]) -> None:
    """Replaces what stands between the two marks in `page`.

    Raises:
        SystemExit: the marks are not there.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} lacks the lines {BEGIN} and {END}, between which the tables belong")
    page.write_text(f"{before}{begin}\n{markdown(found)}\n{end}{after}")


def _parts(found: Mapping[str, Any]) -> list[str]:
    codecs = found["codecs"]
    sizes = ", ".join(
        f"{codec}: {of['views']} views of {of['view_bytes'] / 1e6:.2f} MB, "
        f"{of['views'] * of['view_bytes'] / 1e6:.0f} MB in each format"
        for codec, of in codecs.items()
    )
    parts = [f"{machine.text(found['machine'], found['load_after'])} {sizes}."]
    for key, (_, title) in _READS.items():
        parts += [f"**{title}**", _reads({c: of[key] for c, of in codecs.items()}, found["notices"], key)]
    parts += ["**Writing**", _writes({c: of["writes"] for c, of in codecs.items()})]
    parts.append("**Bytes per view, both teachers (DINOv2-B at 518 px, CLIP-L at 224 px)**")
    stored = [(c, f"{n / 1e6:.2f} MB", _goal_bytes(c, n)) for c, n in found["bytes_per_view"].items()]
    parts.append(_table(("codec", "bytes", "goal"), stored))
    views = found["opening"]["sealed"][0]["views"]
    parts.append(f"**Opening a store of {views:,} views (two teachers), and the index of an epoch**")
    parts.append(_opening(found["opening"]))
    if not found["quick"]:
        parts += ["**Goals**", _goals(found)]
    return parts


def _reads(of: Mapping[str, Sequence[Mapping[str, Any]]], notices: Mapping[str, bool], key: str) -> str:
    limit = "pread" if key == "cold" else "memcpy"
    head = ["reader", "notices a flipped bit"]
    for codec in of:
        head += [f"{codec}: ms, median (p10 to p90)", f"{limit} / it", "it / ours verified"]
    lines = []
    for rows in zip(*of.values(), strict=True):
        line = [_bold(rows[0]["name"]), _notices(rows[0]["name"], notices)]
        for r in rows:
            ms = {k: _figure(v) for k, v in r["ms"].items()}
            line += [f"{ms['median']} ({ms['p10']} to {ms['p90']})"]
            line += [f"{r['share_of_limit']:.2f}", f"{r['times_ours']:.2f}"]
        lines.append(line)
    return _table(head, lines)


def _writes(of: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    head = ["format"]
    for codec in of:
        head += [f"{codec}: MB/s as it is", "fsynced", "it / ours, fsynced", "CPU-s/GB", "MB on disk a view", "files"]
    lines = []
    for rows in zip(*of.values(), strict=True):
        line = [_bold(rows[0]["name"])]
        for r in rows:
            line += [
                "fsyncs" if r["durable"] else f"{r['mb_per_s']:,.0f}",
                f"{r['durable_mb_per_s']:,.0f}",
                f"{r['times_ours']:.2f}",
                f"{r['cpu_s_per_gb']:.2f}",
                f"{r['bytes_per_view'] / 1e6:.3f}",
                f"{r['files']:,}",
            ]
        lines.append(line)
    return _table(head, lines)


def _opening(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = []
    for state in ("sealed", "unsealed"):
        of = {key: statistics.median(f[key] for f in found[state]) for key in found[state][0]}
        lines.append(
            (
                state,
                f"{of['open_s']:.2f}",
                f"{of['index_s']:.2f}",
                f"{of['interpreter_mb']:.0f}",
                f"{of['open_peak_mb'] - of['interpreter_mb']:.0f}",
                f"{of['peak_mb'] - of['interpreter_mb']:.0f}",
            )
        )
    head = (
        "status words",
        "open, s",
        "index, s",
        "interpreter with imports, MB",
        "peak above it: open, MB",
        "open and index, MB",
    )
    return _table(head, lines)


def _goals(found: Mapping[str, Any]) -> str:
    lines = []
    for codec, of in found["codecs"].items():
        one = {r["name"]: r for r in of["views_one"]}
        ours = one[OURS]["share_of_limit"]
        lines.append(
            (f"{codec}: zarr-python a[i] / verified read", ">= 4", _met(one["zarr-python a[i]"]["times_ours"], 4))
        )
        lines.append((f"{codec}: memcpy / verified read", ">= 0.4", _met(ours, 0.4)))
        limit = one[VERIFYING]
        said = f"{limit['times_ours']:.2f}, and memcpy / {VERIFYING} {limit['share_of_limit']:.2f}"
        lines.append((f"{codec}: {VERIFYING} / verified read", "-", said))
        for label, key in (
            ("one view", "views_one"),
            ("batches", "views_batch"),
            ("epochs", "epochs"),
            ("cold", "cold"),
        ):
            rivals = [r for r in of[key] if not r["name"].startswith("rsmtdf") and "limit" not in r["name"]]
            checked = [r for r in rivals if found["notices"].get(_way(r["name"]))]
            ahead = [r for r in rivals if r not in checked and r["times_ours"] < 1]
            best = min(checked, key=lambda r: r["times_ours"])
            said = f"{_met(best['times_ours'], 1)} ({best['name']})"
            if ahead:
                said += "; ahead without verifying: " + ", ".join(f"{r['name']} {r['times_ours']:.2f}" for r in ahead)
            lines.append((f"{codec}, {label}: the best peer that verifies / ours", ">= 1", said))
        rival = min((r for r in of["writes"] if r["name"] in _CHECKED), key=lambda r: r["times_ours"])
        said = f"{_met(rival['times_ours'], 1)} ({rival['name']})"
        lines.append((f"{codec}, writing, fsynced: the best format with checksums / ours", ">= 1", said))
    sealed = found["opening"]["sealed"]
    seconds = statistics.median(f["open_s"] + f["index_s"] for f in sealed)
    grown = statistics.median(f["peak_mb"] - f["interpreter_mb"] for f in sealed)
    lines.append(("10^6 views: open and index, s", "<= 2", _met(seconds, 2, most=True)))
    lines.append(("10^6 views: memory over the interpreter, MB", "<= 200", _met(grown, 200, most=True)))
    return _table(("what", "goal", "found"), lines)


def _met(value: float, goal: float, *, most: bool = False) -> str:
    return f"{value:.3g}: {'met' if (value <= goal if most else value >= goal) else 'MISSED'}"


def _goal_bytes(codec: str, n: int) -> str:
    goal = GOALS_BYTES.get(codec)
    return "-" if goal is None else f"<= {goal / 1e6:.2f} MB: {'met' if round(n / 1e6, 2) <= goal / 1e6 else 'MISSED'}"


def _bold(name: str) -> str:
    return f"**{name}**" if name.startswith("rsmtdf") else name


def _notices(name: str, notices: Mapping[str, bool]) -> str:
    known = notices.get(_way(name))
    return "-" if known is None else "yes" if known else "no"


def _way(name: str) -> str:
    """The name of the way that an epoch reads by."""
    return name.removesuffix(", DataLoader")


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _aligned(table: str) -> str:
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    del rows[1]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
