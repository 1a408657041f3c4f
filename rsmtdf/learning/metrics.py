"""Segmentation scores from one streamed confusion matrix.

Ignored pixels (label 255) are dropped together with what was predicted there. The published evaluation code keeps
those predictions in its totals, which biases precision, F1 and kappa low (its IoU is right); here all scores come
from the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from rsmtdf.specs import IGNORE_INDEX

Mean = Literal["present", "published"]
"""What a mean over classes runs over, excluded classes always left out.

present: classes that occur in the labels or in the predictions; a score that is undefined counts as 0.
published: all classes; an absent class counts as 0, as in the paper's code (mean of I / (U + 1e-10)).
"""


class Confusion:
    """A confusion matrix that grows batch by batch: int64 [k, k], rows are labels, columns predictions."""

    def __init__(self, *, classes: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros((classes, classes), dtype=torch.int64, device=device)

    def update(self, prediction: torch.Tensor, label: torch.Tensor) -> None:
        """Counts two integer tensors of equal shape; pixels labelled 255 are left out.

        Raises:
            ValueError: shapes differ, or a counted pixel has a value outside the classes.
        """
        if prediction.shape != label.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} differ in shape")
        k = len(self.counts)
        label = label.to(self.counts.device)
        counted = label != IGNORE_INDEX
        rows = label[counted].to(torch.int64)
        columns = prediction.to(self.counts.device)[counted].to(torch.int64)
        for name, values in (("label", rows), ("prediction", columns)):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < k:
                raise ValueError(f"{name} values {int(values.min())}..{int(values.max())} exceed 0..{k - 1}")
        self.counts += torch.bincount(rows * k + columns, minlength=k * k).view(k, k)

    def numpy(self) -> np.ndarray:
        """The counts so far, int64 [k, k], on the CPU."""
        counts: np.ndarray = self.counts.cpu().numpy()
        return counts


def scores(
    counts: np.ndarray, *, classes: Sequence[str], excluded: Sequence[str] = (), mean: Mean = "present"
) -> dict[str, Any]:
    """All scores of a confusion matrix, JSON-ready, as fractions (0..1).

    Args:
        counts: int [k, k], rows are labels.
        classes: k names.
        excluded: names left out of `miou` and `mf1`; `oa` and `kappa` are over all pixels counted.
        mean: see `Mean`.

    Returns:
        `miou`, `mf1`, `oa`, `kappa`; `per_class`: name -> `iou`, `f1`, `precision`, `recall`, `pixels` (labelled),
        `counted` (in the means); `confusion` (lists of int), `classes`, `excluded`, `mean`, `pixels`. An undefined
        score is None: the IoU and F1 of a class neither labelled nor predicted, a precision without prediction, a
        recall without label, and kappa where labels and predictions are one and the same class.
    """
    matrix = np.asarray(counts, dtype=np.int64)
    hit, labelled, predicted = np.diagonal(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    total = int(matrix.sum())
    per_class: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(classes):
        h, n, p = int(hit[i]), int(labelled[i]), int(predicted[i])
        per_class[name] = {
            "iou": _ratio(h, n + p - h),
            "f1": _ratio(2 * h, n + p),
            "precision": _ratio(h, p),
            "recall": _ratio(h, n),
            "pixels": n,
            "counted": name not in set(excluded),
        }
    averaged = [name for name in classes if name not in set(excluded)]
    return {
        "miou": _mean([per_class[name]["iou"] for name in averaged], mean),
        "mf1": _mean([per_class[name]["f1"] for name in averaged], mean),
        "oa": _ratio(int(hit.sum()), total),
        "kappa": _kappa(int(hit.sum()), labelled, predicted, total),
        "per_class": per_class,
        "confusion": matrix.tolist(),
        "classes": list(classes),
        "excluded": list(excluded),
        "mean": mean,
        "pixels": total,
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float | None], mean: Mean) -> float | None:
    counted = [v for v in values if v is not None] if mean == "present" else [v or 0.0 for v in values]
    return sum(counted) / len(counted) if counted else None


def _kappa(hits: int, labelled: np.ndarray, predicted: np.ndarray, total: int) -> float | None:
    """Cohen's kappa, (observed - chance) / (1 - chance); exact integers until the division."""
    chance = sum(int(a) * int(b) for a, b in zip(labelled, predicted, strict=True))
    return _ratio(hits * total - chance, total * total - chance)
