"""Leaving out tokens that show too little ground: the right tokens, the right denominator, however it is cut."""

from __future__ import annotations

import torch

from rsmtdf.learning.batch import MicroBatch, count_step
from rsmtdf.learning.losses import masked_mse, mse

GRID = (2, 2)


def batch(valid: torch.Tensor, labelled_valid: torch.Tensor | None) -> MicroBatch:
    n = len(valid)
    return MicroBatch(
        labelled=torch.zeros(n, 3, 8, 8),
        labels=torch.zeros(n, 8, 8, dtype=torch.int64),
        weak=torch.zeros(n, 3, 8, 8),
        strong=torch.zeros(n, 3, 8, 8),
        valid=valid,
        partner=torch.arange(n).flip(0),
        box=torch.zeros(n, 4, dtype=torch.int64),
        targets={"t": torch.zeros(2 * n, 4, 3)},
        labelled_valid=labelled_valid,
    )


def test_a_token_is_kept_from_its_valid_share_on() -> None:
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    valid[0, :4, 4:] = False  # the upper right patch
    valid[0, 4:, :2] = False  # half of the lower left one
    kept = batch(valid, None).kept_tokens(GRID, min_valid=0.5)
    assert kept.tolist() == [[True] * 4, [True, False, True, True]], "labelled views first, all valid by default"
    assert batch(valid, valid).kept_tokens(GRID, min_valid=0.51).tolist() == [[True, False, False, True]] * 2


def test_cutmix_moves_validity_with_the_pixels() -> None:
    valid = torch.stack([torch.ones(8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)])
    mixed = batch(valid, None)
    mixed.box[0] = torch.tensor([0, 0, 4, 4])
    assert mixed.kept_tokens(GRID, min_valid=0.5)[2].tolist() == [False, True, True, True]


def test_the_masked_loss_is_the_mean_over_kept_tokens_and_equals_mse_when_all_are() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    every = torch.ones(3, 4, dtype=torch.bool)
    whole = masked_mse(a, b, kept=every, tokens=torch.tensor(12))
    torch.testing.assert_close(whole, mse(a, b, images=torch.tensor(3)))
    kept = every.clone()
    kept[0, 1] = kept[2] = False
    expected = ((a - b) ** 2)[kept].mean()
    torch.testing.assert_close(masked_mse(a, b, kept=kept, tokens=kept.sum()), expected)
    assert masked_mse(a, b, kept=~every, tokens=torch.tensor(1)) == 0


def test_tokens_are_counted_over_the_whole_step() -> None:
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[1, :, 4:] = False
    parts = [batch(valid[:1], None), batch(valid[1:], None)]
    counts, _ = count_step(parts, normalise="global", reduce=None, min_token_valid=0.5, grids={"t": GRID})
    assert int(counts.tokens["t"]) == 4 + 4 + 4 + 2
    assert not count_step(parts, normalise="global", reduce=None, grids={"t": GRID})[0].tokens, "0 keeps the published"
    both = lambda t: t.mul_(2)  # noqa: E731 (two ranks that hold the same)
    per_rank, _ = count_step(parts, normalise="per_rank", reduce=both, min_token_valid=0.5, grids={"t": GRID})
    assert int(per_rank.tokens["t"]) == 2 * 14
