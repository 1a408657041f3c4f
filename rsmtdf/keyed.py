"""Keyed randomness: the only source of random numbers in rsmtdf.

A `Draws` is a stream of Philox words whose key is a hash of what the draw is *for* (tile id, stream, seed, ...),
so no order of calls, worker or process changes a number. Only NumPy's raw 64-bit words are used, which its
bit-generator guarantee fixes; the maps from words to numbers are ours, in integer and float64 arithmetic, because
those of `numpy.random.Generator` may change between versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

_BLOCK = 32


def key_words(*parts: str | int) -> tuple[int, int]:
    """The 128-bit Philox key of `parts` as two uint64: blake2b of their JSON (so ("a", 1) and ("a1",) differ)."""
    blob = hashlib.blake2b(json.dumps(parts, separators=(",", ":")).encode(), digest_size=16).digest()
    return int.from_bytes(blob[:8], "little"), int.from_bytes(blob[8:], "little")


def key_seed(*parts: str | int) -> int:
    """A 63-bit seed of `parts`, for generators of other libraries (torch)."""
    return key_words(*parts)[0] >> 1


class Draws:
    """Numbers drawn in sequence under one key. Equal keys give equal sequences, on every platform."""

    def __init__(self, *parts: str | int) -> None:
        self._philox = np.random.Philox(key=np.array(key_words(*parts), dtype=np.uint64))
        self._words: list[int] = []

    def word(self) -> int:
        """The next raw 64-bit word."""
        if not self._words:
            self._words = self._philox.random_raw(_BLOCK).tolist()[::-1]
        return self._words.pop()

    def unit(self) -> float:
        """Uniform in [0, 1): the upper 53 bits of a word."""
        return (self.word() >> 11) / 9007199254740992.0

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def chance(self, p: float) -> bool:
        """True with probability p; always takes one word, so later draws do not depend on p."""
        return self.unit() < p

    def integer(self, low: int, high: int) -> int:
        """Uniform in low..high, both included: multiply-shift of a 64-bit word (bias below 2**-32 for our ranges)."""
        return low + ((self.word() * (high - low + 1)) >> 64)

    def permutation(self, n: int) -> np.ndarray:
        """A permutation of 0..n-1, int64: argsort of n words, ties (never seen) by position."""
        words = self._philox_block(n)
        return np.argsort(words, kind="stable").astype(np.int64)

    def choose(self, items: Sequence[str], k: int) -> list[str]:
        """k of `items` without replacement, in drawn order."""
        return [items[i] for i in self.permutation(len(items))[:k]]

    def units(self, n: int) -> np.ndarray:
        """n uniform numbers in [0, 1), float64."""
        return (self._philox_block(n) >> np.uint64(11)).astype(np.float64) / 9007199254740992.0

    def _philox_block(self, n: int) -> np.ndarray:
        taken = [self._words.pop() for _ in range(min(n, len(self._words)))]
        fresh = self._philox.random_raw(n - len(taken)) if n > len(taken) else np.empty(0, np.uint64)
        return np.concatenate([np.array(taken, dtype=np.uint64), fresh])
