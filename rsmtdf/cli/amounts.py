"""Amounts in words, as a user reads them: sizes, counts and times, each in the unit that suits it."""

from __future__ import annotations


def size_text(n: float) -> str:
    """Bytes: `0 B`, `12 kB`, `3.4 MB`, `1.20 GB`, `2.50 TB`."""
    for limit, unit, digits in ((1e12, "TB", 2), (1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 0)):
        if n >= limit:
            return f"{n / limit:,.{digits}f} {unit}"
    return f"{n:.0f} B"


def count_text(n: int, noun: str) -> str:
    """`1 view`, `2 views`, `1,204 views`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def time_text(seconds: float) -> str:
    """A span of time in at most two units: `0.4 s`, `42 s`, `3 min`, `2 h 5 min`, `4 days 3 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"
