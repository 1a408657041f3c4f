"""A teacher's group in a store: what its features are, how they are encoded, and their channel statistics."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from rsmtdf.errors import StoreError
from rsmtdf.objects import StorePath
from rsmtdf.specs import FeatureSpec, from_dict, to_dict
from rsmtdf.store.arrays import (
    METADATA,
    PlainArray,
    damaged,
    group_metadata,
    read_metadata,
    same_layout,
    set_length,
    write_metadata,
)
from rsmtdf.store.codecs import Codec, EncodedArray, find_codec
from rsmtdf.store.manifest import KEY, checked, differences, signed
from rsmtdf.store.places import remove_tree
from rsmtdf.store.status import StatusArray

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TAKEN = ("locks", "mutex", "claims-mutex", "claims", "twins")
"""Names in `provenance`, where each teacher's notes have a folder."""
STATISTICS = ("channel_mean", "channel_std")
"""Names of the arrays of channel statistics."""


@dataclass(frozen=True, kw_only=True)
class StoredTeacher:
    """One teacher of a store. `mean` and `std` are float32 [dim], as measured (`std` not clamped)."""

    path: StorePath
    spec: FeatureSpec
    codec: str
    shard_views: int
    mean: np.ndarray
    std: np.ndarray
    statistics: Mapping[str, Any]
    """How the statistics were made (`rule`, if the writer gave one) and what they showed."""

    @property
    def name(self) -> str:
        return self.spec.name

    @cached_property
    def coder(self) -> Codec:
        return find_codec(self.codec)

    @cached_property
    def arrays(self) -> tuple[EncodedArray, ...]:
        return self.coder.arrays(self.spec.tokens, self.spec.dim)

    @property
    def bytes_per_view(self) -> int:
        return sum(a.view_bytes for a in self.arrays)

    @property
    def status(self) -> StatusArray:
        return StatusArray(path=self.path / "status", shard_views=self.shard_views)

    def array_metadata(self, array: EncodedArray, n_rows: int) -> dict[str, Any]:
        """The `zarr.json` of one of its arrays as this code writes it."""
        return array.metadata(n_rows, shard_views=self.shard_views)

    def encode(self, features: torch.Tensor, *, rows: list[int] | None = None) -> dict[str, torch.Tensor]:
        """Array name -> encoded views, on the features' device; `rows` name the views in messages.

        Raises:
            StoreError: the features have another shape, or a value cannot be stored.
        """
        expected = (self.spec.tokens, self.spec.dim)
        if features.ndim != 3 or tuple(features.shape[1:]) != expected:
            raise StoreError(
                f"features of teacher {self.name!r} have shape {tuple(features.shape)}, expected [views, "
                f"{expected[0]} tokens, {expected[1]} channels]"
            )
        try:
            return self.coder.encode(features, mean=self.mean, std=self.std, rows=rows)
        except StoreError as error:
            raise StoreError(f"teacher {self.name!r}, {error}") from error

    def decode(self, arrays: Mapping[str, torch.Tensor], *, device: torch.device) -> torch.Tensor:
        """float32 [k, tokens, dim] on `device`."""
        return self.coder.decode(arrays, mean=self.mean, std=self.std, device=device)

    def roundtrip(self, features: torch.Tensor) -> torch.Tensor:
        """float32 [k, tokens, dim] on the features' device, as the store would give them back."""
        return self.decode(self.encode(features), device=features.device)

    def summary(self) -> dict[str, Any]:
        """With `mean` and `std`: the statistics that a sibling store may take over."""
        return {k: v for k, v in self.statistics.items() if k != "rule"}

    def expect(self, spec: FeatureSpec, codec: str, rule: Mapping[str, Any] | None) -> list[str]:
        """One line per field in which this teacher differs from the one asked for."""
        lines = differences(spec.identity(), self.spec.identity())
        if codec != self.codec:
            lines.append(f"codec: expected {codec!r}, found {self.codec!r} (--codec {self.codec} goes on with it)")
        if rule is not None:
            lines += differences({"statistics rule": dict(rule)}, {"statistics rule": self.statistics.get("rule")})
        return lines


