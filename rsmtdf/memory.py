"""Telling that memory ran out, of a GPU or of the host, from other errors."""

from __future__ import annotations

import torch

from rsmtdf.errors import RsmtdfError

_WORDS = ("out of memory", "can't allocate memory", "alloc_failed")
"""Of messages, lower-case, by which CUDA's libraries, the CPU's allocator and others say what OutOfMemoryError says."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says so, by type or in words."""
    if isinstance(error, RsmtdfError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error).lower() for w in _WORDS)
