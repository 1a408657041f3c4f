"""Live teachers as a feature source."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rsmtdf.errors import TeacherError
from rsmtdf.teachers.online import OnlineFeatures
from rsmtdf.teachers.registry import build_teacher
from rsmtdf.teachers.source import TeacherSource


@pytest.fixture(scope="module")
def teachers():
    sources = [
        TeacherSource(
            name=name,
            library="timm",
            model="vit_tiny_patch16_224",
            weights="random",
            seed=seed,
            overrides={"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 48},
        )
        for seed, name in enumerate(("a", "b"))
    ]
    return {s.name: build_teacher(s, student_grid=(3, 3), device=torch.device("cpu")) for s in sources}


PIXELS = torch.arange(2 * 48 * 48 * 3, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(2, 48, 48, 3)


def test_targets_are_each_teachers_tokens(teachers) -> None:
    source = OnlineFeatures(teachers)
    assert source.needs_pixels
    assert source.specs == {"a": teachers["a"].spec, "b": teachers["b"].spec}
    targets = source.fetch(np.arange(2), PIXELS)
    assert list(targets) == ["a", "b"]
    for name in targets:
        assert torch.equal(targets[name], teachers[name](PIXELS))
    assert not torch.equal(targets["a"], targets["b"])


def test_targets_can_stand_in_a_loss(teachers) -> None:
    target = OnlineFeatures(teachers).fetch(np.arange(2), PIXELS)["a"]
    student = torch.zeros_like(target, requires_grad=True)
    F.mse_loss(student, target).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, -2 * target / target.numel())


def test_roundtrip_is_applied_by_name(teachers) -> None:
    def roundtrip(name: str, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.half().float() if name == "a" else tokens

    targets = OnlineFeatures(teachers, roundtrip=roundtrip).fetch(np.arange(2), PIXELS)
    assert torch.equal(targets["a"], teachers["a"](PIXELS).half().float())
    assert torch.equal(targets["b"], teachers["b"](PIXELS))
    assert not any(t.is_inference() for t in targets.values())


def test_pixels_must_be_given_one_for_each_row(teachers) -> None:
    with pytest.raises(TeacherError, match="need the views' pixels"):
        OnlineFeatures(teachers).fetch(np.arange(2), None)
    with pytest.raises(TeacherError, match="2 views for 3 rows"):
        OnlineFeatures(teachers).fetch(np.arange(3), PIXELS)
