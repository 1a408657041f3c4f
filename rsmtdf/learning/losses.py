"""The losses as sums: each divides by a denominator of the whole step, given by the caller.

All of them compute in float32 at least, whatever autocast made of the predictions, and in float64 for float64
models. An empty sum (nothing labelled, nothing valid) is zero with zero gradient, never 0/0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from rsmtdf.specs import IGNORE_INDEX


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *, pixels: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of logits [b, k, h, w] over labels [b, h, w] that are not ignored, by `pixels`."""
    return F.cross_entropy(wide(logits), labels, ignore_index=IGNORE_INDEX, reduction="sum") / pixels


def pseudo_labels(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(confidence [b, h, w], label int64 [b, h, w]): the largest class probability and its class."""
    confidence, label = wide(logits).softmax(dim=1).max(dim=1)
    return confidence, label


def consistency(
    logits: torch.Tensor, labels: torch.Tensor, selected: torch.Tensor, *, pixels: torch.Tensor
) -> torch.Tensor:
    """Cross entropy over `selected` (bool [b, h, w]), divided by `pixels`: all valid ones, not the selected only."""
    kept = labels.masked_fill(~selected, IGNORE_INDEX)
    return F.cross_entropy(wide(logits), kept, ignore_index=IGNORE_INDEX, reduction="sum") / pixels


def mse(predicted: torch.Tensor, target: torch.Tensor, *, images: torch.Tensor) -> torch.Tensor:
    """Squared error of [b, tokens, dim] summed over the batch, averaged over tokens and channels, by `images`."""
    predicted = wide(predicted)
    total = F.mse_loss(predicted, target.to(predicted.dtype), reduction="sum")
    return total / (predicted.shape[1] * predicted.shape[2]) / images


def masked_mse(
    predicted: torch.Tensor, target: torch.Tensor, *, kept: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """As `mse`, over the tokens `kept` (bool [b, tokens]) alone, averaged over channels, by `tokens`."""
    predicted = wide(predicted)
    error = (predicted - target.to(predicted.dtype)).square().mean(dim=2)
    return torch.where(kept, error, 0).sum() / tokens


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or in float64 where it is so already."""
    return x if x.dtype == torch.float64 else x.float()


DistillLoss = Callable[..., torch.Tensor]

DISTILL_LOSSES: dict[str, DistillLoss] = {"mse": mse}
"""Name -> loss(predicted, target, *, images), over all tokens. `mse` is the paper's."""
MASKED_DISTILL_LOSSES: dict[str, DistillLoss] = {"mse": masked_mse}
"""The same names -> loss(predicted, target, *, kept, tokens), over the tokens that show enough ground."""
