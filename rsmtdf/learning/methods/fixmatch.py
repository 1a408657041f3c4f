"""FixMatch with CutMix: the EMA student labels weak views, the student must agree on the strong ones."""

from __future__ import annotations

import torch

from rsmtdf.learning.batch import Forward, GlobalCounts, MicroBatch, Prediction, cutmix
from rsmtdf.learning.losses import consistency, cross_entropy, pseudo_labels
from rsmtdf.learning.methods.terms import MethodConfig, StepTerms, mean_of


def fixmatch(
    *, student: Forward, ema: Forward, batch: MicroBatch, counts: GlobalCounts, config: MethodConfig
) -> tuple[torch.Tensor, StepTerms]:
    """loss = (loss_x + loss_u) / 2."""
    parts, extra, _ = fixmatch_terms(student=student, ema=ema, batch=batch, counts=counts, config=config)
    return mean_of(parts, extra=extra)


def fixmatch_terms(
    *, student: Forward, ema: Forward, batch: MicroBatch, counts: GlobalCounts, config: MethodConfig
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Prediction]:
    """FixMatch's two losses, its counts, and the student's output for the labelled then the strong views."""
    with torch.no_grad():
        confidence, label = pseudo_labels(ema(batch.weak).logits)
    confidence = cutmix(confidence, partner=batch.partner, box=batch.box)
    label = cutmix(label, partner=batch.partner, box=batch.box)
    selected = (confidence >= config.conf_threshold) & batch.mixed_valid()

    output = student(torch.cat([batch.labelled, batch.strong]))
    m = batch.labelled.shape[0]
    labelled, strong = output.logits[:m], output.logits[m:]
    parts = {
        "loss_x": cross_entropy(labelled, batch.labels, pixels=counts.labelled_pixels),
        "loss_u": consistency(strong, label, selected, pixels=counts.unlabelled_pixels),
    }
    count = selected.sum()
    # An integer quotient would be float32 even in a float64 run.
    extra = {"selected": count, "mask_ratio": count.to(confidence.dtype) / counts.unlabelled_pixels}
    return parts, extra, output
