"""A student as the plain function that inference works with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Literal, Protocol

import torch

Model = Callable[[torch.Tensor], torch.Tensor]
"""Normalised images [b, 3, h, w] -> logits [b, k, h, w]."""
Precision = Literal["float32", "bfloat16", "float16"]


class HasLogits(Protocol):
    """What a student returns."""

    @property
    def logits(self) -> torch.Tensor: ...


def logits_of(student: Callable[[torch.Tensor], HasLogits], *, device: torch.device, precision: Precision) -> Model:
    """The student's logits, computed under autocast where `precision` is not float32."""
    dtype: torch.dtype = getattr(torch, precision)

    def model(x: torch.Tensor) -> torch.Tensor:
        is_mixed = dtype != torch.float32
        with torch.autocast(device.type, dtype=dtype) if is_mixed else contextlib.nullcontext():
            return student(x).logits

    return model
