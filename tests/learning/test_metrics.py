"""Scores against the textbook formulas on explicit pixel lists."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rsmtdf.learning.metrics import Confusion, scores

NAMES = ("a", "b", "c", "d")


def _pixels(seed: int, *, n: int = 4000, k: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels that agree more than by chance; a tenth is ignored."""
    rng = np.random.Generator(np.random.Philox(seed))
    label = rng.integers(0, k, n)
    prediction = np.where(rng.random(n) < 0.6, label, rng.integers(0, k, n))
    label[rng.random(n) < 0.1] = 255
    return prediction.astype(np.int64), label.astype(np.uint8)


def _count(prediction: np.ndarray, label: np.ndarray, *, k: int = 4) -> np.ndarray:
    confusion = Confusion(classes=k)
    confusion.update(torch.from_numpy(prediction), torch.from_numpy(label))
    return confusion.numpy()


@pytest.mark.parametrize("seed", range(3))
def test_all_scores_equal_the_formulas_over_pixels(seed: int) -> None:
    prediction, label = _pixels(seed)
    found = scores(_count(prediction, label), classes=NAMES)
    p, t = prediction[label != 255], label[label != 255]
    for i, name in enumerate(NAMES):
        tp, fp, fn = ((p == i) & (t == i)).sum(), ((p == i) & (t != i)).sum(), ((p != i) & (t == i)).sum()
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        expected = {
            "iou": tp / (tp + fp + fn),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            "pixels": (t == i).sum(),
            "counted": True,
        }
        assert found["per_class"][name] == pytest.approx(expected)
    assert found["miou"] == pytest.approx(np.mean([c["iou"] for c in found["per_class"].values()]))
    assert found["mf1"] == pytest.approx(np.mean([c["f1"] for c in found["per_class"].values()]))
    assert found["oa"] == pytest.approx((p == t).mean())
    chance = sum((p == i).mean() * (t == i).mean() for i in range(4))
    assert found["kappa"] == pytest.approx(((p == t).mean() - chance) / (1 - chance))
    assert found["pixels"] == (label != 255).sum()
    json.dumps(found, allow_nan=False)


def test_counting_in_batches_of_any_shape_is_counting_at_once() -> None:
    prediction, label = _pixels(5)
    confusion = Confusion(classes=4)
    for p, t in zip(prediction.reshape(10, 20, 20), label.reshape(10, 20, 20), strict=True):
        confusion.update(torch.from_numpy(p)[None], torch.from_numpy(t)[None])
    assert np.array_equal(confusion.numpy(), _count(prediction, label))
    assert confusion.counts.dtype == torch.int64


def test_predictions_on_ignored_pixels_never_count() -> None:
    prediction, label = _pixels(6)
    other = np.where(label == 255, (prediction + 1) % 4, prediction)
    assert (other != prediction).any()
    assert np.array_equal(_count(other, label), _count(prediction, label))
    # Not even a value that is no class.
    assert np.array_equal(_count(np.where(label == 255, 255, prediction), label), _count(prediction, label))


def test_absent_classes_are_none_and_the_two_means_differ_by_them() -> None:
    # b is neither labelled nor predicted; c is labelled and never found; d is predicted and never there.
    counts = np.array([[6, 0, 0, 2], [0, 0, 0, 0], [4, 0, 0, 0], [0, 0, 0, 0]])
    found = scores(counts, classes=NAMES)
    unseen = {"pixels": 0, "counted": True}
    assert found["per_class"]["b"] == {"iou": None, "f1": None, "precision": None, "recall": None, **unseen}
    assert found["per_class"]["c"] == {"iou": 0, "f1": 0, "precision": None, "recall": 0, "pixels": 4, "counted": True}
    assert found["per_class"]["d"] == {"iou": 0, "f1": 0, "precision": 0, "recall": None, **unseen}
    assert found["miou"] == pytest.approx((6 / 12) / 3)
    published = scores(counts, classes=NAMES, mean="published")
    assert published["miou"] == pytest.approx((6 / 12) / 4)
    assert published["mf1"] == pytest.approx((12 / 18) / 4)
    assert published["mean"] == "published"


def test_excluded_classes_leave_the_means_alone() -> None:
    prediction, label = _pixels(7)
    counts = _count(prediction, label)
    every, some = scores(counts, classes=NAMES), scores(counts, classes=NAMES, excluded=("b",))
    assert some["miou"] == pytest.approx(np.mean([every["per_class"][n]["iou"] for n in "acd"]))
    assert some["mf1"] == pytest.approx(np.mean([every["per_class"][n]["f1"] for n in "acd"]))
    assert (some["oa"], some["kappa"]) == (every["oa"], every["kappa"])
    every["per_class"]["b"]["counted"] = False
    assert some["per_class"] == every["per_class"]


def test_nothing_counted_and_one_class_only() -> None:
    empty = scores(np.zeros((4, 4), int), classes=NAMES)
    assert [empty[k] for k in ("miou", "mf1", "oa", "kappa")] == [None] * 4
    single = scores(np.diag([9, 0, 0, 0]), classes=NAMES)
    assert single["miou"] == single["oa"] == 1
    assert single["kappa"] is None


def test_large_counts_stay_exact() -> None:
    counts = np.array([[2**40, 1], [1, 2**40]])
    assert scores(counts, classes=("a", "b"))["kappa"] == pytest.approx(1 - 2 * 2**-40, abs=1e-15)


def test_wrong_values_are_refused_instead_of_counted_elsewhere() -> None:
    label = torch.tensor([0, 1, 255], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"prediction values 0\.\.2 exceed 0\.\.1"):
        Confusion(classes=2).update(torch.tensor([0, 2, 0]), label)
    with pytest.raises(ValueError, match=r"label values 0\.\.7"):
        Confusion(classes=2).update(torch.tensor([0, 1, 0]), torch.tensor([0, 7, 255], dtype=torch.uint8))
    with pytest.raises(ValueError, match="differ in shape"):
        Confusion(classes=2).update(torch.zeros(1, 3, dtype=torch.int64), label)
