"""Teachers by library and by name: resolve an entry, describe it, fetch its weights, build it."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from rsmtdf.errors import ConfigError
from rsmtdf.specs import FeatureSpec, Teacher
from rsmtdf.teachers.base import VitTeacher
from rsmtdf.teachers.open_clip_teacher import OpenClipTeacher
from rsmtdf.teachers.presets import PRESETS
from rsmtdf.teachers.source import ComputeDtype, PosEmbed, TeacherSource
from rsmtdf.teachers.timm_teacher import TimmTeacher

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "pos_embed": (None, *typing.get_args(PosEmbed)),
    "compute_dtype": typing.get_args(ComputeDtype),
}


class TeacherLibrary(Protocol):
    """What a new kind of teacher provides: a class with these class methods, in one file and one dict entry."""

    def build(self, source: TeacherSource, *, student_grid: tuple[int, int], device: torch.device) -> Teacher: ...

    def describe(self, source: TeacherSource, *, student_grid: tuple[int, int]) -> FeatureSpec: ...

    def fetch(self, source: TeacherSource) -> Path: ...


LIBRARIES: dict[str, TeacherLibrary] = {"timm": TimmTeacher, "open_clip": OpenClipTeacher}


def resolve_source(entry: str | Mapping[str, Any]) -> TeacherSource:
    """The source that a YAML or command-line entry stands for.

    Args:
        entry: a preset's name, or a mapping of `TeacherSource` fields; its key `preset` names the preset that the
            other keys change. JSON lists count as tuples.

    Raises:
        ConfigError: no such preset, library, field or choice (with the nearest name), or a field that is missing.
    """
    if isinstance(entry, str):
        return _preset(entry)
    fields = {f.name: f for f in dataclasses.fields(TeacherSource)}
    if unknown := [key for key in entry if key not in fields and key != "preset"]:
        raise ConfigError(f"a teacher has no field {_near(str(unknown[0]), [*fields, 'preset'])}")
    values = {key: _tupled(value) for key, value in entry.items() if key != "preset"}
    if "preset" in entry:
        values = {**_preset(str(entry["preset"])).__dict__, **values}
    if missing := [n for n in ("name", "library", "model") if not values.get(n)]:
        raise ConfigError(f"teacher {dict(entry)} lacks {', '.join(missing)} (or `preset: NAME`)")
    _check(values)
    return TeacherSource(**values)


def build_teacher(source: TeacherSource, *, student_grid: tuple[int, int], device: torch.device) -> Teacher:
    """The frozen teacher of `source` on `device`, with its weights; downloads them where they are missing.

    Args:
        source: what to build.
        student_grid: (rows, columns) of the student's patches, which a dense teacher matches.
        device: where it computes.

    Raises:
        ConfigError: no such library or model, or one that cannot be compiled where `compile` asks for it.
        TeacherError: the weights are missing or do not fit.
    """
    teacher = library(source).build(source, student_grid=student_grid, device=device)
    if source.compile:
        if not isinstance(teacher, VitTeacher):
            raise ConfigError(
                f"teacher '{source.name}': library {source.library} compiles no models; leave `compile` out"
            )
        log.info("teacher '%s' is compiled: last bits of its features may differ from an uncompiled run", source.name)
        teacher.compile()
    return teacher


def describe(source: TeacherSource, *, student_grid: tuple[int, int]) -> FeatureSpec:
    """The feature of `source` without loading weights: every field but `weights_sha256`, which is empty.

    Raises:
        ConfigError, TeacherError: as `build_teacher`, but for weights.
    """
    return library(source).describe(source, student_grid=student_grid)


def fetch(source: TeacherSource) -> Path:
    """The local weights file of `source`, downloaded into the library's cache where it is missing.

    Raises:
        TeacherError: offline, gated or missing; says which file and how to get it.
    """
    return library(source).fetch(source)


def library(source: TeacherSource) -> TeacherLibrary:
    """The library of `source`.

    Raises:
        ConfigError: there is none of this name.
    """
    if source.library not in LIBRARIES:
        raise ConfigError(f"teacher '{source.name}': no library {_near(source.library, LIBRARIES)}")
    return LIBRARIES[source.library]


def _preset(name: str) -> TeacherSource:
    if name not in PRESETS:
        raise ConfigError(f"no teacher preset {_near(name, PRESETS)}")
    return PRESETS[name]


def _check(values: Mapping[str, Any]) -> None:
    name = values["name"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"teacher name {name!r}: letters, digits, '_', '-' and '.' only (it names a store's group)")
    if values["library"] not in LIBRARIES:
        raise ConfigError(f"teacher '{name}': no library {_near(str(values['library']), LIBRARIES)}")
    for field, choices in _CHOICES.items():
        if field in values and values[field] not in choices:
            raise ConfigError(f"teacher '{name}': {field} is {values[field]!r}, expected one of {choices}")
    if not isinstance(values.get("overrides", {}), Mapping):
        raise ConfigError(f"teacher '{name}': overrides is {values['overrides']!r}, expected a mapping")
    for field, length in (("mean", 3), ("std", 3), ("input_px", 2)):
        value = values.get(field)
        if isinstance(value, tuple) and (len(value) != length or not all(isinstance(v, int | float) for v in value)):
            raise ConfigError(f"teacher '{name}': {field} is {value!r}, expected {length} numbers")


def _tupled(value: Any) -> Any:
    """`value` with lists as tuples, at any depth: equal entries must be equal sources."""
    if isinstance(value, list | tuple):
        return tuple(_tupled(v) for v in value)
    if isinstance(value, Mapping):
        return {str(k): _tupled(v) for k, v in value.items()}
    return value


def _near(name: str, known: Iterable[str]) -> str:
    """`name` quoted, with the nearest known one or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"{name!r}; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}")
