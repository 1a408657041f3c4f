"""RS-MTDF: FixMatch, and the student's translated tokens must match every teacher's features.

The distillation covers the labelled weak views and the strong views after CutMix, padding and seams included, as
published; with `min_token_valid` it leaves out tokens that show too little ground.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rsmtdf.errors import TrainingError
from rsmtdf.learning.batch import Forward, GlobalCounts, MicroBatch
from rsmtdf.learning.losses import DISTILL_LOSSES, MASKED_DISTILL_LOSSES
from rsmtdf.learning.methods.fixmatch import fixmatch_terms
from rsmtdf.learning.methods.terms import MethodConfig, StepTerms, mean_of


def rs_mtdf(
    *, student: Forward, ema: Forward, batch: MicroBatch, counts: GlobalCounts, config: MethodConfig
) -> tuple[torch.Tensor, StepTerms]:
    """loss = (loss_x + loss_u + distill) / 3, with distill the mean over teachers.

    Raises:
        TrainingError: the targets are not those of the student's teachers, or of another shape.
    """
    parts, extra, output = fixmatch_terms(student=student, ema=ema, batch=batch, counts=counts, config=config)
    _check_targets(output.translated, batch.targets)
    each = {
        f"distill/{name}": _distill(name, tokens, batch=batch, counts=counts, config=config)
        for name, tokens in output.translated.items()
    }
    parts["distill"] = torch.stack(list(each.values())).sum() / len(each)
    return mean_of(parts, extra={**extra, **each})


def _distill(
    name: str, tokens: torch.Tensor, *, batch: MicroBatch, counts: GlobalCounts, config: MethodConfig
) -> torch.Tensor:
    """One teacher's share of the distillation loss."""
    if name not in counts.tokens:
        return DISTILL_LOSSES[config.distill_loss](tokens, batch.targets[name], images=counts.images)
    kept = batch.kept_tokens(dict(config.grids)[name], min_valid=config.min_token_valid)
    loss = MASKED_DISTILL_LOSSES[config.distill_loss]
    return loss(tokens, batch.targets[name], kept=kept, tokens=counts.tokens[name])


def _check_targets(translated: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> None:
    if not translated:
        raise TrainingError("rs-mtdf needs a student with teachers, found none; use the method fixmatch without them")
    expected = {name: tuple(t.shape) for name, t in translated.items()}
    found = {name: tuple(t.shape) for name, t in targets.items()}
    if expected != found:
        raise TrainingError(
            f"the teachers' targets do not fit the student's translations: expected {expected}, found {found}"
        )
