"""How many views teachers see at a time where it is left open: fixed on the CPU, tried on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rsmtdf.stages.cache import choose_batch
from rsmtdf.stages.cache.size import FIXED_BATCH, LARGEST_BATCH, grown_batch


class OnCpu:
    device = torch.device("cpu")

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        raise AssertionError("on the CPU nothing is tried: the batch must not depend on the moment")


def test_on_the_cpu_it_is_always_the_same() -> None:
    assert choose_batch("auto", {"t": OnCpu()}, crop_px=28) == FIXED_BATCH
    assert choose_batch(3, {"t": OnCpu()}, crop_px=28) == 3


def saturating(at: int, *, memory: int = 10_000) -> Callable[[int], float]:
    """Views per second of a device that is full with `at` views, and has room for `memory`."""

    def rate(batch: int) -> float:
        if batch > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return float(min(batch, at))

    return rate


@pytest.mark.parametrize(("rate", "batch"), [(saturating(32), 32), (saturating(500, memory=70), 64)])
def test_it_grows_while_that_is_faster_and_fits(rate: Callable[[int], float], batch: int) -> None:
    assert grown_batch(rate) == batch


def test_it_has_an_end() -> None:
    assert grown_batch(float) == LARGEST_BATCH


def test_not_even_the_smallest_fits() -> None:
    assert grown_batch(saturating(32, memory=2)) == 1


def test_another_error_is_not_taken_for_want_of_memory() -> None:
    def broken(batch: int) -> float:
        raise RuntimeError("no kernel image is available")

    with pytest.raises(RuntimeError, match="no kernel image"):
        grown_batch(broken)
