import math

import torch

from rsmtdf.learning.losses import consistency, cross_entropy, mse, pseudo_labels


def test_cross_entropy_is_a_sum_over_a_given_count():
    logits = torch.zeros(1, 4, 1, 3, dtype=torch.float64)
    labels = torch.tensor([[[0, 255, 3]]])
    loss = cross_entropy(logits, labels, pixels=torch.tensor(10))
    assert math.isclose(float(loss), 2 * math.log(4) / 10, rel_tol=1e-15)


def test_all_ignored_is_zero_with_zero_gradient():
    logits = torch.randn(1, 2, 2, 2, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 2, 2), 255), pixels=torch.tensor(1))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_pseudo_labels():
    logits = torch.tensor([1.0, 3.0]).log().reshape(1, 2, 1, 1)
    confidence, label = pseudo_labels(logits)
    assert label.tolist() == [[[1]]]
    torch.testing.assert_close(confidence, torch.tensor([[[0.75]]]))


def test_consistency_counts_selected_and_divides_by_all():
    logits = torch.zeros(1, 2, 1, 4)
    selected = torch.tensor([[[True, False, False, True]]])
    loss = consistency(logits, torch.zeros(1, 1, 4, dtype=torch.int64), selected, pixels=torch.tensor(4))
    torch.testing.assert_close(loss, torch.tensor(2 * math.log(2) / 4))


def test_mse_equals_the_mean_when_all_images_are_here():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 5, 7, generator=g), torch.randn(3, 5, 7, generator=g)
    torch.testing.assert_close(mse(a, b, images=torch.tensor(3)), ((a - b) ** 2).mean())


def test_dtypes_widen_and_float64_stays():
    a = torch.randn(1, 2, 3)
    assert mse(a.bfloat16(), a.half(), images=torch.tensor(1)).dtype == torch.float32
    assert mse(a.double(), a, images=torch.tensor(1)).dtype == torch.float64
    labels = torch.zeros(1, 1, 1, dtype=torch.int64)
    assert cross_entropy(torch.zeros(1, 2, 1, 1).bfloat16(), labels, pixels=torch.tensor(1)).dtype == torch.float32
