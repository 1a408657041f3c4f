"""Codecs: features as the plain arrays that a store keeps, and back, as torch operations on any device.

Everything a codec needs to decode is in plain arrays beside the features, so any Zarr reader decodes with one line of
NumPy (docs/store-format.md). Encoding runs where the features are; the host only ever sees what is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from rsmtdf.errors import StoreError

STD_FLOOR = 1e-3
"""Below it a channel counts as constant: dividing by less would turn rounding noise into signal."""
_HALF_OVERFLOW = 65520.0
"""The least magnitude that rounds to infinity in half precision."""


@dataclass(frozen=True, kw_only=True)
class EncodedArray:
    """One array of an encoding: its name in the store, shape per view, dtype and fill value."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    fill: float
    """What holes read as: a value that encoding never gives."""
    dims: tuple[str, ...]

    @property
    def view_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class Codec(Protocol):
    """How features become arrays. Each view is encoded by itself: the batch it came in changes nothing."""

    def arrays(self, tokens: int, dim: int) -> tuple[EncodedArray, ...]:
        """The arrays per view, in the order in which the status word sums them."""
        ...

    def encode(
        self, features: torch.Tensor, *, mean: np.ndarray, std: np.ndarray, rows: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Array name -> [k, ...] on the features' device.

        Args:
            features: [k, tokens, dim], float.
            mean: float32 [dim], per-channel mean.
            std: float32 [dim], per-channel standard deviation, not yet clamped.
            rows: names of the k views, for messages; None: 0..k-1.

        Raises:
            StoreError: a value is not finite or does not fit, naming view and channel.
        """
        ...

    def decode(
        self, arrays: Mapping[str, torch.Tensor], *, mean: np.ndarray, std: np.ndarray, device: torch.device
    ) -> torch.Tensor:
        """float32 [k, tokens, dim] on `device`, always in memory of its own."""
        ...


class Fp16:
    """Half precision as it is: 10 bits of mantissa, the reference that other codecs are measured against."""

    def arrays(self, tokens: int, dim: int) -> tuple[EncodedArray, ...]:
        return (
            EncodedArray(
                name="features",
                shape=(tokens, dim),
                dtype="float16",
                fill=float("nan"),
                dims=("view", "token", "channel"),
            ),
        )

    def encode(
        self, features: torch.Tensor, *, mean: np.ndarray, std: np.ndarray, rows: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        half = features.to(torch.float16)
        if not _fits_half(features):
            _require_finite(half, features, rows, limit="fp16 holds at most 65504")
        return {"features": half}

    def decode(
        self, arrays: Mapping[str, torch.Tensor], *, mean: np.ndarray, std: np.ndarray, device: torch.device
    ) -> torch.Tensor:
        return arrays["features"].to(device).to(torch.float32)


class Int8:
    """Channels standardised, then 8 bits per value under one fp16 scale per token: half of fp16's bytes.

    Both scalings are needed: channels alone clip tokens outside the calibration range, tokens alone drown in
    massive channels (reference/store_measurements, section 2).
    """

    def arrays(self, tokens: int, dim: int) -> tuple[EncodedArray, ...]:
        return (
            # -128 is never a code: clipping is symmetric.
            EncodedArray(name="codes", shape=(tokens, dim), dtype="int8", fill=-128, dims=("view", "token", "channel")),
            EncodedArray(
                name="token_scale", shape=(tokens,), dtype="float16", fill=float("nan"), dims=("view", "token")
            ),
        )

    def encode(
        self, features: torch.Tensor, *, mean: np.ndarray, std: np.ndarray, rows: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        centre, spread = _moments(mean, std, features.device)
        z = (features.to(torch.float32) - centre) / spread
        smallest = torch.finfo(torch.float16).smallest_normal
        scale = (z.abs().amax(dim=-1) / 127).clamp(min=smallest).to(torch.float16)
        _require_finite(scale.unsqueeze(-1), features, rows, limit="after standardising, int8 holds at most 8.3e6")
        # Codes come from the rounded scale, which may be a little below the exact one: hence the clip.
        codes = (z / scale.to(torch.float32).unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
        return {"codes": codes, "token_scale": scale}

    def decode(
        self, arrays: Mapping[str, torch.Tensor], *, mean: np.ndarray, std: np.ndarray, device: torch.device
    ) -> torch.Tensor:
        centre, spread = _moments(mean, std, device)
        scale = arrays["token_scale"].to(device).to(torch.float32).unsqueeze(-1)
        return arrays["codes"].to(device).to(torch.float32).mul_(scale).mul_(spread).add_(centre)


CODECS: Mapping[str, Codec] = {"fp16": Fp16(), "int8": Int8()}
"""Every codec by the name that stores carry. A new one: one class, one entry."""


def find_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        StoreError: there is none.
    """
    if name not in CODECS:
        raise StoreError(f"no codec {name!r}; there are {', '.join(CODECS)} (a newer rsmtdf may have more)")
    return CODECS[name]


def bytes_per_view(name: str, tokens: int, dim: int) -> int:
    """Payload bytes of one view under a codec."""
    return sum(a.view_bytes for a in find_codec(name).arrays(tokens, dim))


def _fits_half(features: torch.Tensor) -> bool:
    """Whether every value stays finite in half precision; ten times faster on the CPU than testing the halves."""
    if features.numel() == 0:
        return True
    low, high = torch.aminmax(features)  # NaN if one is NaN, and then no comparison holds
    return bool((low > -_HALF_OVERFLOW) & (high < _HALF_OVERFLOW))


def _moments(mean: np.ndarray, std: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and clamped std, float32 [dim] on `device`."""
    centre, spread = (torch.as_tensor(x, dtype=torch.float32, device=device) for x in (mean, std))
    return centre, spread.clamp(min=STD_FLOOR)


def _require_finite(encoded: torch.Tensor, features: torch.Tensor, rows: Sequence[int] | None, *, limit: str) -> None:
    """Raises StoreError where `encoded` is not finite, naming the first view, token and channel of `features`."""
    if bool(torch.isfinite(encoded).all()):
        return
    bad = ~torch.isfinite(encoded)
    view, token = (int(i) for i in bad.nonzero()[0][:2])
    values = features[view, token].to(torch.float32)
    # NaN first, then the largest: what made the encoding overflow.
    channel = int(torch.nan_to_num(values.abs(), nan=float("inf")).argmax())
    value = float(values[channel])
    raise StoreError(
        f"view {rows[view] if rows is not None else view}: feature {value:g} at token {token}, channel {channel} "
        f"cannot be stored ({limit}); check the teacher's weights and its compute dtype (float32 or bfloat16 overflow "
        "less than float16)"
    )
