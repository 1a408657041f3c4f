"""Everything in a store that is small: metadata, teachers' attributes, statistics, columns, tile ids, notes, litter.

Each file is compared with what this code would write for the committed manifest, so that any changed byte shows, also
one that no reader of ours would stumble over. Nothing here is written, and nothing stops at the first finding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsmtdf.errors import StoreCorrupt, StoreError, StoreNotFound
from rsmtdf.objects import StorePath
from rsmtdf.specs import FeatureSpec, from_dict
from rsmtdf.store.arrays import (
    METADATA,
    PlainArray,
    decode_chunk,
    group_metadata,
    metadata_bytes,
    read_metadata,
    same_layout,
)
from rsmtdf.store.damage import Damage, Kind
from rsmtdf.store.growth import TWINS, column_array, column_sha256, provenance_metadata
from rsmtdf.store.locks import LOCK_FILE
from rsmtdf.store.manifest import KEY, PIXELS, Manifest, checked, load
from rsmtdf.store.pixels import StoredPixels
from rsmtdf.store.places import files, names, read_each
from rsmtdf.store.shards import ShardUnreachable, trouble
from rsmtdf.store.status import StatusArray
from rsmtdf.store.stored_teacher import STATISTICS, StoredTeacher, moment_array, moment_sha256
from rsmtdf.store.tiles import tile_arrays, tiles_sha256
from rsmtdf.store.twins import twins_state


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What the manifest says is there, as far as it can be known."""

    path: StorePath
    manifest: Manifest
    teachers: Mapping[str, StoredTeacher]
    """Those whose attributes are sound; their statistics are NaN where they are not."""
    damage: tuple[Damage, ...]
    """Found on the way."""

    @property
    def pixels(self) -> StoredPixels | None:
        """The stored pixels; None where the store keeps none."""
        if not self.manifest.has_pixels:
            return None
        crop_px, per = self.manifest.recipe.crop_px, self.manifest.shard_views
        return StoredPixels(path=self.path / PIXELS, crop_px=crop_px, shard_views=per)


def read_contents(path: StorePath) -> Contents | Damage:
    """What is in the store at `path`; the damage to its manifest where nobody can tell.

    Raises:
        StoreNotFound: there is no store.
        StoreError: it is of a format or a spec version that this code does not know.
    """
    try:
        manifest = load(path)
    except StoreNotFound as error:
        if (path / "views" / "status" / METADATA).is_file():  # no other tool makes this
            return Damage(
                kind="manifest", file=path / METADATA, what=f"is missing, or not a store's any more ({error})"
            )
        raise
    except StoreCorrupt as error:
        return Damage(kind="manifest", file=path / METADATA, what=_why(error))
    found = [d for d in [_not_canonical(path / METADATA, "manifest", group_metadata({KEY: {}}))] if d]
    teachers: dict[str, StoredTeacher] = {}
    for name, digest in manifest.teachers.items():
        node = path / "teachers" / name
        try:
            attributes = checked(read_metadata(node).get("attributes", {}).get(KEY), node / METADATA)
        except OSError as error:
            found.append(Damage(kind="teacher", file=node / METADATA, teacher=name, what=_why(error)))
            continue
        if attributes["digest"] != digest:
            what = f"digest is {attributes['digest'][:12]}, the store's manifest says {digest[:12]}"
            found.append(Damage(kind="teacher", file=node / METADATA, teacher=name, what=what))
            continue
        if odd := _not_canonical(node / METADATA, "teacher", group_metadata({KEY: {}}), teacher=name):
            found.append(odd)
        teachers[name] = _teacher(node, attributes, manifest.shard_views, found)
    return Contents(path=path, manifest=manifest, teachers=teachers, damage=tuple(found))


