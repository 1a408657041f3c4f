"""How many views teachers see at a time where it is left open: fixed on the CPU, tried on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rsmtdf.specs import FeatureSpec
from rsmtdf.stages.cache import choose_batch, size
from rsmtdf.stages.cache.size import FIXED_BATCH, LARGEST_BATCH, TRIAL_CODEC, grown_batch, views_per_second
from rsmtdf.stages.cache.supply import AHEAD
from rsmtdf.store.codecs import CODECS


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


class Ones:
    """A teacher whose every feature is one."""

    def __init__(self, name: str) -> None:
        self.spec = FeatureSpec(
            name=name, library="fake", model="ones", weights_sha256="00", input_px=(28, 28), grid=(2, 2), dim=16
        )

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(pixels), 4, 16)


def test_a_trial_holds_what_a_run_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """All teachers and their codec, and the pixels of batches ahead: room for the teachers alone is not enough."""
    int8, blank = CODECS["int8"], size._blank
    encoded: list[int] = []
    shown: list[int] = []

    class Codec:
        def encode(self, features: torch.Tensor, **given: np.ndarray) -> object:
            encoded.append(len(features))
            if len(features) > 16:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return int8.encode(features, **given)

    def counted(batch: int, crop_px: int, device: torch.device) -> torch.Tensor:
        shown.append(batch)
        return blank(batch, crop_px, device)

    monkeypatch.setitem(CODECS, TRIAL_CODEC, Codec())
    monkeypatch.setattr(size, "_blank", counted)
    teachers = {"a": Ones("a"), "b": Ones("b")}
    assert views_per_second(4, teachers, 28) > 0
    assert (encoded, shown) == ([4] * 6, [4] * (AHEAD + 1))
    with pytest.raises(torch.OutOfMemoryError):
        views_per_second(32, teachers, 28)


def test_what_the_search_took_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr(size, "_give_back", lambda: given.append(True))
    assert grown_batch(saturating(32)) == 32
    assert not given, "nothing is cut into pieces where all fits"
    assert grown_batch(saturating(500, memory=70)) == 64
    assert given == [True]
