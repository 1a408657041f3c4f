"""Amounts are told in units that a reader can use, on bars, off a terminal and in the summary of stage 1."""

from __future__ import annotations

from typing import Any

import pytest

from rsmtdf.cli import terminal
from rsmtdf.cli.amounts import count_text, size_text, time_text
from rsmtdf.cli.cache_summary import summary_text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (12_400, "12 kB"),
        (3_400_000, "3.4 MB"),
        (999_000_000, "999.0 MB"),
        (1_204_000_000, "1.20 GB"),
        (2.5e12, "2.50 TB"),
    ],
)
def test_sizes(n: float, text: str) -> None:
    assert size_text(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (42.4, "42 s"),
        (119.4, "119 s"),
        (185, "3 min"),
        (7000, "117 min"),
        (7500, "2 h 5 min"),
        (356_400, "4 days 3 h"),
    ],
)
def test_times(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_counts() -> None:
    assert [count_text(n, "view") for n in (0, 1, 2, 1204)] == ["0 views", "1 view", "2 views", "1,204 views"]


def test_off_a_terminal_a_line_says_rate_time_left_and_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "PLAIN_EVERY_S", 0.0)
    now = iter(range(0, 10_000, 100))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(now)))
    with terminal.Bar("caching views", unit="view", total=1200) as bar:
        bar.advance(100, 250_000_000)
        bar.advance(1, 250_000_000)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("caching views: 100/1,200 views, 0.")
    assert " views/s, " in first
    assert first.endswith(" min left, 250.0 MB written")
    assert "101/1,200 views" in second
    with terminal.Bar("checking", unit="B", total=4_000_000_000) as bar:
        bar.advance(1_000_000_000)
    assert capsys.readouterr().err.startswith("checking: 1.00 GB of 4.00 GB, ")


def result(limited_by: str, **more: Any) -> dict[str, Any]:
    busy = {"decode": 6.0, "view": 2.0, "teacher": 90.0, "encode": 3.0, "copy": 1.0, "write": 4.0, "wait": 5.0}
    return {
        "store": "feats.zarr",
        "views": 1204,
        "bytes_written": 1_204_000_000,
        "seconds": 185.0,
        "views_per_second": 6.5,
        "device_busy": 0.93,
        "busy_seconds": busy,
        "limited_by": limited_by,
        "unreadable_tiles": {},
        "partners_lost": 0,
        "left_out_tiles": 0,
        **more,
    }


@pytest.mark.parametrize(
    ("limit", "advice"), [("views", "--workers (75% of"), ("writing", "--codec"), ("teachers", "cache.batch=N")]
)
def test_the_summary_says_what_limited_the_run_and_what_to_change(limit: str, advice: str) -> None:
    lines = summary_text(result(limit)).splitlines()
    assert lines[0] == "cached     1,204 views in 3 min (6.5 views/s), 1.20 GB written"
    assert lines[1] == "device     busy 93% of the time"
    assert lines[2].startswith(f"limited by {limit}: ")
    assert advice in lines[2]


def test_the_summary_counts_in_grammar() -> None:
    text = summary_text(result("views", views=1, unreadable_tiles={"a/0_0": "gone"}, partners_lost=1, left_out_tiles=1))
    assert "cached     1 view in " in text
    assert "left out   1 tile with too few valid pixels" in text
    assert "failed     1 tile cannot be read; 1 view of other tiles lacks a partner" in text
