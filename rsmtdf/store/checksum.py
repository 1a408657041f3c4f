"""crc32c (Castagnoli), the checksum of Zarr's core codec of that name, hence of every byte in a store."""

from __future__ import annotations

import google_crc32c
import numpy as np

summed = google_crc32c.extend
"""The crc32c that continues from another (0: none), of bytes or a contiguous uint8 array, which is not checked."""


def crc32c(data: bytes | np.ndarray, start: int = 0) -> int:
    """The crc32c of `data` (an array: its bytes in C order), continuing from `start`, the crc of what precedes it."""
    if isinstance(data, np.ndarray) and not (data.dtype == np.uint8 and data.flags.c_contiguous):
        # The C code takes no memoryview of a writable buffer, but it takes arrays.
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return int(google_crc32c.extend(start, data))


class Appending:
    """The crc32c of a + b, out of those of a and of b, for every b of `size` bytes.

    A checksum is linear in the one it continues from, so 32 of them over zeros tell all: four look-ups instead of
    summing b a second time.
    """

    def __init__(self, size: int) -> None:
        zeros = bytes(size)
        plain = crc32c(zeros)
        bits = [crc32c(zeros, start=1 << k) ^ plain for k in range(32)]
        self._tables = [_sums(bits[place : place + 8]) for place in (0, 8, 16, 24)]

    def __call__(self, first: int, second: int) -> int:
        """Of a + b; `first` of a and `second` of b."""
        a, b, c, d = self._tables
        return a[first & 255] ^ b[first >> 8 & 255] ^ c[first >> 16 & 255] ^ d[first >> 24] ^ second


def _sums(bits: list[int]) -> list[int]:
    """For each subset of eight numbers, as a byte, the exclusive or of them."""
    table = [0]
    for bit in bits:
        table += [value ^ bit for value in table]
    return table
