"""Codecs: features as the plain arrays that a store keeps, and back, as torch operations on any device.

Everything a codec needs to decode is in plain arrays beside the features, so any Zarr reader decodes with one line of
NumPy (docs/store-format.md). Encoding runs where the features are; the host only ever sees what is written.

**The same bits on every device**, so that a store does not tell where it was made: only operations that IEEE 754
rounds in one way, on one token (or one group of its channels) at a time, and no sum whose order a device may choose.
One trap: PyTorch on CUDA turns division by a Python number into multiplication by its reciprocal, which may differ in
the last bit; `_scales` divides by a tensor. Do not compile these functions: fusing would contract `a * b + c`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from rsmtdf.errors import StoreError
from rsmtdf.store.arrays import array_metadata

STD_FLOOR = 1e-3
"""Below it a channel counts as constant: dividing by less would turn rounding noise into signal."""
GROUP = 32
"""Channels under one scale in `int4`."""
_HALF_OVERFLOW = 65520.0
"""The least magnitude that rounds to infinity in half precision."""
_BLOCK = 2**19
"""Values per thread that the CPU works on at a time: 2 MB stay in its caches between the operations. One view, or a
batch, at once is 2 to 6 times slower: memory is handed back and faulted in again for every intermediate."""


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
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def metadata(self, n_rows: int, *, shard_views: int) -> dict[str, Any]:
        """Its `zarr.json` as this code writes it: a chunk is a view, a shard `shard_views` of them."""
        return array_metadata(
            shape=(n_rows, *self.shape),
            dtype=self.dtype,
            chunk=(1, *self.shape),
            shard=(shard_views, *self.shape),
            dims=self.dims,
            fill=self.fill,
        )


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
        single = features.to(torch.float32)  # the one way from double to half: rounded twice on any device
        half = single.to(torch.float16)
        if not _fits_half(single):
            _require_finite(half, features, None, rows, limit="fp16 holds at most 65504")
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
        out = _empty(self.arrays(*features.shape[1:]), features)
        codes, scales = out["codes"].flatten(0, 1), out["token_scale"].flatten(0, 1)
        for block, z in _standardised(features, mean, std):
            scales[block] = _scales(z, 127)
            codes[block] = _codes(z, scales[block], 127)
        limit = "after standardising, int8 holds at most 8.3e6"
        _require_finite(out["token_scale"].unsqueeze(-1), features, (mean, std), rows, limit=limit)
        return out

    def decode(
        self, arrays: Mapping[str, torch.Tensor], *, mean: np.ndarray, std: np.ndarray, device: torch.device
    ) -> torch.Tensor:
        centre, spread = _moments(mean, std, device)
        codes, scales = (arrays[name].to(device) for name in ("codes", "token_scale"))
        out = torch.empty(codes.shape, dtype=torch.float32, device=device)
        codes, scales, values = codes.flatten(0, 1), scales.flatten(0, 1), out.flatten(0, 1)
        for block in _blocks(values):
            values[block].copy_(codes[block]).mul_(scales[block].to(torch.float32).unsqueeze(-1))
            values[block].mul_(spread).add_(centre)
        return out


class Int4:
    """Channels standardised, then 4 bits per value under one fp16 scale per token and 32 channels: 0.28 of the bytes.

    Two codes share a byte, the even channel in its lower half, each as code + 8. Codes go from -7 to 7, so no byte is
    0. The error is a tenth of the features' size, but noise: over many tokens it averages out.
    """

    def arrays(self, tokens: int, dim: int) -> tuple[EncodedArray, ...]:
        packed, groups = (tokens, -(-dim // 2)), (tokens, -(-dim // GROUP))
        return (
            EncodedArray(name="codes", shape=packed, dtype="uint8", fill=0, dims=("view", "token", "channel_pair")),
            EncodedArray(
                name="token_scale",
                shape=groups,
                dtype="float16",
                fill=float("nan"),
                dims=("view", "token", "channel_group"),
            ),
        )

    def encode(
        self, features: torch.Tensor, *, mean: np.ndarray, std: np.ndarray, rows: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        out = _empty(self.arrays(*features.shape[1:]), features)
        codes, scales = out["codes"].flatten(0, 1), out["token_scale"].flatten(0, 1)
        groups, bytes_ = scales.shape[-1], codes.shape[-1]
        for block, z in _standardised(features, mean, std, width=groups * GROUP):
            grouped = z.view(len(z), groups, GROUP)
            scales[block] = _scales(grouped, 7)
            nibbles = _codes(grouped, scales[block], 7).add_(8).to(torch.uint8)
            pairs = nibbles.view(len(z), groups * GROUP).view(torch.int16)  # lower | upper << 8: little endian
            codes[block] = (pairs >> 4).bitwise_or_(pairs).bitwise_and_(0xFF)[:, :bytes_]
        limit = "after standardising, int4 holds at most 4.5e5"
        _require_finite(out["token_scale"], features, (mean, std), rows, limit=limit)
        return out

    def decode(
        self, arrays: Mapping[str, torch.Tensor], *, mean: np.ndarray, std: np.ndarray, device: torch.device
    ) -> torch.Tensor:
        centre, spread = _moments(mean, std, device)
        dim = len(centre)
        codes, scales = (arrays[name].to(device) for name in ("codes", "token_scale"))
        out = torch.empty((*codes.shape[:2], dim), dtype=torch.float32, device=device)
        codes, scales, values = codes.flatten(0, 1), scales.flatten(0, 1), out.flatten(0, 1)
        for block in _blocks(values):
            pairs = codes[block].to(torch.int16)
            nibbles = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.uint8)[:, :dim]
            scale = scales[block].to(torch.float32).unsqueeze(-1).expand(-1, -1, GROUP).flatten(1)[:, :dim]
            values[block].copy_(nibbles).sub_(8).mul_(scale).mul_(spread).add_(centre)
        return out


CODECS: Mapping[str, Codec] = {"int8": Int8(), "int4": Int4(), "fp16": Fp16()}
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
    """Payload bytes of one view under a codec, checksums not counted."""
    return sum(a.view_bytes for a in find_codec(name).arrays(tokens, dim))


def _empty(arrays: Sequence[EncodedArray], features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Array name -> uninitialised [k, ...] for the views of `features`, on their device."""
    k, device = len(features), features.device
    return {a.name: torch.empty((k, *a.shape), dtype=getattr(torch, a.dtype), device=device) for a in arrays}