def write_teacher(teacher: StoredTeacher, *, n_rows: int) -> str:
    """Writes the group of a new teacher and returns the digest that the manifest commits.

    Raises:
        StoreError: its name cannot be a folder, or its statistics do not fit its width.
    """
    name, path = teacher.name, teacher.path
    if not _NAME.fullmatch(name) or name in _TAKEN:
        raise StoreError(
            f"teacher name {name!r} cannot be a folder of a store; use letters, digits, '.', '_' and '-', and none of "
            f"{', '.join(_TAKEN)}"
        )
    moments = dict(zip(STATISTICS, (teacher.mean, teacher.std), strict=True))
    for label, values in moments.items():
        if values.shape != (teacher.spec.dim,) or values.dtype != np.float32 or not np.isfinite(values).all():
            raise StoreError(
                f"{label} of teacher {name!r} is {values.dtype} {values.shape}; expected finite float32 "
                f"({teacher.spec.dim},), from ChannelStatistics over the teacher's features"
            )
    if (teacher.std < 0).any():
        raise StoreError(f"channel_std of teacher {name!r} has negative values")
    for label, values in moments.items():
        moment_array(path, label, teacher.spec.dim).replace_tail(values, keep=0)
    for array in teacher.arrays:
        write_metadata(path / array.name, teacher.array_metadata(array, n_rows))
    write_metadata(path / "status", teacher.status.metadata(n_rows))
    attributes = signed(
        {
            "spec": to_dict(teacher.spec),
            "codec": teacher.codec,
            "statistics": dict(teacher.statistics),
            "arrays": {label: moment_sha256(values) for label, values in moments.items()},
        }
    )
    write_metadata(path, group_metadata({KEY: attributes}))
    return str(attributes["digest"])


def load_teacher(path: StorePath, *, digest: str, shard_views: int) -> StoredTeacher:
    """The committed teacher at `path`.

    Raises:
        StoreCorrupt: its attributes or statistics differ from what the manifest says.
        StoreError: it needs a codec or a field that this version does not know.
    """
    data = checked(read_metadata(path).get("attributes", {}).get(KEY), path / METADATA)
    if data["digest"] != digest:
        raise damaged(path / METADATA, f"digest is {data['digest'][:12]}, the store's manifest says {digest[:12]}")
    try:
        spec = from_dict(FeatureSpec, data["spec"])
    except ValueError as error:
        raise StoreError(f"{path} cannot be understood by this version of rsmtdf: {error}; use a newer one") from error
    try:
        find_codec(data["codec"])
    except StoreError as error:
        raise StoreError(f"{path} cannot be read by this version of rsmtdf: {error}; use a newer one") from error
    moments: list[np.ndarray] = []
    for label in STATISTICS:
        values = moment_array(path, label, spec.dim).read(spec.dim)
        if moment_sha256(values) != data["arrays"][label]:
            raise damaged(path / label, "digest differs from the one in the teacher's attributes")
        moments.append(values)
    return StoredTeacher(
        path=path,
        spec=spec,
        codec=data["codec"],
        shard_views=shard_views,
        mean=moments[0],
        std=moments[1],
        statistics=data["statistics"],
    )


def require_own_layout(teacher: StoredTeacher) -> None:
    """Passes if shards of `teacher` can be written: its arrays lie in the layout of this code.

    Raises:
        StoreError: one is archived in another layout, which only reading knows.
    """
    for array in teacher.arrays:
        node = teacher.path / array.name
        # The length is left out: `same_layout` does not compare it.
        if not same_layout(read_metadata(node), teacher.array_metadata(array, 0)):
            raise StoreError(
                f"{node} is archived: it is not in the layout that rsmtdf writes, so no view can be added to it or "
                "replaced in it; rsmtdf cache recode makes a store that can grow"
            )


def resize_teacher(teacher: StoredTeacher, n_rows: int) -> None:
    """Sets the length of its arrays: metadata only, no data file is touched."""
    for array in teacher.arrays:
        set_length(teacher.path / array.name, n_rows)
    set_length(teacher.path / "status", n_rows)


def moment_array(path: StorePath, label: str, dim: int) -> PlainArray:
    """`channel_mean` or `channel_std` of the teacher at `path`."""
    return PlainArray(path=path / label, dtype="float32", chunk=dim, dim="channel")


def discard_teacher(store: StorePath, name: str) -> int:
    """Removes the files of a teacher that the store's manifest does not name; bytes given back.

    The caller holds the store's mutex.
    """
    freed = 0
    if not _NAME.fullmatch(name):
        return freed  # no folder of ours
    # Status words first: what a kill leaves must never look finished.
    for folder in (store / "teachers" / name / "status", store / "teachers" / name, store / "provenance" / name):
        freed += remove_tree(folder)
    return freed


def moment_sha256(values: np.ndarray) -> str:
    """The digest of channel statistics that a teacher's attributes hold."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").tobytes()).hexdigest()
