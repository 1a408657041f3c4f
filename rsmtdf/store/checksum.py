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
