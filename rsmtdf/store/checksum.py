"""crc32c (Castagnoli), the checksum of Zarr's core codec of that name, hence of every byte in a store."""

from __future__ import annotations

import google_crc32c
import numpy as np


def crc32c(data: bytes | np.ndarray, start: int = 0) -> int:
    """The crc32c of `data` (an array: its bytes in C order), continuing from `start`, the crc of what precedes it."""
    if isinstance(data, np.ndarray):
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
        bits = np.array([crc32c(zeros, start=1 << k) ^ plain for k in range(32)], np.uint32)
        self._tables = np.zeros((4, 256), np.uint32)
        for value in range(256):
            for k in range(8):
                if value >> k & 1:
                    self._tables[:, value] ^= bits[k::8]

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """uint32 [...] of a + b; `first` of a and `second` of b, uint32 [...]."""
        total = second
        for place, table in enumerate(self._tables):
            total = total ^ table[(first >> np.uint32(8 * place)) & np.uint32(0xFF)]
        return np.asarray(total, np.uint32)
