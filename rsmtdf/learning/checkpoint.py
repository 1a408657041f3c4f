"""A training state as one safetensors file: student, EMA student, optimiser, and a JSON state in the header.

One file, written atomically, so that weights, moments and counters can never be of different steps. All numbers
come back bit for bit. Teachers are in none of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from rsmtdf.errors import CheckpointError
from rsmtdf.files import whole_file

FORMAT = "rsmtdf.state"
VERSION = 1

# How a group is computed, not what: they follow the machine a run resumes on.
_IMPLEMENTATION = frozenset({"params", "foreach", "fused", "capturable", "differentiable", "maximize"})


def save_state(
    path: Path, *, student: nn.Module, ema: nn.Module, optimiser: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Writes `path` atomically. `state` is JSON-ready (epoch, step, best, ...); its floats keep every bit."""
    tensors = {**_prefixed("student.", student), **_prefixed("ema.", ema), **_moments(student, optimiser)}
    header = {"version": VERSION, "state": dict(state), "groups": _groups(student, optimiser)}
    with whole_file(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={FORMAT: json.dumps(header, sort_keys=True)})


def load_state(path: Path, *, student: nn.Module, ema: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores `student`, `ema` and `optimiser` in place, on their devices, and returns the saved `state`.

    Nothing is changed unless everything fits.

    Raises:
        CheckpointError: no such file, damaged, of another version, model or optimiser setting.
    """
    what = f"cannot resume from {path}"
    if not Path(path).is_file():
        raise CheckpointError(f"{what}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(file.metadata(), what)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{what}: it is no complete safetensors file ({error})") from error
    _check_tensors(tensors, student, ema, what)
    groups = _groups(student, optimiser)
    _check_groups(header["groups"], groups, what)

    student.load_state_dict(_under("student.", tensors))
    ema.load_state_dict(_under("ema.", tensors))
    position = {name: i for i, name in enumerate(n for group in groups for n in group["params"])}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in _under("optim.", tensors).items():
        name, _, part = key.rpartition("/")
        moments.setdefault(position[name], {})[part] = tensor
    current = optimiser.state_dict()
    for group, saved in zip(current["param_groups"], header["groups"], strict=True):
        group["lr"] = saved["lr"]
    optimiser.load_state_dict({"state": moments, "param_groups": current["param_groups"]})
    return dict(header["state"])


def _prefixed(prefix: str, module: nn.Module) -> dict[str, torch.Tensor]:
    # Own storage each: safetensors refuses tensors that share memory, as CPU models and their copies never should.
    return {prefix + name: t.detach().cpu().contiguous() for name, t in module.state_dict().items()}


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _moments(student: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """`optim.<parameter>/<part>` -> tensor; '/' cannot occur in a parameter's name."""
    named = {id(p): name for name, p in student.named_parameters()}
    return {
        f"optim.{named[id(p)]}/{part}": torch.as_tensor(value).detach().cpu().contiguous()
        for p, parts in optimiser.state.items()
        for part, value in parts.items()
    }


def _groups(student: nn.Module, optimiser: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups' settings as JSON would give them back, with parameter names for `params`."""
    named = {id(p): name for name, p in student.named_parameters()}
    groups = [
        {
            **{k: v for k, v in group.items() if k not in _IMPLEMENTATION},
            "params": [named[id(p)] for p in group["params"]],
        }
        for group in optimiser.param_groups
    ]
    return [dict(group) for group in json.loads(json.dumps(groups))]


def _header(metadata: Mapping[str, str] | None, what: str) -> dict[str, Any]:
    if not metadata or FORMAT not in metadata:
        raise CheckpointError(f"{what}: it is a safetensors file, but not a training state")
    try:
        header = json.loads(metadata[FORMAT])
        version, complete = header["version"], {"state", "groups"} <= set(header)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{what}: its header is damaged ({error})") from error
    if version != VERSION:
        raise CheckpointError(f"{what}: format version {version}, this rsmtdf reads version {VERSION}")
    if not complete:
        raise CheckpointError(f"{what}: its header is incomplete")
    return dict(header)


def _check_tensors(tensors: Mapping[str, torch.Tensor], student: nn.Module, ema: nn.Module, what: str) -> None:
    expected = {name: _kind(t) for name, t in {**_views("student.", student), **_views("ema.", ema)}.items()}
    found = {name: _kind(t) for name, t in tensors.items() if not name.startswith("optim.")}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{what}: it is of another model; {name}: expected {expected.get(name, 'nothing')}, "
                f"found {found.get(name, 'nothing')}"
            )
    shapes = {name: tuple(p.shape) for name, p in student.named_parameters()}
    for key, tensor in _under("optim.", tensors).items():
        name, _, part = key.rpartition("/")
        if name not in shapes or (part != "step" and tuple(tensor.shape) != shapes[name]):
            raise CheckpointError(f"{what}: it is of another model; the optimiser state {key} fits no parameter")


def _check_groups(found: Any, expected: list[dict[str, Any]], what: str) -> None:
    """Everything but the current learning rate must be as configured now."""
    if not isinstance(found, list) or len(found) != len(expected):
        raise CheckpointError(f"{what}: expected {len(expected)} optimiser groups, found {found!r:.80}")
    for i, (old, new) in enumerate(zip(found, expected, strict=True)):
        for key in sorted((old.keys() | new.keys()) - {"lr"}):
            if old.get(key) != new.get(key):
                was, now = ("other parameters", "") if key == "params" else (old.get(key), f", now {new.get(key)}")
                raise CheckpointError(f"{what}: optimiser group {i} was saved with {key} {was}{now}")


def _views(prefix: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + name: t for name, t in module.state_dict().items()}


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
