"""The full-size student against the recorded forward pass of the published code at 518 px, fp32, batch 2."""

import pytest
import torch
from torch import nn

from rsmtdf.learning.losses import mse
from rsmtdf.student.model import build_student

TOLERANCE = 1e-5
UNBUILT_UNIT = 73_856  # refinenet4's first residual unit: two 3x3 convolutions of 64 channels


@pytest.fixture(scope="module")
def student(parity, paper_spec):
    return parity.fill_student(build_student(paper_spec, seed=0)).eval()


def test_formula_weights_are_the_recorded_ones(parity):
    for name, anchor in parity.anchors.items():
        if name.startswith("input"):
            values = parity.recipe.batch([0], 518, 518)
        else:
            values = parity.recipe.param(name, anchor["shape"])
        assert values.reshape(-1)[:3].tolist() == anchor["first3"], name
        assert values.astype("float64").sum() == pytest.approx(anchor["sum_float64"], rel=1e-12), name


def test_every_official_parameter_has_its_place(parity, student):
    from_official = parity.official_student()
    unbuilt = {n for n in from_official if n == "backbone.mask_token" or "refinenet4.resConfUnit1" in n}
    assert len(unbuilt) == 5
    ours = {parity.ours(name): shape for name, shape in from_official.items() if name not in unbuilt}
    assert {name: list(p.shape) for name, p in student.named_parameters()} == ours
    assert len(ours) == 244
    assert list(student.buffers()) == []


def test_parameter_counts(student):
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(student.backbone) == 22_056_576 - 384  # without the mask token
    assert count(student.decoder) == 2_738_151 - UNBUILT_UNIT
    assert [count(t) for t in student.translators] == [1_181_440, 1_443_840]
    assert [count(p) for p in student.projections] == [295_296, 393_600]


def test_layer_norm_eps_and_no_drop(student):
    # Its effect is below every tolerance here, so the attribute itself is compared.
    assert {m.eps for m in student.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.p for m in student.modules() if isinstance(m, nn.Dropout)} <= {0.0}


@pytest.mark.slow
def test_forward_518(parity, student, formula_teachers):
    meta, probes = parity.json("fwd"), parity.arrays("fwd")
    case = "A_518x518_b2"
    x = torch.from_numpy(parity.recipe.batch([0, 1], 518, 518))
    seen = {"input": x}

    inputs, norms = [], []
    handles = [
        student.backbone.patch_embed.register_forward_pre_hook(lambda _, a: inputs.append(a[0])),
        student.backbone.norm.register_forward_hook(lambda _, __, out: norms.append(out[:, 1:])),
        student.decoder.register_forward_pre_hook(
            lambda _, a: seen.update(zip(("head_2", "head_5", "head_8", "fused"), a[0], strict=True))
        ),
        student.decoder.register_forward_hook(lambda _, __, out: seen.update(head_out=out)),
        student.projections[0].register_forward_hook(lambda _, __, out: seen.update(projected_dino=out)),
        student.projections[1].register_forward_hook(
            lambda _, a, out: seen.update(translated_clip_resized=a[0], projected_clip=out)
        ),
    ]
    with torch.no_grad():
        out = student(x)
    for handle in handles:
        handle.remove()

    assert [tuple(i.shape[-2:]) for i in inputs] == [(518, 518), (224, 224)]
    assert len(norms) == 5
    for layer, tokens in zip((2, 5, 8, 11), norms[:4], strict=True):
        seen[f"student_layer{layer}_norm"] = tokens
    for layer in (2, 5, 8):
        assert torch.equal(seen.pop(f"head_{layer}"), seen[f"student_layer{layer}_norm"])
    seen |= {"x_clip": inputs[1], "student_224_layer11_norm": norms[4], "logits": out.logits}
    seen |= {f"translated_{name}": tokens for name, tokens in out.translated.items()}
    targets = formula_teachers(x)
    seen |= {f"{name}_teacher": tokens for name, tokens in targets.items()}

    recorded = {key.removeprefix(f"{case}/") for key in meta["tensors"]}
    assert set(seen) == recorded
    errors = {
        name: parity.error(tensor, probes[f"{case}/{name}"], meta["tensors"][f"{case}/{name}"])
        for name, tensor in seen.items()
    }
    assert max(errors.values()) <= TOLERANCE, errors

    scalars, images = meta["scalars"][case], torch.tensor(2)
    losses = {name: float(mse(out.translated[name], targets[name], images=images)) for name in targets}
    assert losses["dino"] == pytest.approx(scalars["mse_dino"], rel=5e-7)
    assert losses["clip"] == pytest.approx(scalars["mse_clip"], rel=5e-7)
    assert (losses["dino"] + losses["clip"]) / 2 == pytest.approx(scalars["distill_loss_fp64"], rel=5e-7)
    histogram = torch.bincount(out.logits.argmax(1).reshape(-1), minlength=7)
    moved = (histogram - torch.tensor(scalars["argmax_hist"])).abs().sum()
    assert moved <= 2 * scalars["pixels_with_top2_margin_below_1e-4"]