def expected_metadata(contents: Contents) -> dict[StorePath, dict[str, Any]]:
    """Node -> its `zarr.json`, for all that follows from the manifest and the teachers' attributes."""
    path, manifest = contents.path, contents.manifest
    n_rows = manifest.n_rows
    nodes: dict[StorePath, dict[str, Any]] = {path / name: group_metadata() for name in ("tiles", "views", "teachers")}
    nodes[path / "provenance"] = provenance_metadata()
    status = StatusArray(path=path / "views" / "status", shard_views=manifest.shard_views)
    nodes[status.path] = status.metadata(n_rows)
    for name, column in manifest.columns.items():
        nodes[path / "views" / name] = column_array(path, name, column).metadata(n_rows)
    id_bytes, id_offsets = tile_arrays(path, manifest.tiles)
    if manifest.tiles.count:  # before, chunk lengths may still change
        nodes[id_bytes.path] = id_bytes.metadata(manifest.tiles.id_bytes)
        nodes[id_offsets.path] = id_offsets.metadata(manifest.tiles.count + 1)
    if contents.pixels is not None:
        nodes |= contents.pixels.nodes(n_rows)
    for teacher in contents.teachers.values():
        for array in teacher.arrays:
            nodes[teacher.path / array.name] = teacher.array_metadata(array, n_rows)
        nodes[teacher.status.path] = teacher.status.metadata(n_rows)
        for label in STATISTICS:
            nodes[teacher.path / label] = moment_array(teacher.path, label, teacher.spec.dim).metadata(teacher.spec.dim)
    return nodes


def check_metadata(contents: Contents) -> Iterator[Damage | str]:
    """Damage, and remarks, about every `zarr.json` but those that hold the manifest and the teachers."""
    grown = _growth(contents)
    ahead = 0
    for node, expected in expected_metadata(contents).items():
        file = node / METADATA
        teacher = node.parent.name if node.parent.parent == contents.path / "teachers" else None
        try:
            found, blob = read_metadata(node), file.read_bytes()
        except OSError as error:
            yield Damage(kind="metadata", file=file, teacher=teacher, what=_why(error))
            continue
        if found == expected and blob == metadata_bytes(expected):
            continue
        if _is_longer(found, expected, grown, over_views=node.parent != contents.path / "tiles"):
            ahead += 1
        elif _is_archived(found, expected):
            yield f"{node} is compressed: an archive, read through zarr-python"
        else:
            keys = [k for k in {**expected, **found} if found.get(k) != expected.get(k)]
            what = f"is not what the store's manifest says ({', '.join(keys) or 'spelling'})"
            yield Damage(kind="metadata", file=file, teacher=teacher, what=what)
    if ahead:
        yield f"{ahead} arrays are longer than what is committed: somebody is extending the store, or was cut short"


def check_tables(contents: Contents) -> Iterator[Damage]:
    """Damage to columns and tile ids."""
    path, manifest = contents.path, contents.manifest
    for name, column in manifest.columns.items():
        array = column_array(path, name, column)
        values = _values(array, manifest.n_rows)
        if isinstance(values, Damage):
            yield values
        elif column_sha256(values) != column.sha256:
            what = f"the digest of column {name!r} is not the one in the store's manifest"
            yield Damage(kind="table", file=array.path, what=what)
    if not manifest.tiles.count:
        return
    id_bytes, id_offsets = tile_arrays(path, manifest.tiles)
    data, offsets = _values(id_bytes, manifest.tiles.id_bytes), _values(id_offsets, manifest.tiles.count + 1)
    yield from (part for part in (data, offsets) if isinstance(part, Damage))
    if isinstance(data, Damage) or isinstance(offsets, Damage):
        return
    if tiles_sha256(data, offsets) != manifest.tiles.sha256:
        what = "the digest of the tile ids is not the one in the store's manifest"
        yield Damage(kind="table", file=path / "tiles", what=what)


def check_notes(contents: Contents) -> Iterator[Damage]:
    """Damage to provenance notes, which nothing reads back."""
    for name in contents.manifest.teachers:
        folder = contents.path / "provenance" / name
        notes = [folder / file for file in sorted(names(folder)) if file.endswith(".json")]
        for file, blob in zip(notes, read_each(notes), strict=True):
            if blob is not None and (what := _note_damage(file, blob)):
                shard = int(file.stem) if file.stem.isdigit() else None
                yield Damage(kind="note", file=file, teacher=name, shard=shard, what=what)


def _note_damage(file: StorePath, blob: bytes) -> str:
    """What is wrong with a note; '' where nothing is, or where it was written before notes carried a digest."""
    try:
        note = json.loads(blob)
        if isinstance(note, dict) and not any(isinstance(v, str) and len(v) == 64 for v in note.values()):
            return ""
        checked(note, file)
    except (StoreCorrupt, ValueError) as error:
        return _why(error)
    return "" if json.dumps(note).encode() == blob else "is spelled otherwise than it was written"


