"""Telling want of memory from other errors."""

from __future__ import annotations

import pytest
import torch

from rsmtdf.errors import TeacherError
from rsmtdf.memory import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (TeacherError("not even one view fits: CUDA out of memory"), False),
    ],
)
def test_want_of_memory(error: Exception, is_it: bool) -> None:
    assert is_out_of_memory(error) == is_it
