"""Per-channel statistics of features, streamed and mergeable: Welford's update, Chan's merge, in float64.

They standardise channels (codecs, normalised losses) and are measured once, before the first shard. Views are added
one by one, so neither the batch size nor the number of views at a time changes a bit of the result. The norms of tokens
are counted beside them: what they show (artefact tokens of plain ViTs) is for people, and changes no feature.
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
OUTLIER_NORMS = 3.0
"""A token counts as an outlier where its L2 norm exceeds so many times the median token's."""
_BINS_PER_OCTAVE = 16
"""Norms are counted in bins 4.4 % wide: what a median or a threshold taken from them may be off by."""
_OCTAVES = (-160, 160)
"""Powers of two of the least and the greatest norm told apart: those of float32 values in any number of channels."""


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
    """Running moments of `dim` channels, and the norms of tokens, over all tokens of all views added."""

    dim: int

    def __post_init__(self) -> None:
        self.views = 0
        self.count = 0
        """Tokens seen."""
        self._mean = np.zeros(self.dim)
        self._m2 = np.zeros(self.dim)
        self.absmax = np.zeros(self.dim)
        self.norms = TokenNorms()

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
            self.norms.add(torch.linalg.vector_norm(x, dim=-1).numpy())

    def merge(self, other: ChannelStatistics) -> None:
        """Adds what `other` has seen.

        Raises:
            StoreError: it has another width.
        """
        if other.dim != self.dim:
            raise StoreError(f"statistics of {other.dim} channels cannot be merged into those of {self.dim}")
        self.views += other.views
        self._combine(other.count, other._mean, other._m2, other.absmax)
        self.norms.merge(other.norms)

    @property
    def mean(self) -> np.ndarray:
        """float32 [dim]."""
        return self._mean.astype(np.float32)

    @property
    def std(self) -> np.ndarray:
        """float32 [dim], of the population; whoever divides by it clamps it first (`STD_FLOOR`)."""
        return np.sqrt(self._m2 / max(self.count, 1)).astype(np.float32)

    def summary(self) -> dict[str, Any]:
        """JSON-ready facts for the store and `cache info`; older stores lack the last three."""
        std = self.std.astype(np.float64)
        floor = max(float(np.median(std)), STD_FLOOR) if self.dim else STD_FLOOR
        return {
            "views": self.views,
            "tokens": self.count,
            "absmax": float(self.absmax.max(initial=0.0)),
            "median_std": float(np.median(std)) if self.dim else 0.0,
            "constant_channels": np.flatnonzero(std < STD_FLOOR).tolist(),
            "outlier_channels": np.flatnonzero(self.absmax > OUTLIER_STDS * floor).tolist(),
            "outlier_tokens": self.norms.outliers,
            "token_norm_median": min(self.norms.median, self.norms.max),
            "token_norm_max": self.norms.max,
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


class TokenNorms:
    """Token L2 norms, counted in bins of a sixteenth of an octave: merging is adding integers, exact in any order."""

    def __init__(self) -> None:
        low, high = _OCTAVES
        self.counts = np.zeros((high - low) * _BINS_PER_OCTAVE, np.int64)
        """Bin k holds norms from 2 ** (k / 16 - 160) on; the first also those below, 0 included."""
        self.max = 0.0

    def add(self, norms: np.ndarray) -> None:
        """Counts norms, float64 [n], finite."""
        if not len(norms):
            return
        least = 2.0 ** _OCTAVES[0]
        bins = (np.log2(np.maximum(norms, least)) - _OCTAVES[0]) * _BINS_PER_OCTAVE
        self.counts += np.bincount(bins.astype(np.int64).clip(max=len(self.counts) - 1), minlength=len(self.counts))
        self.max = max(self.max, float(norms.max()))

    def merge(self, other: TokenNorms) -> None:
        self.counts += other.counts
        self.max = max(self.max, other.max)

    @property
    def median(self) -> float:
        """The middle of the median token's bin; 0 where there is no token, or the median one is all zero."""
        if not (bin_ := self._median_bin()):
            return 0.0
        return float(2.0 ** ((bin_ + 0.5) / _BINS_PER_OCTAVE + _OCTAVES[0]))

    @property
    def outliers(self) -> int:
        """Tokens with a norm above `OUTLIER_NORMS` times the median, to a bin's width."""
        if not (bin_ := self._median_bin()):
            return 0
        beyond = bin_ + round(np.log2(OUTLIER_NORMS) * _BINS_PER_OCTAVE) + 1
        return int(self.counts[beyond:].sum())

    def _median_bin(self) -> int:
        total = int(self.counts.sum())
        return int(np.searchsorted(np.cumsum(self.counts), (total + 1) // 2)) if total else 0
