"""One training step: every micro-batch's share of the loss, gradients summed over ranks, AdamW, schedule, EMA.

No DDP wrapper: shares already carry global denominators, so gradients are *summed* by a plain all_reduce, and a
step is the same whether its images are spread over ranks or over accumulations. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from rsmtdf.errors import ConfigError
from rsmtdf.learning.batch import MicroBatch, Reduce, count_step
from rsmtdf.learning.ema import PAPER_EMA_DECAY, ema_ratio, update_ema
from rsmtdf.learning.methods import Method, MethodConfig
from rsmtdf.learning.optim import PAPER_POLY_POWER, poly_factor, set_lr

BUCKET_BYTES = 64 << 20  # of gradients per all_reduce: few calls, little extra memory


def train_step(
    *,
    student: nn.Module,
    ema: nn.Module,
    optimiser: torch.optim.Optimizer,
    method: Method,
    config: MethodConfig,
    micro_batches: Sequence[MicroBatch],
    step: int,
    total_steps: int,
    poly_power: float = PAPER_POLY_POWER,
    ema_decay: float = PAPER_EMA_DECAY,
    reduce: Reduce | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Trains `student` in place by one step and returns the step's terms.

    Args:
        student: in train mode, on the device of the batches.
        ema: from `make_ema`; it labels the weak views before, and is updated with the weights after, the step.
        optimiser: from `build_optimiser`. The step runs at the learning rate that the previous one left; then
            `poly_factor(step)` is set. So steps 0 and 1 both run at the initial rate, as published.
        method: an entry of `METHODS`.
        config: the method's settings.
        micro_batches: all of this rank's share of the global batch.
        step: 0-based, global.
        total_steps: of the whole schedule.
        poly_power: exponent of the schedule.
        ema_decay: the EMA's final ratio.
        reduce: sums a tensor over ranks in place; None for one process.
        autocast: torch.bfloat16 to run the forward passes in it; None for the models' own dtype.

    Returns:
        Scalars on the device, over all ranks: the method's terms, and int64 `labelled_pixels` and
        `unlabelled_pixels`. A step with none of either has a zero loss there; the caller says so.

    Raises:
        TrainingError: micro-batches that do not fit the method or themselves.
        ConfigError: an autocast dtype that would need loss scaling.
    """
    if autocast not in (None, torch.bfloat16):
        raise ConfigError(f"autocast to {autocast} would need loss scaling; use torch.bfloat16 or None")
    optimiser.zero_grad(set_to_none=True)
    counts, totals = count_step(
        micro_batches,
        normalise=config.normalise,
        reduce=reduce,
        min_token_valid=config.min_token_valid if method.needs_targets else 0.0,
        grids=dict(config.grids),
    )
    device = totals.device
    sums: dict[str, torch.Tensor] = {}
    for batch in micro_batches:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            loss, terms = method.loss(student=student, ema=ema, batch=batch, counts=counts, config=config)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, term in terms.items():
            sums[name] = sums[name] + term if name in sums else term
    if reduce is not None:
        sum_gradients((p for group in optimiser.param_groups for p in group["params"]), reduce)
        _sum_terms(sums, reduce)
    optimiser.step()
    set_lr(optimiser, factor=poly_factor(step, total_steps=total_steps, power=poly_power))
    update_ema(ema, student, ratio=ema_ratio(step, decay=ema_decay))
    return {**sums, "labelled_pixels": totals[0], "unlabelled_pixels": totals[1]}


@torch.no_grad()
def sum_gradients(parameters: Iterable[torch.Tensor], reduce: Reduce) -> None:
    """Sums the gradients over ranks in place, in buckets. Every rank holds the same parameters in the same order."""
    bucket: list[torch.Tensor] = []
    size = 0
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if bucket and (grad.dtype != bucket[0].dtype or size + grad.nbytes > BUCKET_BYTES):
            _sum_bucket(bucket, reduce)
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.nbytes
    if bucket:
        _sum_bucket(bucket, reduce)


def _sum_bucket(grads: list[torch.Tensor], reduce: Reduce) -> None:
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    reduce(flat)
    parts = torch.split(flat, [grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])


def _sum_terms(sums: dict[str, torch.Tensor], reduce: Reduce) -> None:
    """Sums the terms over ranks in place: one call per dtype, names sorted so that ranks agree on the order."""
    for dtype in sorted({term.dtype for term in sums.values()}, key=str):
        names = sorted(name for name, term in sums.items() if term.dtype == dtype)
        stacked = torch.stack([sums[name] for name in names])
        reduce(stacked)
        sums.update(zip(names, stacked.unbind(), strict=True))
