"""AdamW in two learning-rate groups and the poly schedule, as published.

Groups go by module: the backbone, and everything else. Weight decay covers every parameter, norms and biases too.
"""

from __future__ import annotations

import torch
from torch import nn

PAPER_LR = 5e-6
PAPER_HEAD_MULTIPLE = 40.0
PAPER_WEIGHT_DECAY = 0.01
PAPER_POLY_POWER = 0.9
"""Official configurations: backbone 5e-6, everything else 40 times that."""


def build_optimiser(
    student: nn.Module,
    *,
    lr: float = PAPER_LR,
    head_multiple: float = PAPER_HEAD_MULTIPLE,
    weight_decay: float = PAPER_WEIGHT_DECAY,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    fused: bool = False,
) -> torch.optim.AdamW:
    """AdamW over `student.backbone` (at `lr`) and the rest (at `lr * head_multiple`).

    `fused`: PyTorch's one-kernel implementation, for accelerators; it rounds differently.
    """
    backbone = list(student.get_submodule("backbone").parameters())
    inside = {id(p) for p in backbone}
    rest = [p for p in student.parameters() if id(p) not in inside]
    groups = [
        {"params": backbone, "lr": lr, "initial_lr": lr},
        {"params": rest, "lr": lr * head_multiple, "initial_lr": lr * head_multiple},
    ]
    return torch.optim.AdamW(groups, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def poly_factor(step: int, *, total_steps: int, power: float = PAPER_POLY_POWER) -> float:
    """(1 - step / total) ** power, 0 from `total_steps` on."""
    return float(max(0.0, 1 - step / total_steps) ** power)


def set_lr(optimiser: torch.optim.Optimizer, *, factor: float) -> None:
    """Sets every group to its initial learning rate times `factor`."""
    for group in optimiser.param_groups:
        group["lr"] = group["initial_lr"] * factor
