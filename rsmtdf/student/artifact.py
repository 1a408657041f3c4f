"""A trained student as one safetensors file: weights, and in the header all that using them needs.

The header's one entry holds JSON: the architecture, the resolved data set (class names, palette, scaling), and what
else the caller knows of the run. Reading it builds modules out of our own code and copies numbers: nothing in the
file is ever executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rsmtdf.errors import CheckpointError, ConfigError
from rsmtdf.files import whole_file
from rsmtdf.student.model import Student, build_student
from rsmtdf.student.spec import StudentSpec

FORMAT = "rsmtdf.student"
VERSION = 1


@dataclass(frozen=True, slots=True)
class LoadedStudent:
    """A student in eval mode and what its file says about it (`meta["dataset"]` is the DatasetSpec as a dict)."""

    student: Student
    meta: dict[str, Any]


def save_student(path: Path, student: Student, *, meta: Mapping[str, Any]) -> None:
    """Writes `path` atomically; equal students and equal `meta` give equal bytes.

    Args:
        path: the file; its folder exists.
        student: any device; weights are stored in their own dtype.
        meta: JSON-ready. `meta["dataset"]["classes"]`, one name per output channel, is required: a student without
            its class list is not usable.

    Raises:
        CheckpointError: `meta` has no class list, or one of another length.
    """
    _check_classes(meta, student.spec, f"cannot save a student to {path}")
    # One entry only: safetensors writes several in an order that changes from process to process.
    header = {"version": VERSION, "student": student.spec.to_dict(), "meta": dict(meta)}
    tensors = {name: t.detach().cpu().contiguous() for name, t in student.state_dict().items()}
    with whole_file(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={FORMAT: json.dumps(header, sort_keys=True)})


def load_student(path: Path, *, device: torch.device | str) -> LoadedStudent:
    """The student that `save_student` wrote, on `device`, in eval mode.

    Raises:
        CheckpointError: no such file, no safetensors file, not a student of this version, or damaged.
    """
    what = f"cannot load a student from {path}"
    if not Path(path).is_file():
        raise CheckpointError(f"{what}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(file.metadata(), what)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{what}: it is no complete safetensors file ({error})") from error
    try:
        spec, meta = StudentSpec.from_dict(header["student"]), dict(header["meta"])
        student = build_student(spec, seed=0)
    except (ConfigError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{what}: its header does not describe a student ({error})") from error
    _check_classes(meta, spec, what)
    expected = {name: (tuple(t.shape)) for name, t in student.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != found:
        differing = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        name = differing[0]
        raise CheckpointError(
            f"{what}: {len(differing)} tensors do not fit its own spec, first {name}: expected {expected.get(name)}, "
            f"found {found.get(name)}"
        )
    # assign keeps the stored dtype, which copying into fresh float32 parameters would not.
    student.load_state_dict(tensors, assign=True)
    return LoadedStudent(student.to(device).eval(), meta)


def _header(metadata: Mapping[str, str] | None, what: str) -> dict[str, Any]:
    if not metadata or FORMAT not in metadata:
        raise CheckpointError(f"{what}: it is a safetensors file, but not of an rsmtdf student")
    try:
        header = json.loads(metadata[FORMAT])
        version = header["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{what}: its header is damaged ({error})") from error
    if version != VERSION:
        raise CheckpointError(f"{what}: format version {version}, this rsmtdf reads version {VERSION}; update rsmtdf")
    return dict(header)


def _check_classes(meta: Mapping[str, Any], spec: StudentSpec, what: str) -> None:
    dataset = meta.get("dataset")
    classes = dataset.get("classes") if isinstance(dataset, Mapping) else None
    if not isinstance(classes, list | tuple):
        raise CheckpointError(f"{what}: the class list (dataset.classes) is missing")
    if len(classes) != spec.classes:
        raise CheckpointError(f"{what}: {len(classes)} class names for {spec.classes} outputs")
