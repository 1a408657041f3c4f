"""The root's attributes: everything about a store that is small, committed by replacing one file.

`digest` covers the whole of it, and it holds the digests of the tile table, of every column and of every teacher's
attributes, which hold those of its statistics. So one flipped bit in metadata, column or statistics is found, yet a
column is only read, and checked, when somebody asks for it.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, cast

from rsmtdf.errors import StoreError, StoreNotFound
from rsmtdf.objects import ObjectPath, StorePath
from rsmtdf.specs import DatasetSpec, ViewRecipe, digest, from_dict, to_dict
from rsmtdf.store.arrays import METADATA, damaged, group_metadata, metadata_bytes, read_metadata, write_metadata
from rsmtdf.store.places import read
from rsmtdf.store.segments import Segment

FORMAT = 1
"""The on-disk format this code writes, and the newest it reads."""
KEY = "rsmtdf"
"""The one attribute of a group that is ours."""
PIXELS = "pixels"
"""The group of stored pixels, and the manifest's word for it."""
_PACKAGES = (
    "rsmtdf",
    "torch",
    "timm",
    "open_clip_torch",
    "zarr",
    "numpy",
    "pillow",
    "opencv-python-headless",
    "rasterio",
)


@dataclass(frozen=True, kw_only=True)
class TileTable:
    """tiles/{id_bytes, id_offsets}: the ids' UTF-8 bytes one after another, and where each begins."""

    count: int
    id_bytes: int
    bytes_chunk: int
    offsets_chunk: int
    sha256: str
    """Of all bytes, then all offsets (count + 1, little endian)."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """views/<name>."""

    dtype: str
    chunk: int
    sha256: str
    """Of the values of all committed rows, little endian."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A store's committed state."""

    recipe: ViewRecipe
    dataset: DatasetSpec
    data_root: str
    experiment: Mapping[str, Any]
    versions: Mapping[str, str]
    shard_views: int
    n_rows: int
    tiles: TileTable
    segments: tuple[Segment, ...]
    columns: Mapping[str, Column]
    teachers: Mapping[str, str]
    """Name -> digest of its group's attributes."""
    has_pixels: bool = False
    """Whether the views' pixels are stored too."""

    @property
    def identity(self) -> str:
        return digest(identity_fields(self.recipe, self.dataset))

    def to_json(self) -> dict[str, Any]:
        body = {
            "format": FORMAT,
            "identity": self.identity,
            "recipe": to_dict(self.recipe),
            "dataset": to_dict(self.dataset),
            "data_root": self.data_root,
            "experiment": dict(self.experiment),
            "versions": dict(self.versions),
            "shard_views": self.shard_views,
            "n_rows": self.n_rows,
            "tiles": to_dict(self.tiles),
            "segments": [to_dict(s) for s in self.segments],
            "columns": {name: to_dict(c) for name, c in self.columns.items()},
            "teachers": dict(self.teachers),
        }
        if self.has_pixels:  # stores without them read as they did before there were any
            body[PIXELS] = True
        return signed(body)


def identity_fields(recipe: ViewRecipe, dataset: DatasetSpec) -> dict[str, Any]:
    """What fixes the views' pixels: the store's identity is the digest of it."""
    return {"recipe": to_dict(recipe), "pixels": dataset.pixel_fields()}


def commit(path: StorePath, manifest: Manifest) -> None:
    """Makes `manifest` the store's state: the last step of every change, and the only one that shows."""
    write_metadata(path, group_metadata({KEY: manifest.to_json()}))


def commit_first(path: ObjectPath, manifest: Manifest) -> bool:
    """As `commit`, where there is no store yet; False if somebody has made one meanwhile."""
    return (path / METADATA).create(metadata_bytes(group_metadata({KEY: manifest.to_json()}))) is not None


def load(path: StorePath) -> Manifest:
    """The committed state of the store at `path`.

    Raises:
        StoreNotFound: there is none.
        StoreCorrupt: its metadata is damaged.
        StoreError: it is of a format or a spec version that this code does not know.
    """
    if read(path / METADATA) is None:
        if read(path / "views" / "status" / METADATA) is not None:  # no other tool makes this
            raise damaged(path / METADATA, "is missing, though the rest of a feature store is there")
        try:
            state = "a folder without Zarr metadata" if path.is_dir() else "a file" if path.exists() else "nothing"
        except OSError as error:
            state = f"nothing that could be read ({error.strerror})"
        raise StoreNotFound(f"no feature store at {path}: there is {state}. Make one with: rsmtdf cache-features")
    attributes = read_metadata(path).get("attributes")
    if not isinstance(attributes, dict) or KEY not in attributes:
        raise StoreNotFound(f"{path} is a Zarr group, but no feature store of rsmtdf (it has no attribute {KEY!r})")
    data = checked(attributes[KEY], path / METADATA)
    if data.get("format") != FORMAT:
        raise StoreError(
            f"feature store {path} has format {data.get('format')}, this rsmtdf reads format {FORMAT}; it was written "
            f"by rsmtdf {data.get('versions', {}).get('rsmtdf', '?')}: use that version or a newer one"
        )
    try:
        return Manifest(
            recipe=from_dict(ViewRecipe, data["recipe"]),
            dataset=from_dict(DatasetSpec, data["dataset"]),
            data_root=data["data_root"],
            experiment=data["experiment"],
            versions=data["versions"],
            shard_views=data["shard_views"],
            n_rows=data["n_rows"],
            tiles=from_dict(TileTable, data["tiles"]),
            segments=tuple(from_dict(Segment, s) for s in data["segments"]),
            columns={name: from_dict(Column, c) for name, c in data["columns"].items()},
            teachers=data["teachers"],
            has_pixels=bool(data.get(PIXELS, False)),
        )
    except (ValueError, KeyError) as error:
        raise StoreError(
            f"feature store {path} was written by rsmtdf {data.get('versions', {}).get('rsmtdf', '?')} and cannot be "
            f"understood by this version: {error}; use that version or a newer one"
        ) from error


def signed(body: Mapping[str, Any]) -> dict[str, Any]:
    """`body` with its digest."""
    return {**body, "digest": digest(dict(body))}


def checked(data: Any, file: StorePath | PurePath) -> dict[str, Any]:
    """`data` after comparing its digest.

    Raises:
        StoreCorrupt: it differs.
    """
    if not isinstance(data, dict) or "digest" not in data:
        raise damaged(file, "has lost its digest")
    body = {k: v for k, v in data.items() if k != "digest"}
    if (found := digest(body)) != data["digest"]:
        raise damaged(file, f"metadata digest is {found[:12]}, expected {str(data['digest'])[:12]}: it was changed")
    return cast("dict[str, Any]", data)


def library_versions() -> dict[str, str]:
    """Versions of what a feature's bits depend on."""
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One line per field that differs, expected and found, nested fields with dots."""
    lines: list[str] = []
    for key in sorted(set(expected) | set(found)):
        e, f = expected.get(key), found.get(key)
        if isinstance(e, Mapping) and isinstance(f, Mapping):
            lines += [f"{key}.{line}" for line in differences(e, f)]
        elif _plain(e) != _plain(f):
            lines.append(f"{key}: expected {e!r}, found {f!r}")
    return lines


def _plain(value: Any) -> Any:
    """Tuples as lists: JSON does not tell them apart."""
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
