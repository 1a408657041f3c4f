"""Zarr v3 metadata, and the plain (unsharded) 1-D arrays of a store: columns, tile ids, channel statistics.

They are written here, byte by byte as the specification says, because zarr-python neither fsyncs nor resizes in a
stated order; a test opens every array with stock zarr-python. The layout is one core chain, `bytes` (little endian)
and `crc32c`, and the key encoding `default` with separator '.', which saves a folder per dimension and chunk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, cast

import numpy as np

from rsmtdf.errors import StoreCorrupt, StoreError
from rsmtdf.objects import StorePath
from rsmtdf.store.checksum import crc32c
from rsmtdf.store.places import put, read, read_each, zarr_source

METADATA = "zarr.json"
CRC_BYTES = 4
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}


def group_metadata(attributes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"attributes": dict(attributes or {}), "zarr_format": 3, "node_type": "group"}


def array_metadata(
    *,
    shape: Sequence[int],
    dtype: str,
    chunk: Sequence[int],
    dims: Sequence[str],
    shard: Sequence[int] | None = None,
    fill: float | int | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `zarr.json` of an array of the store's one layout; with `shard`, chunks are packed into shards.

    Args:
        shape: of the whole array.
        dtype: a NumPy name, which is the Zarr name as well.
        chunk: shape of the unit of reading.
        dims: dimension names.
        shard: shape of the unit of writing (a file); None: each chunk is a file.
        fill: of what is not stored; None: `default_fill(dtype)`.
        attributes: of the array.
    """
    codecs: list[dict[str, Any]] = [_bytes_codec(dtype), _CRC]
    if shard is not None:
        sharding = {
            "chunk_shape": list(chunk),
            "codecs": codecs,
            "index_codecs": [_BYTES, _CRC],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return {
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard or chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": _json_fill(default_fill(dtype) if fill is None else fill, dtype),
        "codecs": codecs,
        "attributes": dict(attributes or {}),
        "dimension_names": list(dims),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def default_fill(dtype: str) -> float | int:
    """NaN for floats, so that a hole is seen; 0 for the rest."""
    return float("nan") if np.dtype(dtype).kind == "f" else 0


def write_metadata(node: StorePath, metadata: Mapping[str, Any]) -> None:
    """Writes `node`/zarr.json, atomically and durably; the folder is made where missing."""
    put(node / METADATA, metadata_bytes(metadata))


def metadata_bytes(metadata: Mapping[str, Any]) -> bytes:
    """The content of a `zarr.json`: equal metadata are equal bytes, so that any changed byte can be told."""
    return json.dumps(metadata, indent=1).encode()


def read_metadata(node: StorePath) -> dict[str, Any]:
    """The parsed `node`/zarr.json.

    Raises:
        StoreCorrupt: it is missing or no JSON object.
    """
    file = node / METADATA
    if (data := read(file)) is None:
        raise damaged(file, "metadata file is missing")
    try:
        found = json.loads(data)
    except ValueError as error:  # JSON and UTF-8 errors alike
        raise damaged(file, f"metadata is not JSON any more ({error})") from error
    if not isinstance(found, dict):
        raise damaged(file, "metadata is not a JSON object")
    return cast("dict[str, Any]", found)


def set_length(node: StorePath, length: int) -> None:
    """Sets the first dimension of the array at `node`, in its metadata only; a no-op where it already is so."""
    metadata = read_metadata(node)
    if not metadata.get("shape"):
        raise damaged(node / METADATA, "metadata gives the array no shape")
    if metadata["shape"][0] != length:
        metadata["shape"][0] = length
        write_metadata(node, metadata)


def same_layout(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether two array metadata describe the same bytes on disk: all but length, attributes and dimension names."""
    keys = ("data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs", "zarr_format", "node_type")
    return all(found.get(k) == expected[k] for k in keys) and found.get("shape", [])[1:] == expected["shape"][1:]


def damaged(file: StorePath | PurePath, what: str) -> StoreCorrupt:
    """The error for damage outside features and status words, which nothing can recompute in place."""
    return StoreCorrupt(
        f"store file {file}: {what}; nothing was read from it. rsmtdf cache repair puts it right where the store has "
        "a second copy of it; else restore this file from a copy of the store, or write the store anew"
    )


def encode_chunk(values: np.ndarray) -> bytes:
    """A stored chunk: the values' little-endian bytes and their crc32c."""
    raw = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()
    return raw + crc32c(raw).to_bytes(CRC_BYTES, "little")


def decode_chunk(blob: bytes, *, dtype: str, length: int, file: StorePath) -> np.ndarray:
    """The values of a stored chunk.

    Raises:
        StoreCorrupt: its size or its crc32c is wrong.
    """
    expected = length * np.dtype(dtype).itemsize + CRC_BYTES
    if len(blob) != expected:
        raise damaged(file, f"has {len(blob)} bytes, expected {expected}")
    raw = blob[:-CRC_BYTES]
    if (crc := crc32c(raw)) != int.from_bytes(blob[-CRC_BYTES:], "little"):
        stored = int.from_bytes(blob[-CRC_BYTES:], "little")
        raise damaged(file, f"checksum is {crc:08x}, expected {stored:08x}: bytes have changed")
    return np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False)


@dataclass(frozen=True, kw_only=True)
class PlainArray:
    """A 1-D array of equal chunks, one file each. Only the first `length` values a caller names are ever meant.

    The metadata's shape may run ahead of what is committed (a grow that was cut short), so it is not used here:
    chunk files are always of full size, whatever the shape.
    """

    path: StorePath
    dtype: str
    chunk: int
    dim: str
    fill: float | int | None = None

    def metadata(self, length: int) -> dict[str, Any]:
        return array_metadata(shape=(length,), dtype=self.dtype, chunk=(self.chunk,), dims=(self.dim,), fill=self.fill)

    def chunk_file(self, k: int) -> StorePath:
        return self.path / f"c.{k}"

    def replace_tail(self, values: np.ndarray, *, keep: int) -> None:
        """Makes the array its first `keep` values followed by `values`; those first values never change on disk.

        Each chunk file is replaced whole, so a kill leaves every one of the `keep` values readable.
        """
        if keep and not same_layout(read_metadata(self.path), self.metadata(keep)):
            raise StoreError(f"{self.path} is an archived (re-encoded) array and cannot grow; recode the store first")
        first = keep // self.chunk
        head = self.read(keep, first_chunk=first) if keep % self.chunk else np.empty(0, self.dtype)
        rest = np.concatenate([head, values.astype(self.dtype, casting="safe")])
        fill = default_fill(self.dtype) if self.fill is None else self.fill
        for offset in range(0, len(rest), self.chunk):
            block = np.full(self.chunk, fill, dtype=self.dtype)
            part = rest[offset : offset + self.chunk]
            block[: len(part)] = part
            put(self.chunk_file(first + offset // self.chunk), encode_chunk(block))
        write_metadata(self.path, self.metadata(keep + len(values)))

    def read(self, length: int, *, first_chunk: int = 0) -> np.ndarray:
        """The values from chunk `first_chunk` on, up to index `length`.

        Raises:
            StoreCorrupt: a chunk or the metadata is missing or damaged.
        """
        found = read_metadata(self.path)
        start = first_chunk * self.chunk
        if not same_layout(found, self.metadata(length)):
            return self._read_zarr(found, start, length)
        out = np.empty(max(length - start, 0), dtype=self.dtype)
        offsets = range(0, len(out), self.chunk)
        files = [self.chunk_file((start + offset) // self.chunk) for offset in offsets]
        for offset, file, blob in zip(offsets, files, read_each(files), strict=True):
            if blob is None:
                raise damaged(file, "is missing")
            block = decode_chunk(blob, dtype=self.dtype, length=self.chunk, file=file)
            out[offset : offset + self.chunk] = block[: len(out) - offset]
        return out

    def _read_zarr(self, found: Mapping[str, Any], start: int, length: int) -> np.ndarray:
        """Through zarr-python: a compressed column of an archive, say. The caller's digest guards the values."""
        if found.get("data_type") != self.dtype or len(found.get("shape", ())) != 1 or found["shape"][0] < length:
            raise damaged(self.path / METADATA, f"is not an array of at least {length} {self.dtype}")
        import zarr

        try:
            values = zarr.open_array(zarr_source(self.path), mode="r")[start:length]
        except (ValueError, KeyError, RuntimeError, OSError, TypeError) as error:
            raise damaged(self.path / METADATA, f"zarr-python cannot read the array ({error})") from error
        return np.asarray(values, dtype=self.dtype)


def chunk_length(n: int, *, low: int = 1024, high: int = 65536) -> int:
    """A chunk length for an array that starts with n values: the next power of two within low..high."""
    return min(high, max(low, 1 << max(n - 1, 0).bit_length()))


def _bytes_codec(dtype: str) -> dict[str, Any]:
    """One-byte types have no byte order; naming one anyway makes readers differ."""
    return _BYTES if np.dtype(dtype).itemsize > 1 else {"name": "bytes"}


def _json_fill(fill: float | int, dtype: str) -> Any:
    kind = np.dtype(dtype).kind
    if kind == "b":
        return bool(fill)
    if kind == "f":
        return "NaN" if fill != fill else float(fill)
    return int(fill)
