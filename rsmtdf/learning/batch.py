"""What one training step sees: micro-batches, CutMix inside them, and the step's global denominators.

Losses are sums divided by counts over the *whole* step (all ranks, all accumulations), so how a batch is cut into
micro-batches changes nothing. The counts are therefore taken before the first forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from rsmtdf.errors import TrainingError
from rsmtdf.specs import IGNORE_INDEX

Normalise = Literal["global", "per_rank"]

Reduce = Callable[[torch.Tensor], object]
"""Sums a tensor over all ranks, in place (`torch.distributed.all_reduce`)."""


class Prediction(Protocol):
    """What a student returns: `logits` [b, k, h, w]; `translated`: teacher name -> [b, tokens, dim]."""

    @property
    def logits(self) -> torch.Tensor: ...

    @property
    def translated(self) -> Mapping[str, torch.Tensor]: ...


Forward = Callable[[torch.Tensor], Prediction]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """m labelled and n unlabelled views on the training device; CutMix partners are inside it.

    The strong images come with CutMix already applied; `valid` and what the EMA student says of `weak` are mixed
    here, by the same `partner` and `box`.
    """

    labelled: torch.Tensor
    """Normalised images [m, 3, h, w]."""
    labels: torch.Tensor
    """int64 [m, h, w]; 255 is ignored."""
    weak: torch.Tensor
    """Normalised images [n, 3, h, w], before CutMix."""
    strong: torch.Tensor
    """Normalised images [n, 3, h, w], after CutMix."""
    valid: torch.Tensor
    """bool [n, h, w]: pixels of the weak view that show the ground, before CutMix."""
    partner: torch.Tensor
    """int64 [n]: whose pixels are pasted, as an index into this micro-batch's unlabelled views."""
    box: torch.Tensor
    """int64 [n, 4]: (y, x, h, w) of the paste; h = 0 where there is none."""
    targets: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Teacher name -> [m + n, tokens, dim] for `labelled` then `strong`; empty for methods without teachers."""
    labelled_valid: torch.Tensor | None = None
    """bool [m, h, w]: pixels of the labelled views that show the ground; None: all."""

    def mixed_valid(self) -> torch.Tensor:
        """bool [n, h, w]: `valid` after CutMix."""
        return cutmix(self.valid, partner=self.partner, box=self.box)

    def kept_tokens(self, grid: tuple[int, int], *, min_valid: float) -> torch.Tensor:
        """bool [m + n, tokens]: patches of `grid` whose valid share is at least `min_valid`, as in `targets`."""
        labelled = self.labelled_valid
        if labelled is None:
            labelled = torch.ones_like(self.labels, dtype=torch.bool)
        valid = torch.cat([labelled, self.mixed_valid()]).float().unsqueeze(1)
        return F.adaptive_avg_pool2d(valid, grid).flatten(1) >= min_valid


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalCounts:
    """Denominators of a step's losses: int64 scalars on the device, never below 1 (an empty sum is a zero loss)."""

    labelled_pixels: torch.Tensor
    unlabelled_pixels: torch.Tensor
    """Valid pixels after CutMix, confident or not."""
    images: torch.Tensor
    """Labelled and unlabelled views: what the distillation loss averages over."""
    tokens: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Teacher name -> patch tokens that are distilled; empty where all are (as published)."""


def cutmix(values: torch.Tensor, *, partner: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """`values` [n, ..., h, w] with the partner's values (before any paste) inside each box; without a host sync."""
    height, width = values.shape[-2:]
    y, x, h, w = box.to(values.device).unbind(1)
    rows = torch.arange(height, device=values.device)
    columns = torch.arange(width, device=values.device)
    in_rows = (rows >= y[:, None]) & (rows < (y + h)[:, None])
    in_columns = (columns >= x[:, None]) & (columns < (x + w)[:, None])
    inside = in_rows[:, :, None] & in_columns[:, None, :]
    inside = inside.reshape(values.shape[0], *(1,) * (values.dim() - 3), height, width)
    return torch.where(inside, values[partner.to(values.device)], values)


def count_step(
    micro_batches: Sequence[MicroBatch],
    *,
    normalise: Normalise,
    reduce: Reduce | None,
    min_token_valid: float = 0.0,
    grids: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[GlobalCounts, torch.Tensor]:
    """The step's denominators, and the true counts over all ranks (labelled pixels, unlabelled pixels, images).

    `global`: counts over all ranks. `per_rank`: this rank's own counts times the number of ranks, which is what
    averaging per-rank means gives (the published arithmetic): ranks with fewer valid pixels weigh them more.
    With `min_token_valid`, the tokens of each teacher of `grids` with at least that valid share are counted too.

    Raises:
        TrainingError: no micro-batch, or one whose partners lie outside it.
    """
    if not micro_batches:
        raise TrainingError("a training step needs at least one micro-batch, found none")
    for batch in micro_batches:
        _check_shapes(batch)
    device = micro_batches[0].labelled.device
    masked = dict(grids or {}) if min_token_valid > 0 else {}
    local = torch.zeros(4 + len(masked), dtype=torch.int64, device=device)
    local[3] = 1
    for batch in micro_batches:
        local[0] += (batch.labels != IGNORE_INDEX).sum()
        local[1] += batch.mixed_valid().sum()
        local[2] += batch.labelled.shape[0] + batch.strong.shape[0]
        for i, grid in enumerate(masked.values(), start=4):
            local[i] += batch.kept_tokens(grid, min_valid=min_token_valid).sum()
    total = local.clone()
    if reduce is not None:
        reduce(total)
    used = total if normalise == "global" else local * total[3]
    used = used.clamp(min=1)
    tokens = {name: used[i] for i, name in enumerate(masked, start=4)}
    counts = GlobalCounts(labelled_pixels=used[0], unlabelled_pixels=used[1], images=used[2], tokens=tokens)
    return counts, total[:3]


def _check_shapes(batch: MicroBatch) -> None:
    """Shapes only: values would cost a host sync, and the views' own tests cover them."""
    m, n = batch.labelled.shape[0], batch.strong.shape[0]
    shapes = {
        "labels": (batch.labels.shape, (m, *batch.labelled.shape[-2:])),
        "weak": (batch.weak.shape, batch.strong.shape),
        "valid": (batch.valid.shape, (n, *batch.strong.shape[-2:])),
        "partner": (batch.partner.shape, (n,)),
        "box": (batch.box.shape, (n, 4)),
    }
    for name, (found, expected) in shapes.items():
        if tuple(found) != tuple(expected):
            raise TrainingError(f"micro-batch of {m} + {n} views: {name} is {tuple(found)}, expected {tuple(expected)}")
    for name, target in batch.targets.items():
        if target.shape[0] != m + n:
            raise TrainingError(
                f"micro-batch of {m} + {n} views: the targets of {name} are for {target.shape[0]} views; give them "
                "for the labelled views, then the strong ones"
            )
