import pytest
import torch

from rsmtdf.errors import TrainingError
from rsmtdf.learning.batch import count_step, cutmix


def test_cutmix_pastes_the_partners_unmixed_values():
    values = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 2, 4, 5)
    partner, box = torch.tensor([1, 0, 2]), torch.tensor([[1, 2, 2, 3], [0, 0, 4, 1], [0, 0, 0, 0]])
    mixed = cutmix(values, partner=partner, box=box)
    assert mixed[0, 0].tolist() == [[0] * 5, [0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0] * 5]
    assert mixed[1, 1].tolist() == [[0, 1, 1, 1, 1]] * 4
    assert torch.equal(mixed[2], values[2])


def test_cutmix_acts_alike_on_every_rank_and_dtype():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 200, (2, 6, 7), generator=g)
    partner, box = torch.tensor([1, 0]), torch.tensor([[2, 1, 3, 4], [0, 3, 6, 2]])
    as_labels = cutmix(labels, partner=partner, box=box)
    as_image = cutmix(labels[:, None].double(), partner=partner, box=box)
    assert torch.equal(as_labels.double(), as_image[:, 0])
    assert cutmix(labels > 100, partner=partner, box=box).dtype == torch.bool
    assert cutmix(labels[:0], partner=partner[:0], box=box[:0]).shape == (0, 6, 7)


def test_counts_are_of_mixed_valid_and_never_zero(tiny):
    batch = tiny.quarter(2)
    mixed = cutmix(batch.valid, partner=batch.partner, box=batch.box)
    assert int(mixed.sum()) != int(batch.valid.sum())
    counts, totals = count_step([batch], normalise="global", reduce=None)
    assert totals.tolist() == [int((batch.labels != 255).sum()), int(mixed.sum()), 3]
    assert [int(counts.labelled_pixels), int(counts.unlabelled_pixels), int(counts.images)] == totals.tolist()
    batch.labels.fill_(255)
    counts, totals = count_step([batch], normalise="global", reduce=None)
    assert int(totals[0]) == 0
    assert int(counts.labelled_pixels) == 1


@pytest.mark.parametrize(("normalise", "expected"), [("global", 3), ("per_rank", 2)])
def test_counts_over_ranks(tiny, normalise, expected):
    def reduce(tensor):
        tensor.copy_(torch.tensor([3, 3, 3, 2]))  # two ranks; the other has as many as make three

    batch = tiny.quarter(0)
    batch.labels.fill_(255)
    batch.labels[0, 0, 0] = 1
    counts, totals = count_step([batch], normalise=normalise, reduce=reduce)
    assert int(counts.labelled_pixels) == expected
    assert totals.tolist() == [3, 3, 3]


def test_a_batch_that_does_not_fit_itself(tiny):
    batch = tiny.quarter(0)
    object.__setattr__(batch, "labels", batch.labels[:, :-1])
    with pytest.raises(TrainingError, match=r"1 \+ 2 views: labels is \(1, 55, 56\), expected \(1, 56, 56\)"):
        count_step([batch], normalise="global", reduce=None)
