"""What every method takes and returns.

A method's loss is this micro-batch's share: summed over micro-batches and ranks, shares give the step's loss. So
are its terms, except that nothing flows back through them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from rsmtdf.learning.batch import Forward, GlobalCounts, MicroBatch, Normalise

PAPER_CONF_THRESHOLD = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """The methods' settings; each reads its own."""

    conf_threshold: float = PAPER_CONF_THRESHOLD
    """Pseudo-labels count from this confidence on (>=)."""
    distill_loss: str = "mse"
    """A key of `rsmtdf.learning.losses.DISTILL_LOSSES`."""
    min_token_valid: float = 0.0
    """Tokens with a smaller valid share are not distilled; 0 keeps all, padding and seams included (as published)."""
    grids: tuple[tuple[str, tuple[int, int]], ...] = ()
    """(teacher, its patch grid); needed where `min_token_valid` is above 0."""
    normalise: Normalise = "global"
    """`per_rank`: the published arithmetic, which depends on how a batch is spread over ranks."""


StepTerms = Mapping[str, torch.Tensor]
"""Name -> detached scalar, additive over micro-batches and ranks:
loss, loss_x, loss_u, distill, distill/<teacher>, mask_ratio (selected / valid pixels after CutMix), selected."""


class LossFunction(Protocol):
    """The signature of a method."""

    def __call__(
        self, *, student: Forward, ema: Forward, batch: MicroBatch, counts: GlobalCounts, config: MethodConfig
    ) -> tuple[torch.Tensor, StepTerms]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method by name, and what it needs, so that the loop loads nothing else."""

    name: str
    loss: LossFunction
    needs_unlabelled: bool
    needs_targets: bool


def mean_of(parts: Mapping[str, torch.Tensor], *, extra: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, StepTerms]:
    """The mean of a method's terms (the published weighting), and all of them detached, `extra` included."""
    total = torch.stack(list(parts.values())).sum() / len(parts)
    return total, {k: v.detach() for k, v in {"loss": total, **parts, **extra}.items()}