def check_twins(contents: Contents) -> Iterator[Damage | str]:
    """Damage to, and a remark on, the second copies, which only a repair looks at."""
    damaged, behind = twins_state(contents.path, contents.manifest)
    for name in damaged:
        yield Damage(kind="twin", file=contents.path / name, what="its checksum is not the one it carries")
    if behind:
        yield f"{behind} second copies of small files are missing or behind; the next change or repair writes them"


def check_strays(contents: Contents, committed: Mapping[str, set[int]]) -> Iterator[str]:
    """Remarks on files that belong to nothing that is committed.

    Args:
        contents: what should be there.
        committed: teacher -> shards with a view that is done or skipped.
    """
    nodes = expected_metadata(contents)
    nodes |= {contents.path: {}} | {t.path: {} for t in contents.teachers.values()}
    nodes |= {contents.path / "tiles" / name: {} for name in ("id_bytes", "id_offsets")}
    partial = 0
    orphans: dict[str, int] = {}
    for file in files(contents.path):
        if file.name.endswith(".partial"):
            partial += 1
        elif not _belongs(contents, file, nodes):
            yield f"{file} belongs to nothing in this store"
        elif (teacher := _features_of(contents, file)) and int(file.name.split(".")[1]) not in committed[teacher]:
            orphans[teacher] = orphans.get(teacher, 0) + 1
    for teacher, n in orphans.items():
        yield f"{n} shard file(s) of teacher {teacher!r} are there, but their status says to do: they are written anew"
    if partial:
        yield f"{partial} temporary file(s), of writers at work or ended early; the next writer removes the latter"


def _features_of(contents: Contents, file: StorePath) -> str | None:
    """The teacher whose shard `file` is."""
    teacher = contents.teachers.get(file.parent.parent.name)
    if teacher is None or file.parent.parent != teacher.path or not file.name.startswith("c."):
        return None
    return teacher.name if file.parent.name in {a.name for a in teacher.arrays} else None


def _belongs(contents: Contents, file: StorePath, nodes: Mapping[StorePath, Any]) -> bool:
    provenance = contents.path / "provenance"
    if file == contents.path / LOCK_FILE or (file.name == "sealed" and file.parent.name == "status"):
        return True
    if contents.path / TWINS in file.parents or (file.parent == provenance and file.name in {"mutex", "claims-mutex"}):
        return True
    if file.parent == provenance / "claims":
        return True
    if file.parent.parent == provenance:
        return file.suffix == ".json" and file.parent.name in contents.manifest.teachers
    if file.parent.parent.parent == contents.path and file.parent.parent.name == "teachers":
        return file.parent in nodes or file.parent.name not in contents.teachers  # damaged ones are named already
    is_chunk = file.name.startswith("c.") and all(part.isdigit() for part in file.name.split(".")[1:])
    known = file.parent in nodes or _damaged_teacher(contents, file)
    return known and (file.name == METADATA or is_chunk)


def _damaged_teacher(contents: Contents, file: StorePath) -> bool:
    names = contents.manifest.teachers.keys() - contents.teachers.keys()
    return any((contents.path / "teachers" / name) in file.parents for name in names)


def _teacher(node: StorePath, attributes: Mapping[str, Any], shard_views: int, found: list[Damage]) -> StoredTeacher:
    try:
        spec = from_dict(FeatureSpec, attributes["spec"])
    except ValueError as error:
        raise StoreError(f"{node} cannot be understood by this version of rsmtdf: {error}; use a newer one") from error
    moments: list[np.ndarray] = []
    for label in STATISTICS:
        array = moment_array(node, label, spec.dim)
        values = _values(array, spec.dim, kind="teacher", teacher=spec.name)
        if not isinstance(values, Damage) and moment_sha256(values) != attributes["arrays"][label]:
            what = "digest differs from the one in the teacher's attributes"
            values = Damage(kind="teacher", file=array.chunk_file(0), teacher=spec.name, what=what)
        if isinstance(values, Damage):
            found.append(values)
            values = np.full(spec.dim, np.nan, np.float32)
        moments.append(values)
    return StoredTeacher(
        path=node,
        spec=spec,
        codec=attributes["codec"],
        shard_views=shard_views,
        mean=moments[0],
        std=moments[1],
        statistics=attributes["statistics"],
    )