def _blocks(tokens: torch.Tensor) -> Iterator[slice]:
    """Ranges of the rows of [n, dim] to work on at a time: all of them where each operation costs a kernel launch."""
    n, dim = tokens.shape
    step = max(_BLOCK * torch.get_num_threads() // max(dim, 1), 1) if tokens.device.type == "cpu" else max(n, 1)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _standardised(
    features: torch.Tensor, mean: np.ndarray, std: np.ndarray, *, width: int | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of tokens and their standardised values, float32 [n, width] to be changed at will: the next block is
    written over them. Channels that only pad to `width` are 0.
    """
    centre, spread = _moments(mean, std, features.device)
    tokens = features.flatten(0, 1)
    dim = tokens.shape[-1]
    scratch: torch.Tensor | None = None
    for block in _blocks(tokens):
        part = tokens[block].to(torch.float32)
        if scratch is None:
            scratch = torch.empty(len(part), width or dim, dtype=torch.float32, device=features.device)
        z = scratch[: len(part)]
        torch.sub(part, centre, out=z[:, :dim]).div_(spread)
        z[:, dim:] = 0
        yield block, z


def _scales(z: torch.Tensor, levels: int) -> torch.Tensor:
    """float16 [...]: the step that puts the largest magnitude of the last axis at `levels`; never subnormal."""
    absmax = torch.maximum(z.amax(dim=-1), z.amin(dim=-1).neg_())
    step = absmax.div_(torch.full((), levels, dtype=torch.float32, device=z.device))  # see the trap above
    return step.clamp_(min=torch.finfo(torch.float16).smallest_normal).to(torch.float16)


def _codes(z: torch.Tensor, scale: torch.Tensor, levels: int) -> torch.Tensor:
    """`z` in whole steps of the rounded scale, in place; that may be a little below the exact one: hence the clip."""
    return z.div_(scale.to(torch.float32).unsqueeze(-1)).round_().clamp_(-levels, levels)


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


def _require_finite(
    encoded: torch.Tensor,
    features: torch.Tensor,
    statistics: tuple[np.ndarray, np.ndarray] | None,
    rows: Sequence[int] | None,
    *,
    limit: str,
) -> None:
    """Raises StoreError where `encoded` is not finite, naming the first view, token and channel of `features`.

    `statistics`: mean and std, where it is standardised values that were encoded.
    """
    if bool(torch.isfinite(encoded).all()):
        return
    view, token = (int(i) for i in (~torch.isfinite(encoded)).nonzero()[0][:2])
    values = sizes = features[view, token].to(torch.float32)
    if statistics is not None:
        centre, spread = _moments(*statistics, features.device)
        sizes = (values - centre) / spread
    # NaN first, then the largest: what made the encoding overflow.
    channel = int(torch.nan_to_num(sizes.abs(), nan=float("inf")).argmax())
    raise StoreError(
        f"view {rows[view] if rows is not None else view}: feature {float(values[channel]):g} at token {token}, "
        f"channel {channel} cannot be stored ({limit}); check the teacher's weights and its compute dtype (float32 or "
        "bfloat16 overflow less than float16)"
    )
