"""Sizes, counts and times of a plan in words."""

from __future__ import annotations


def size_text(n: float) -> str:
    """Bytes in a unit that leaves three digits: 15 kB, 8.4 MB, 1.34 GB, 2.1 TB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n >= 0.9995 * scale:
            value = n / scale
            return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.{1 if value >= 9.995 else 2}f} {unit}"
    return f"{n / 1e3:.0f} kB" if n else "0 MB"


def count_text(n: int, unit: str) -> str:
    """`1 view`, `2 views`, `1,000 views`."""
    return f"{n:,} {unit}{'' if n == 1 else 's'}"


def duration_text(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"
