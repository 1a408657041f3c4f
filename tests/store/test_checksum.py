from __future__ import annotations

import numpy as np
import pytest

from rsmtdf.store.checksum import Appending, crc32c


@pytest.mark.parametrize("size", [1, 7, 64, 2738])
def test_appended_checksums(size: int) -> None:
    draws = np.random.default_rng(size)
    firsts = [draws.integers(0, 256, n, dtype=np.uint8) for n in (0, 1, 100, 5000)]
    seconds = [draws.integers(0, 256, size, dtype=np.uint8) for _ in firsts]
    appending = Appending(size)
    for a, b in zip(firsts, seconds, strict=True):
        assert appending(crc32c(a), crc32c(b)) == crc32c(np.concatenate([a, b]))
