"""Per-channel statistics of features, streamed and mergeable: Welford's update, Chan's merge, in float64.

They standardise channels (codecs, normalised losses) and are measured once, before the first shard. Views are added
one by one, so neither the batch size nor the number of views at a time changes a bit of the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from rsmtdf.errors import StoreError
from rsmtdf.store.codecs import STD_FLOOR

OUTLIER_STDS = 10.0
"""A channel counts as massive where its absolute maximum exceeds so many times the median channel's std."""


class Moments(Protocol):
    """What a store takes as a teacher's statistics: measured ones, or another store's teacher."""

    @property
    def mean(self) -> np.ndarray:
        """float32 [dim]."""
        ...

    @property
    def std(self) -> np.ndarray:
        """float32 [dim], not clamped."""
        ...

    def summary(self) -> dict[str, Any]:
        """JSON-ready facts."""
        ...


@dataclass
class ChannelStatistics:
    """Running moments of `dim` channels over all tokens of all views added."""

    dim: int

    def __post_init__(self) -> None:
        self.views = 0
        self.count = 0
        """Tokens seen."""
        self._mean = np.zeros(self.dim)
        self._m2 = np.zeros(self.dim)
        self.absmax = np.zeros(self.dim)

    def update(self, features: torch.Tensor) -> None:
        """Adds views [k, tokens, dim].

        Raises:
            StoreError: another width, or a value that is not finite.
        """
        if features.ndim != 3 or features.shape[-1] != self.dim:
            raise StoreError(f"statistics of {self.dim} channels were given features {tuple(features.shape)}")
        for k, view in enumerate(features):
            x = view.detach().to("cpu", torch.float32).to(torch.float64)
            mean = x.mean(dim=0)
            m2 = (x - mean).square().sum(dim=0)
            if not bool(torch.isfinite(m2).all()):
                channel = int((~torch.isfinite(m2)).nonzero()[0])
                raise StoreError(
                    f"view {k} of a statistics batch has a value in channel {channel} that is not finite; "
                    "check the teacher's weights and its compute dtype"
                )
            self.views += 1
            self._combine(x.shape[0], mean.numpy(), m2.numpy(), x.abs().amax(dim=0).numpy())

    def merge(self, other: ChannelStatistics) -> None:
        """Adds what `other` has seen."""
        if other.dim != self.dim:
            raise StoreError(f"statistics of {other.dim} channels cannot be merged into those of {self.dim}")
        self.views += other.views
        self._combine(other.count, other._mean, other._m2, other.absmax)

    @property
    def mean(self) -> np.ndarray:
        """float32 [dim]."""
        return self._mean.astype(np.float32)

    @property
    def std(self) -> np.ndarray:
        """float32 [dim], of the population; whoever divides by it clamps it first (`STD_FLOOR`)."""
        return np.sqrt(self._m2 / max(self.count, 1)).astype(np.float32)

    def summary(self) -> dict[str, Any]:
        """JSON-ready facts for the store and `cache info`."""
        std = self.std.astype(np.float64)
        floor = max(float(np.median(std)), STD_FLOOR) if self.dim else STD_FLOOR
        return {
            "views": self.views,
            "tokens": self.count,
            "absmax": float(self.absmax.max(initial=0.0)),
            "median_std": float(np.median(std)) if self.dim else 0.0,
            "constant_channels": np.flatnonzero(std < STD_FLOOR).tolist(),
            "outlier_channels": np.flatnonzero(self.absmax > OUTLIER_STDS * floor).tolist(),
        }

    def _combine(self, n: int, mean: np.ndarray, m2: np.ndarray, absmax: np.ndarray) -> None:
        total = self.count + n
        if n == 0:
            return
        delta = mean - self._mean
        self._mean = self._mean + delta * (n / total)
        self._m2 = self._m2 + m2 + delta**2 * (self.count * n / total)
        self.absmax = np.maximum(self.absmax, absmax)
        self.count = total
