"""Targets from live teachers, for training without a store and for comparing with one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch

from rsmtdf.errors import TeacherError
from rsmtdf.specs import FeatureSpec, Teacher

RoundTrip = Callable[[str, torch.Tensor], torch.Tensor]
"""(teacher name, tokens [b, tokens, dim]) -> the same tokens after encoding and decoding by a store's codec."""


class OnlineFeatures:
    """A `FeatureSource` that asks the teachers themselves, on the pixels of the very batch."""

    def __init__(self, teachers: Mapping[str, Teacher], *, roundtrip: RoundTrip | None = None) -> None:
        self._teachers = dict(teachers)
        self._roundtrip = roundtrip

    @property
    def specs(self) -> Mapping[str, FeatureSpec]:
        return {name: teacher.spec for name, teacher in self._teachers.items()}

    @property
    def needs_pixels(self) -> bool:
        return True

    def fetch(self, rows: np.ndarray, pixels: torch.Tensor | None) -> Mapping[str, torch.Tensor]:
        """Teacher name -> targets float32 [b, tokens, dim] of `pixels`, uint8 [b, h, w, 3]; `rows` only counts them.

        Raises:
            TeacherError: without pixels, or with another number of them than rows.
        """
        if pixels is None:
            raise TeacherError("live teachers need the views' pixels; none were given")
        if len(rows) != len(pixels):
            raise TeacherError(f"live teachers got {len(pixels)} views for {len(rows)} rows")
        targets = {}
        for name, teacher in self._teachers.items():
            tokens = teacher(pixels)
            if self._roundtrip is not None:
                tokens = self._roundtrip(name, tokens)
            # Teachers run in inference mode, and autograd refuses to save such tensors (as a loss does its target).
            targets[name] = tokens.clone() if tokens.is_inference() else tokens
        return targets

    def stream(self, batches: Iterable[np.ndarray], *, ahead: int) -> Iterator[Mapping[str, torch.Tensor]]:
        """Live teachers cannot see pixels before they are made.

        Raises:
            TeacherError: always.
        """
        raise TeacherError("live teachers need the views' pixels, so they fetch nothing ahead: use fetch")
