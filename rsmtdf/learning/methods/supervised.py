"""The labelled cross entropy alone: the lower bound every other method is measured against."""

from __future__ import annotations

import torch

from rsmtdf.learning.batch import Forward, GlobalCounts, MicroBatch
from rsmtdf.learning.losses import cross_entropy
from rsmtdf.learning.methods.terms import MethodConfig, StepTerms, mean_of


def supervised(
    *, student: Forward, ema: Forward, batch: MicroBatch, counts: GlobalCounts, config: MethodConfig
) -> tuple[torch.Tensor, StepTerms]:
    """loss = loss_x."""
    logits = student(batch.labelled).logits
    return mean_of({"loss_x": cross_entropy(logits, batch.labels, pixels=counts.labelled_pixels)}, extra={})
