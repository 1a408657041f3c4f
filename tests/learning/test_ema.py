import pytest
import torch

from rsmtdf.learning.ema import ema_ratio, make_ema, update_ema


def test_ratio_rises_to_the_decay():
    assert [ema_ratio(step) for step in (0, 1, 3, 10_000)] == [0.0, 0.5, 0.75, 0.996]
    assert ema_ratio(1000, decay=0.9) == 0.9


def test_the_ema_is_its_own_model(tiny):
    student = tiny.student()
    ema = make_ema(student)
    assert not ema.training
    assert student.training
    assert not any(p.requires_grad for p in ema.parameters())
    assert all(p.requires_grad for p in student.parameters())
    x = torch.randn(1, 3, 70, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = ema(x).logits
        assert torch.equal(before, student(x).logits)
        # Its position embedding is replaced by a bound method: the copy's must be bound to the copy.
        student.backbone.pos_embed.add_(1.0)
        assert torch.equal(ema(x).logits, before)
        assert not torch.equal(student(x).logits, before)


def test_update_is_a_weighted_mean(tiny):
    student = tiny.student()
    ema = make_ema(student)
    with torch.no_grad():
        for p in student.parameters():
            p.copy_(torch.full_like(p, 3.0))
        for p in ema.parameters():
            p.copy_(torch.full_like(p, 1.0))
    update_ema(ema, student, ratio=0.75)
    assert all(torch.equal(p, torch.full_like(p, 1.5)) for p in ema.parameters())
    update_ema(ema, student, ratio=0.0)
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), student.parameters(), strict=True))


def test_buffers_follow_too():
    class WithBuffers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor([2.0]))
            self.register_buffer("count", torch.tensor(5))

    student = WithBuffers()
    ema = make_ema(student)
    student.mean.fill_(4.0)
    student.count.fill_(7)
    update_ema(ema, student, ratio=0.5)
    assert ema.mean.tolist() == [3.0]
    assert int(ema.count) == 7


def test_other_models_are_refused(tiny):
    with pytest.raises(ValueError):
        update_ema(make_ema(tiny.student()).backbone, tiny.student(), ratio=0.5)
