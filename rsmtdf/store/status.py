"""Status words: one uint64 per view that says whether its bytes are there, and what they must sum to.

Bits 0-31 are a crc32c, bits 32-39 the state. A chunk holds one shard's views, so committing a shard is the atomic
replacement of one small file, written last. The words of finished segments are also kept in one checksummed file
(`sealed`, beside the chunks), because reading 16 000 chunk files is what makes a store of 10^6 views slow to open.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsmtdf.errors import StoreCorrupt
from rsmtdf.objects import StorePath
from rsmtdf.store.arrays import array_metadata, damaged, decode_chunk, encode_chunk
from rsmtdf.store.checksum import crc32c
from rsmtdf.store.places import can_list, names, put, read, read_each, read_head, remove

TODO, DONE, SKIPPED, HOLE = 0, 1, 2, 3
"""States: not there yet; committed; skipped (a tile of its pair did not open); no view at all."""

_MAGIC = b"rsmtdf sealed status 1\n"


def word(state: int, crc: int = 0) -> int:
    return state << 32 | crc


def state_of(words: np.ndarray) -> np.ndarray:
    """uint8 states of uint64 status words."""
    return ((words >> np.uint64(32)) & np.uint64(0xFF)).astype(np.uint8)


def crc_of(words: np.ndarray) -> np.ndarray:
    """uint32 crc32c of uint64 status words."""
    return (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)


@dataclass(frozen=True, kw_only=True)
class StatusArray:
    """The status words of the views, or of one teacher's features."""

    path: StorePath
    shard_views: int

    def metadata(self, n_rows: int) -> dict[str, Any]:
        return array_metadata(shape=(n_rows,), dtype="uint64", chunk=(self.shard_views,), dims=("view",))

    def chunk_file(self, shard: int) -> StorePath:
        return self.path / f"c.{shard}"

    @property
    def sealed_file(self) -> StorePath:
        return self.path / "sealed"

    def read_shard(self, shard: int) -> np.ndarray:
        """uint64 [shard_views]: the committed words of one shard, zeros where nothing is.

        Raises:
            StoreCorrupt: the chunk file is damaged.
        """
        return self._decode(shard, read(self.chunk_file(shard)))

    def read_shards(self, shards: Sequence[int]) -> np.ndarray:
        """uint64 [len(shards), shard_views]: as `read_shard` of each; what it costs depends on `shards` alone.

        Raises:
            StoreCorrupt: a chunk file is damaged.
        """
        words = np.zeros((len(shards), self.shard_views), np.uint64)
        for part, shard, blob in zip(words, shards, read_each([self.chunk_file(k) for k in shards]), strict=True):
            part[:] = self._decode(shard, blob)
        return words

    def _decode(self, shard: int, blob: bytes | None) -> np.ndarray:
        if blob is None:
            return np.zeros(self.shard_views, np.uint64)
        file = self.chunk_file(shard)
        try:
            return decode_chunk(blob, dtype="uint64", length=self.shard_views, file=file)
        except StoreCorrupt as error:
            raise StoreCorrupt(f"{error}; to have just its shard computed again: rsmtdf cache repair") from None

    def write_shard(self, shard: int, words: np.ndarray) -> None:
        """Commits one shard's words, durably. `unseal` first where the shard `is_sealed`."""
        put(self.chunk_file(shard), encode_chunk(words.astype(np.uint64)))

    def is_sealed(self, shard: int) -> bool:
        """By the head of the sealed file alone: every commit asks, and the file has eight bytes for each view of the
        store. Whoever believes the words behind the head checks them with it.
        """
        first, head = shard * self.shard_views, len(_MAGIC) + 8
        start = read_head(self.sealed_file, head)
        if start is None or len(start) < head or not start.startswith(_MAGIC):
            return False
        size = head + 16 * int.from_bytes(start[-8:], "little")
        ranges = np.frombuffer((read_head(self.sealed_file, size) or b"")[head:], "<u8")
        return any(start <= first < stop for start, stop in ranges[: len(ranges) // 2 * 2].reshape(-1, 2).tolist())

    def sealed_ranges(self) -> list[tuple[int, int]]:
        """(first row, end row) of what is sealed."""
        return sorted(self._read_sealed())

    def unseal(self, *shards: int) -> None:
        """Takes the ranges that hold `shards` out of the sealed file, so that they cannot contradict a new commit.

        The caller holds the store's mutex.
        """
        firsts = np.sort(np.array(shards, np.int64)) * self.shard_views
        sealed = self._read_sealed()
        kept = {r: w for r, w in sealed.items() if np.searchsorted(firsts, r[0]) == np.searchsorted(firsts, r[1])}
        if len(kept) < len(sealed):
            self._write_sealed(kept)

    def read(self, n_rows: int) -> np.ndarray:
        """uint64 [n_rows].

        Raises:
            StoreCorrupt: a chunk or the sealed file is damaged.
        """
        per = self.shard_views
        words = np.zeros(n_rows, np.uint64)
        sealed = np.zeros(n_rows // per, bool)
        for (start, stop), part in self._read_sealed().items():
            if stop <= n_rows:
                words[start:stop] = part
                sealed[start // per : stop // per] = True
        shards = np.flatnonzero(~sealed).tolist()
        if shards and can_list(self.path):
            shards = sorted(set(shards) & set(self._shards_on_disk()))
        for shard, blob in zip(shards, read_each([self.chunk_file(k) for k in shards]), strict=True):
            words[shard * per : (shard + 1) * per] = self._decode(shard, blob)
        return words

    def seal(self, ranges: Iterable[tuple[int, int]], n_rows: int) -> None:
        """Puts the words of these row ranges (whole shards) into the sealed file too; the chunk files stay.

        The caller holds the store's mutex, and claims on the ranges.
        """
        words = self.read(n_rows)
        everything = {*self._read_sealed(), *ranges}
        self._write_sealed({(start, stop): words[start:stop] for start, stop in everything})

    def forget_beyond(self, n_rows: int) -> None:
        """Removes words of rows from `n_rows` on, which are not committed: those of a later state, say, whose manifest
        was lost. Rows added now must not find them.

        The caller owns the store and all its shards.
        """
        parts = self._read_sealed()
        if any(stop > n_rows for _, stop in parts):
            self._write_sealed({r: w for r, w in parts.items() if r[1] <= n_rows})
        for shard in self._shards_on_disk():
            if shard >= n_rows // self.shard_views:
                remove(self.chunk_file(shard))

    def drop_damaged_seal(self) -> bool:
        """Removes the sealed file if it is damaged (the chunk files hold the same words); whether it was.

        The caller holds the store's mutex.
        """
        try:
            self._read_sealed()
        except StoreCorrupt:
            remove(self.sealed_file)
            return True
        return False

    def mend(self, n_rows: int) -> tuple[list[int], list[int]]:
        """Shards whose chunk was damaged, and written again from the sealed words; and those whose words are lost.

        The caller owns all shards, and the sealed file is sound (`drop_damaged_seal`).
        """
        sealed = self._sealed_by_shard()
        rewritten: list[int] = []
        lost: list[int] = []
        for shard in sorted({*self._shards_on_disk(), *sealed}):
            if shard >= n_rows // self.shard_views:
                continue  # left over from a change that was cut short
            try:
                words = self.read_shard(shard)
            except StoreCorrupt:
                words = None
            if shard in sealed:
                if words is None or not np.array_equal(words, sealed[shard]):
                    self.write_shard(shard, sealed[shard])
                    rewritten.append(shard)
            elif words is None:
                lost.append(shard)
        return rewritten, lost

    def survey(self, n_rows: int) -> tuple[np.ndarray, dict[int | None, str]]:
        """The words as far as they can be read (lost ones read to do), and what is wrong: shard, or None for the
        sealed file -> why.
        """
        per, n_shards = self.shard_views, n_rows // self.shard_views
        words = np.zeros(n_rows, np.uint64)
        found: dict[int | None, str] = {}
        try:
            sealed = self._sealed_by_shard()
        except (StoreCorrupt, ValueError, IndexError) as error:
            sealed, found[None] = {}, str(error)
        on_disk = set(self._shards_on_disk())
        for shard in sorted(k for k in on_disk | sealed.keys() if k < n_shards):
            part: np.ndarray | None = None
            try:
                part = self.read_shard(shard) if shard in on_disk else None
            except OSError as error:  # also what is damaged
                found[shard] = str(error)
            if shard in sealed:
                if shard not in on_disk:
                    found[shard] = "is missing; the sealed copy has its words"
                elif part is not None and not np.array_equal(part, sealed[shard]):
                    found[shard] = "differs from the sealed copy"
                part = sealed[shard]
            if part is not None:
                words[shard * per : (shard + 1) * per] = part
        return words, found

    def _sealed_by_shard(self) -> dict[int, np.ndarray]:
        per = self.shard_views
        return {
            start // per + k: part[k * per : (k + 1) * per]
            for (start, stop), part in self._read_sealed().items()
            for k in range((stop - start) // per)
        }

    def _shards_on_disk(self) -> list[int]:
        return [int(n[2:]) for n in names(self.path) if n.startswith("c.") and n[2:].isdigit()]

    def _write_sealed(self, parts: dict[tuple[int, int], np.ndarray]) -> None:
        ranges = np.array(sorted(parts), dtype="<u8").reshape(-1, 2)
        body = _MAGIC + len(ranges).to_bytes(8, "little") + ranges.tobytes()
        body += b"".join(parts[r].astype("<u8").tobytes() for r in sorted(parts))
        put(self.sealed_file, body + crc32c(body).to_bytes(4, "little"))

    def _read_sealed(self) -> dict[tuple[int, int], np.ndarray]:
        if (blob := read(self.sealed_file)) is None:
            return {}
        body, crc = blob[:-4], int.from_bytes(blob[-4:], "little")
        if not body.startswith(_MAGIC) or crc32c(body) != crc:
            raise damaged(
                self.sealed_file, "checksum differs: bytes have changed (the chunks beside it hold the same words)"
            )
        numbers = np.frombuffer(body, "<u8", offset=len(_MAGIC))
        n = int(numbers[0])
        parts: dict[tuple[int, int], np.ndarray] = {}
        at = 1 + 2 * n
        for start, stop in numbers[1:at].reshape(n, 2).tolist():
            parts[start, stop] = numbers[at : at + stop - start]
            at += stop - start
        return parts
