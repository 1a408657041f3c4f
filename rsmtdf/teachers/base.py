"""What all teachers share: from view pixels to checked float32 patch tokens."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, final

import torch

from rsmtdf.errors import TeacherError
from rsmtdf.pixels import normalise, resize
from rsmtdf.specs import FeatureSpec
from rsmtdf.teachers.source import TeacherSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class VitTeacher(ABC):
    """A frozen vision transformer behind the `Teacher` protocol. A library adds how its tokens are taken."""

    def __init__(self, *, spec: FeatureSpec, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        self._run: Callable[[torch.Tensor], torch.Tensor] = self._tokens
        self._is_compiled = False

    @property
    def spec(self) -> FeatureSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def is_compiled(self) -> bool:
        return self._is_compiled

    @final
    def compile(self, *, backend: str = "inductor") -> None:
        """Has the model run through `torch.compile` from its next batch on, whose compilation takes a minute.

        The last bits of features may then differ from those of the same teacher as it is.
        """
        self._run, self._is_compiled = torch.compile(self._tokens, backend=backend), True

    @property
    @abstractmethod
    def module(self) -> torch.nn.Module:
        """The model itself, frozen; for inspection."""

    @abstractmethod
    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Patch tokens [b, tokens, dim] of `x` [b, 3, *input_px], prefix tokens dropped, row-major."""

    @final
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch tokens float32 [b, tokens, dim] of uint8 views [b, h, w, 3] on the teacher's device.

        The result is an inference tensor: clone it before autograd may save it.

        Raises:
            TeacherError: not such pixels, pixels on another device, or features that are not finite.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise TeacherError(
                f"teacher '{self._spec.name}' takes uint8 views [b, h, w, 3], got {pixels.dtype} {list(pixels.shape)}"
            )
        if pixels.device.type != self._device.type:
            raise TeacherError(f"teacher '{self._spec.name}' is on {self._device}, the views on {pixels.device}")
        with torch.inference_mode():
            x = normalise(pixels, mean=self._spec.mean, std=self._spec.std)
            return self.features(resize(x, self._spec.input_px))

    @final
    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Patch tokens float32 [b, tokens, dim] of normalised float32 images [b, 3, *spec.input_px].

        Raises:
            TeacherError: images of another size, or features that are not finite (naming the batch positions).
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, *self._spec.input_px):
            raise TeacherError(
                f"teacher '{self._spec.name}' takes images [b, 3, {self._spec.input_px[0]}, {self._spec.input_px[1]}], "
                f"got {list(x.shape)}"
            )
        with torch.inference_mode(), self._precision():
            tokens = self._run(x).float()
        expected = (x.shape[0], self._spec.tokens, self._spec.dim)
        if tuple(tokens.shape) != expected:
            raise TeacherError(f"teacher '{self._spec.name}' gave {list(tokens.shape)}, its spec says {list(expected)}")
        finite = torch.isfinite(tokens).flatten(1).all(1)
        if not bool(finite.all()):
            where = ", ".join(str(i) for i in torch.nonzero(~finite).flatten().tolist()[:8])
            raise TeacherError(
                f"teacher '{self._spec.name}' gave NaN or infinite features at batch position {where} "
                f"(of {x.shape[0]}, computing in {self._spec.compute_dtype}); check its weights, or use float32"
            )
        return tokens

    def _precision(self) -> AbstractContextManager[Any]:
        dtype = DTYPES[self._spec.compute_dtype]
        if dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=dtype)


def input_size(source: TeacherSource, *, student_grid: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels that the model of `source` sees.

    Raises:
        TeacherError: a stated size that is no multiple of the patch.
    """
    if source.input_px is None:
        return student_grid[0] * patch[0], student_grid[1] * patch[1]
    size = (source.input_px, source.input_px) if isinstance(source.input_px, int) else tuple(source.input_px)
    if min(size) < 1 or any(s % p for s, p in zip(size, patch, strict=True)):
        near = " x ".join(str(max(1, round(s / p)) * p) for s, p in zip(size, patch, strict=True))
        raise TeacherError(
            f"teacher '{source.name}': input_px {size[0]} x {size[1]} is no multiple of the {patch[0]}-px patch of "
            f"{source.model}; nearest: {near}"
        )
    return size[0], size[1]


def resolve_layer(source: TeacherSource, *, depth: int) -> int:
    """The 0-based block of `source.layer`, which may count from the end.

    Raises:
        TeacherError: the model has no such block.
    """
    if not -depth <= source.layer < depth:
        raise TeacherError(f"teacher '{source.name}': layer {source.layer}, but {source.model} has {depth} blocks")
    return source.layer % depth


def model_label(model: str, source: TeacherSource) -> str:
    """`model` with the overrides in it, for the feature's identity: they change what is computed."""
    if not source.overrides:
        return model
    return f"{model}({', '.join(f'{k}={source.overrides[k]!r}' for k in sorted(source.overrides))})"
