import pytest

from rsmtdf.learning.optim import build_optimiser, poly_factor, set_lr


def test_groups_are_by_module_and_decay_everything(tiny):
    student = tiny.student()
    optimiser = build_optimiser(student)
    backbone, rest = optimiser.param_groups
    assert [backbone["lr"], rest["lr"]] == [5e-6, pytest.approx(2e-4, rel=1e-15)]
    assert {id(p) for p in backbone["params"]} == {id(p) for p in student.backbone.parameters()}
    assert len(backbone["params"]) + len(rest["params"]) == len(list(student.parameters()))
    assert [g["weight_decay"] for g in optimiser.param_groups] == [0.01, 0.01]
    assert [g["betas"] for g in optimiser.param_groups] == [(0.9, 0.999)] * 2


def test_poly(tiny):
    assert poly_factor(0, total_steps=10) == 1.0
    assert poly_factor(5, total_steps=10) == 0.5**0.9
    assert poly_factor(10, total_steps=10) == poly_factor(12, total_steps=10) == 0.0
    optimiser = build_optimiser(tiny.student(), lr=1.0, head_multiple=3.0)
    set_lr(optimiser, factor=0.5)
    set_lr(optimiser, factor=0.25)
    assert [g["lr"] for g in optimiser.param_groups] == [0.25, 0.75]
