"""Model weights from files: read without running anything in them, and hashed by content.

A weights file is somebody else's data. Only formats that are read as data are accepted: safetensors, `torch.save`
files through torch's weights-only unpickler, and TorchScript archives. The last matters because OpenAI's CLIP files
are such archives, for which the usual way (`torch.jit.load`) hands the program inside to torch's interpreter. Here
its code is never opened: the pickle that lists the archive's tensors is read by an unpickler that knows tensors,
containers and inert stand-ins for modules, and nothing else.
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import math
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch

from rsmtdf.errors import TeacherError

logger = logging.getLogger(__name__)

_NESTS = ("state_dict", "model", "teacher", "model_ema", "ema", "module")
"""Keys under which training scripts keep the weights, in the order they are looked for."""

_PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MAX_PICKLE_BYTES = 64 * 2**20
_MAX_MODULES = 100_000


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of the weights file `path`, on the CPU, in the dtypes of the file.

    The format is told by the content, not by the suffix. A dict that keeps the weights under `state_dict`, `model`,
    `teacher`, ... is unwrapped; a `module.` or `_orig_mod.` before every name is removed; entries that are no tensors
    are left out. Tensors may be maps of the file: copy them before the file can change.

    Raises:
        TeacherError: no such file, a format that is not accepted, damage, or no tensors inside.
    """
    kind = _kind(path)
    try:
        if kind == "safetensors":
            found: Any = safetensors.torch.load_file(path)
        elif kind == "torchscript":
            found = _read_torchscript(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch")
    except TeacherError:
        raise
    except pickle.UnpicklingError as error:
        raise TeacherError(
            f"{path} holds more than tensors, and reading that would run code from the file: {_first_line(error)}; "
            "where you trust it, load it yourself and save its state dict with safetensors.torch.save_file"
        ) from error
    # What torch, zipfile and safetensors raise for a damaged file has no narrower common type.
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, TypeError, IndexError, AttributeError) as error:
        raise _damaged(path, error) from error
    except (safetensors.SafetensorError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    return _strip(_unwrap(found, path))


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """The sha256 (hex) over sorted names, dtypes, shapes and little-endian bytes of `state`.

    Independent of the file the weights came from, of their order, of memory layout and of device.

    Raises:
        TeacherError: a tensor without data (on the meta device).
    """
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        if tensor.is_meta:
            raise TeacherError(f"weights cannot be hashed: {name} has no data (meta device)")
        dtype = str(tensor.dtype).removeprefix("torch.")
        total.update(json.dumps([name, dtype, list(tensor.shape)]).encode() + b"\n")
        total.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _kind(path: Path) -> str:
    """safetensors, torchscript, torch (zip) or legacy (bare pickle), by content."""
    if path.is_dir():
        raise TeacherError(f"weights {path} is a folder; name the weights file in it")
    if not path.is_file():
        raise TeacherError(f"no weights file at {path}")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            raise TeacherError(
                f"weights {path} are cut short ({path.stat().st_size} bytes, the end of the archive is missing); "
                "download it again"
            )
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if not any(n.endswith("/data.pkl") for n in names):
            raise TeacherError(f"{path} is a zip archive without weights (it holds {', '.join(names[:3])})")
        return "torchscript" if any(n.endswith("/constants.pkl") for n in names) else "torch"
    if head.startswith(b"version https://git-lfs"):
        raise TeacherError(f"{path} is a git-lfs pointer, not the weights; get them with: git lfs pull")
    if head.lstrip()[:1] == b"<":
        raise TeacherError(f"{path} is a web page, not weights (a download that needs a login?); download it again")
    if len(head) > 8 and int.from_bytes(head[:8], "little") <= path.stat().st_size and head[8:9] == b"{":
        return "safetensors"
    if head[:1] != b"\x80":
        raise TeacherError(
            f"{path} is none of safetensors, torch.save or TorchScript (it begins with {head[:8]!r}, "
            f"{path.stat().st_size} bytes); it may be cut short: download it again"
        )
    return "legacy"


def _unwrap(found: Any, path: Path) -> dict[str, torch.Tensor]:
    """The innermost dict of tensors."""
    trail: list[str] = []
    while isinstance(found, Mapping):
        # Nested first: a training checkpoint may keep a stray tensor (a step count) beside its model.
        key = next((k for k in _NESTS if isinstance(found.get(k), Mapping)), None)
        if key is None:
            if tensors := {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}:
                if trail:
                    logger.info("%s: weights taken from its entry %s", path.name, ".".join(trail))
                return tensors
            held = ", ".join(f"{k} ({type(v).__name__})" for k, v in list(found.items())[:5]) or "nothing"
            raise TeacherError(f"{path} holds no tensors under a known name (found {held}); save the state dict alone")
        trail.append(key)
        found = found[key]
    raise TeacherError(f"{path} holds a {type(found).__name__}, expected a state dict (name -> tensor)")


def _strip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _damaged(path: Path, error: Exception) -> TeacherError:
    return TeacherError(
        f"weights {path} cannot be read ({path.stat().st_size} bytes): {_first_line(error)}; "
        "it is damaged or cut short: download it again"
    )


def _first_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return text.splitlines()[0][:300]


def _read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a TorchScript archive, named by the module tree, as its `state_dict()` would name them.

    Tensors that are plain attributes are included too: only the archive's code could tell them from parameters.
    """
    with zipfile.ZipFile(path) as archive:
        index = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
        if archive.getinfo(index).file_size > _MAX_PICKLE_BYTES:
            raise TeacherError(f"{path}: the archive's index is implausibly large")
        root = index.removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise TeacherError(f"{path} was written on a big-endian machine; convert it to safetensors")
        if sys.byteorder != "little":
            raise TeacherError(f"{path}: TorchScript archives are read on little-endian machines only")
        # Made anew for every file, so that nothing a pickle does to it can outlive the call.
        inert = type("Module", (), {"__new__": lambda cls, *_: object.__new__(cls), "__setstate__": _keep_state})
        with archive.open(index) as file:
            tree = _TensorUnpickler(file, load=_storage_loader(archive, root), inert=inert).load()
    return _flatten(tree, inert, path)


def _keep_state(self: Any, state: Any) -> None:
    object.__setattr__(self, "state", state)


def _storage_loader(archive: zipfile.ZipFile, root: str) -> Callable[[torch.dtype, str, int], torch.Tensor]:
    """A function that reads one stored array (1-D) of the archive, once."""
    seen: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def load(dtype: torch.dtype, key: str, numel: int) -> torch.Tensor:
        if (key, dtype) not in seen:
            entry = archive.getinfo(f"{root}data/{key}")
            expected = numel * dtype.itemsize
            # Compressed or longer than declared: not what torch writes, and the way to a zip bomb.
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != expected:
                raise ValueError(f"array {key} has {entry.file_size} bytes, expected {expected} uncompressed")
            raw = bytearray(archive.read(entry))
            seen[key, dtype] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return seen[key, dtype]

    return load


class _TensorUnpickler(pickle.Unpickler):
    """An unpickler for which only tensors, containers and inert modules exist."""

    def __init__(self, file: IO[bytes], *, load: Callable[[torch.dtype, str, int], torch.Tensor], inert: type) -> None:
        super().__init__(file)
        self._load = load
        self._inert = inert

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return self._inert
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch.jit._pickle" and (name.startswith("build_") or name == "restore_type_tag"):
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        tag, dtype, key, _location, numel = pid
        if tag != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it asks for a stored {tag!r}")
        return self._load(dtype, str(key), int(numel))


def _rebuild(base: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> torch.Tensor:
    """A view of the stored array `base`; torch checks the bounds, we that it is no tiny array blown up by strides."""
    if math.prod(size) > base.numel():
        raise ValueError(f"a tensor of shape {tuple(size)} over {base.numel()} stored numbers")
    return torch.as_strided(base, size, stride, offset)


def _flatten(tree: Any, inert: type, path: Path) -> dict[str, torch.Tensor]:
    """Tensors of the module tree by dotted name; each module is visited under every name it has."""
    state: dict[str, torch.Tensor] = {}
    queue: list[tuple[str, Any]] = [("", tree)]
    visited = 0
    while queue:
        prefix, module = queue.pop()
        visited += 1
        if visited > _MAX_MODULES:
            raise TeacherError(f"{path}: the archive's module tree does not end")
        attributes = getattr(module, "state", None)
        for name, value in (attributes if isinstance(attributes, dict) else {}).items():
            if isinstance(value, torch.Tensor):
                state[f"{prefix}{name}"] = value
            elif isinstance(value, inert):
                queue.append((f"{prefix}{name}.", value))
    return state
