"""Stored pixels: the views themselves beside the features, for machines that are short of processors or of images.

What is kept of a view is what training wants of it. `valid` is the mask before any paste, one bit per pixel; a strong
view has its finished `pixels`, CutMix included, and `weak`, the geometry alone, which the EMA student labels. The
finished valid mask is not kept: it follows from the partner's, the box, and this one. Views of other streams are their
own geometry, so they have no `weak`; streams share no shard, hence no file holds gaps for it.

Everything here can be made again from the images, and the finished view is still vouched for by `views/status`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rsmtdf.objects import StorePath
from rsmtdf.specs import Stream
from rsmtdf.store.arrays import group_metadata, set_length, write_metadata
from rsmtdf.store.codecs import EncodedArray
from rsmtdf.store.manifest import PIXELS
from rsmtdf.store.places import names, remove_tree
from rsmtdf.store.segments import Segment, padded
from rsmtdf.store.status import StatusArray

STRONG: tuple[Stream, ...] = ("strong", "strong2")
"""Streams whose views are more than their geometry."""


class Payload(Protocol):
    """Sharded arrays with one status word per view: a teacher's features, or pixels."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> StorePath: ...

    @property
    def shard_views(self) -> int: ...

    @property
    def arrays(self) -> tuple[EncodedArray, ...]: ...

    @property
    def bytes_per_view(self) -> int: ...

    @property
    def status(self) -> StatusArray: ...

    def array_metadata(self, array: EncodedArray, n_rows: int) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class StoredPixels:
    """The pixels of a store. Its `arrays` are those of a strong view, or, of a `flat` one, those of any other."""

    path: StorePath
    crop_px: int
    shard_views: int
    flat: bool = False

    @property
    def name(self) -> str:
        """For messages; no teacher's name has a space."""
        return "stored pixels"

    @property
    def arrays(self) -> tuple[EncodedArray, ...]:
        """In the order in which a status word sums them."""
        image = ("view", "y", "x", "channel")
        side = self.crop_px
        pixels, weak = (
            EncodedArray(name=name, shape=(side, side, 3), dtype="uint8", fill=0, dims=image)
            for name in ("pixels", "weak")
        )
        valid = EncodedArray(
            name="valid", shape=(side, -(-side // 8)), dtype="uint8", fill=0, dims=("view", "y", "x_byte")
        )
        return (pixels, valid) if self.flat else (pixels, weak, valid)

    @property
    def bytes_per_view(self) -> int:
        return sum(array.view_bytes for array in self.arrays)

    @property
    def status(self) -> StatusArray:
        return StatusArray(path=self.path / "status", shard_views=self.shard_views)

    def array_metadata(self, array: EncodedArray, n_rows: int) -> dict[str, Any]:
        """The `zarr.json` of one of its arrays."""
        return array.metadata(n_rows, shard_views=self.shard_views)

    def of_shard(self, shard: int, strong: frozenset[int]) -> StoredPixels:
        """With the arrays that views of this shard have; `strong` is `strong_shards` of the store."""
        return dataclasses.replace(self, flat=shard not in strong)

    def nodes(self, n_rows: int) -> dict[StorePath, dict[str, Any]]:
        """Node -> its `zarr.json`."""
        found = {self.path: group_metadata(), self.path / "status": self.status.metadata(n_rows)}
        return found | {self.path / a.name: self.array_metadata(a, n_rows) for a in self.arrays}


def bytes_per_view(crop_px: int, stream: Stream) -> int:
    """What storing the pixels of one view takes: 0.84 MB at 518 px, 1.64 MB of a strong one."""
    pixels = StoredPixels(path=Path(), crop_px=crop_px, shard_views=1, flat=stream not in STRONG)
    return pixels.bytes_per_view


def pack_valid(valid: np.ndarray) -> np.ndarray:
    """uint8 [c, c / 8 rounded up]: a valid mask bool [c, c] as it is stored."""
    return np.packbits(valid, axis=1)


def unpack_valid(bits: np.ndarray) -> np.ndarray:
    """bool [c, c]; the inverse of `pack_valid`."""
    return np.unpackbits(bits, axis=1, count=len(bits)).view(np.bool_)


def strong_shards(segments: Sequence[Segment], shard_views: int) -> frozenset[int]:
    """The shards of strong views; segments of different streams share none."""
    return frozenset(
        shard
        for s in segments
        if s.stream in STRONG
        for shard in range(s.row_start // shard_views, padded(s.row_stop, shard_views) // shard_views)
    )


def write_pixels(pixels: StoredPixels, *, n_rows: int) -> None:
    """Makes the empty arrays; they show once the manifest has been committed."""
    for node, metadata in pixels.nodes(n_rows).items():
        write_metadata(node, metadata)


def resize_pixels(pixels: StoredPixels, n_rows: int) -> None:
    """Sets the length of the arrays: metadata only, no data file is touched."""
    for node in (*(pixels.path / a.name for a in pixels.arrays), pixels.path / "status"):
        set_length(node, n_rows)


def has_litter(store: StorePath) -> bool:
    """Whether there are files of pixels; they are litter where the manifest has none."""
    return bool(names(store / PIXELS))


def discard_pixels(store: StorePath) -> int:
    """Removes the files of pixels that the manifest does not have; bytes given back.

    The caller holds the store's mutex.
    """
    # Status words first: what a kill leaves must never look finished.
    return remove_tree(store / PIXELS / "status") + remove_tree(store / PIXELS)
