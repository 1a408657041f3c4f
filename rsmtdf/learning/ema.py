"""The EMA student: the slow copy that labels weak views, is validated and is shipped."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)

PAPER_EMA_DECAY = 0.996  # official configuration; reached after 250 steps


def make_ema(student: M) -> M:
    """An independent copy of `student` in eval mode that no optimiser and no backward pass touches."""
    return copy.deepcopy(student).eval().requires_grad_(False)


def ema_ratio(step: int, *, decay: float = PAPER_EMA_DECAY) -> float:
    """The share of the old EMA kept after 0-based `step`: 0 at first (EMA = student), then rising to `decay`."""
    return min(1 - 1 / (step + 1), decay)


@torch.no_grad()
def update_ema(ema: nn.Module, student: nn.Module, *, ratio: float) -> None:
    """ema = ratio * ema + (1 - ratio) * student for parameters and float buffers; other buffers are copied."""
    old, new = [], []
    for mine, theirs in zip(_tensors(ema), _tensors(student), strict=True):
        if mine.is_floating_point():
            old.append(mine)
            new.append(theirs.detach())
        else:
            mine.copy_(theirs)
    torch._foreach_mul_(old, ratio)
    torch._foreach_add_(old, new, alpha=1 - ratio)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
