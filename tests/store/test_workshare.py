"""Pieces in order, one outcome, and nobody at work once it is known."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rsmtdf.store.workshare import WorkShare


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("n", [0, 1, 20])
def test_every_piece_once_then_the_end(threads: int, n: int) -> None:
    done: list[int] = []
    with ThreadPoolExecutor(3) as pool:
        work = WorkShare([lambda k=k: done.append(k) for k in range(n)], then=lambda: list(done))
        work.help(pool, threads)
        assert sorted(work.result()) == list(range(n))


def test_helpers_finish_it_without_being_asked() -> None:
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        work = WorkShare([lambda: None] * 3, then=ended.set)
        work.help(pool, 1)
        assert ended.wait(5)
        work.result()


def test_the_first_failure_in_order_is_raised_after_all_that_began_has_ended() -> None:
    running = threading.Barrier(2, timeout=5)
    ended: list[str] = []

    def slow_and_bad() -> None:
        running.wait()
        time.sleep(0.05)
        ended.append("slow")
        raise ValueError("the first piece")

    def bad() -> None:
        running.wait()
        raise KeyError("the second piece")

    with ThreadPoolExecutor(2) as pool:
        work = WorkShare([slow_and_bad, bad, lambda: ended.append("third")], then=lambda: ended.append("then"))
        work.help(pool, 1)
        with pytest.raises(ValueError, match="the first piece"):
            work.result()
    assert ended == ["slow"], "what had begun was waited for, nothing else was begun"


def test_an_error_at_the_end_is_raised_too() -> None:
    def end() -> None:
        raise ValueError("checks failed")

    with pytest.raises(ValueError, match="checks failed"):
        WorkShare([lambda: None], then=end).result()


def test_cancelling_waits_for_what_has_begun() -> None:
    begun, go = threading.Event(), threading.Event()
    done: list[int] = []

    def piece() -> None:
        begun.set()
        go.wait(5)
        done.append(1)

    with ThreadPoolExecutor(1) as pool:
        work = WorkShare([piece, piece], then=lambda: done.append(2))
        work.help(pool, 1)
        begun.wait(5)
        threading.Timer(0.05, go.set).start()
        work.cancel()
        assert done == [1]