def _values(array: PlainArray, length: int, *, kind: Kind = "table", teacher: str | None = None) -> np.ndarray | Damage:
    """The first `length` values, whatever the metadata beside them say; what is wrong where they cannot be read."""
    try:
        if _is_archived(read_metadata(array.path), array.metadata(length)):
            return array.read(length)
    except OSError:
        pass  # its metadata are another finding
    out = np.empty(length, dtype=array.dtype)
    for start in range(0, length, array.chunk):
        file = array.chunk_file(start // array.chunk)
        try:
            block = decode_chunk(file.read_bytes(), dtype=array.dtype, length=array.chunk, file=file)
        except OSError as error:
            return Damage(kind=kind, file=file, teacher=teacher, what=_why(error))
        out[start : start + array.chunk] = block[: length - start]
    return out


def _growth(contents: Contents) -> tuple[bool, int]:
    """Whether the tile table, and up to what row the columns, have grown beyond what is committed.

    Columns come before anything else that is as long, so a `tile` column with values there tells a change that was
    cut short from damage.
    """
    path, manifest = contents.path, contents.manifest
    id_bytes, _ = tile_arrays(path, manifest.tiles)
    tiles = _value_at(id_bytes, manifest.tiles.id_bytes) not in (None, 0)
    try:
        found = read_metadata(path / "views" / "tile")
        length, chunk = int(found["shape"][0]), int(found["chunk_grid"]["configuration"]["chunk_shape"][0])
    except (OSError, KeyError, IndexError, TypeError, ValueError):
        return tiles, manifest.n_rows
    value = _value_at(PlainArray(path=path / "views" / "tile", dtype="int32", chunk=chunk, dim="view"), manifest.n_rows)
    return tiles, length if value is not None and value >= 0 else manifest.n_rows


def _value_at(array: PlainArray, index: int) -> int | None:
    file = array.chunk_file(index // array.chunk)
    try:
        block = decode_chunk(file.read_bytes(), dtype=array.dtype, length=array.chunk, file=file)
    except OSError:
        return None
    return int(block[index % array.chunk])


def _is_longer(
    found: Mapping[str, Any], expected: Mapping[str, Any], grown: tuple[bool, int], *, over_views: bool
) -> bool:
    """Whether an array differs in its length alone, and that as growing leaves it."""
    shape = found.get("shape")
    if not isinstance(shape, list) or not shape or not isinstance(shape[0], int):
        return False
    if dict(found) | {"shape": [expected["shape"][0], *shape[1:]]} != expected or shape[0] <= expected["shape"][0]:
        return False
    tiles, rows = grown
    return shape[0] == rows if over_views else tiles


def _is_archived(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether the array is the expected one but for a compressor, which damage cannot bring about."""
    if expected["node_type"] != "array" or same_layout(found, expected) or found.get("shape") != expected["shape"]:
        return False
    codecs = json.dumps(found.get("codecs"))
    return any(f'"name": "{name}"' in codecs for name in ("zstd", "blosc", "gzip"))


def _not_canonical(
    file: StorePath, kind: Kind, like: Mapping[str, Any], *, teacher: str | None = None
) -> Damage | None:
    """Damage where a group's metadata, whose attributes are sound, are otherwise not as this code writes them."""
    blob = file.read_bytes()
    found = json.loads(blob)
    attributes = found.get("attributes", {})
    is_ours = found.keys() == like.keys() and attributes.keys() == {KEY} and metadata_bytes(found) == blob
    if is_ours and all(found[k] == like[k] for k in like if k != "attributes"):
        return None
    return Damage(kind=kind, file=file, teacher=teacher, what="is spelled otherwise than it was written")


def _why(error: Exception) -> str:
    """An error that came with a small file, as a finding.

    Raises:
        StoreError: it says nothing about the file's bytes (permissions, a network).
    """
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if not isinstance(error, OSError) or isinstance(error, StoreError):
        # Of our own errors the middle: the file is named beside it, and what to do is said once for all findings.
        return reason(str(error))
    found = trouble(error, "cannot be read")
    if isinstance(found, ShardUnreachable):
        raise StoreError(
            f"{found} ({error.filename}). Nothing is known to be wrong with the store: check the disk, the network "
            "and the permissions, then run the same command again"
        ) from error
    return str(found)


def reason(message: str) -> str:
    """What is wrong, out of the message of `rsmtdf.store.arrays.damaged`."""
    head, colon, rest = message.partition(": ")
    return rest.partition("; nothing was read from it")[0] if colon and head.startswith("store file") else message
