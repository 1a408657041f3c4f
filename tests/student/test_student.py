import copy

import pytest
import torch

from rsmtdf.errors import CheckpointError, ConfigError
from rsmtdf.specs import FeatureSpec
from rsmtdf.student.model import StudentSpec, TeacherHead, build_student, load_backbone, teacher_heads

TINY = StudentSpec(
    classes=3,
    overrides=(("depth", 4), ("embed_dim", 16), ("num_heads", 2), ("init_values", 1.0)),
    img_px=56,
    layers=(0, 1, 2, 3),
    dpt_features=8,
    dpt_channels=(4, 4, 8, 8),
    translator_hidden=12,
    teachers=(
        TeacherHead(name="dense.teacher", grid=(4, 4), dim=6, dense=True),
        TeacherHead(name="fixed", grid=(2, 3), dim=5, dense=False),
    ),
)


def change(spec, **fields):
    return StudentSpec.from_dict({**spec.to_dict(), **fields})


def image(*size, seed=0):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def patch_inputs(student, x):
    """Sizes of the student's passes over an input."""
    sizes = []
    handle = student.backbone.patch_embed.register_forward_pre_hook(lambda _, a: sizes.append(tuple(a[0].shape[-2:])))
    with torch.no_grad():
        out = student(x)
    handle.remove()
    return sizes, out


def test_shapes_at_the_training_crop_and_at_other_sizes():
    student = build_student(TINY, seed=0)
    for height, width in ((56, 56), (42, 98), (112, 14)):
        sizes, out = patch_inputs(student, image(height, width))
        # The dense teacher stays on the main pass whatever its grid was in training.
        assert sizes == [(height, width), (28, 42)]
        assert out.logits.shape == (2, 3, height, width)
        assert out.translated["dense.teacher"].shape == (2, height // 14 * (width // 14), 6)
        assert out.translated["fixed"].shape == (2, 6, 5)


def test_without_teachers_there_is_one_pass_and_nothing_fused():
    student = build_student(change(TINY, teachers=()), seed=0)
    fused = []
    student.decoder.register_forward_pre_hook(lambda _, a: fused.append(a[0][3]))
    norms = []
    student.backbone.norm.register_forward_hook(lambda _, __, out: norms.append(out[:, 1:]))
    sizes, out = patch_inputs(student, image(56, 56))
    assert sizes == [(56, 56)]
    assert out.translated == {}
    assert torch.equal(fused[0], norms[3])


def test_equal_grids_share_a_pass_and_other_grids_have_their_own():
    heads = [
        {"name": "a", "grid": [2, 2], "dim": 5, "dense": False},
        {"name": "b", "grid": [3, 3], "dim": 4, "dense": False},
        {"name": "c", "grid": [2, 2], "dim": 3, "dense": False},
    ]
    sizes, out = patch_inputs(build_student(change(TINY, teachers=heads), seed=0), image(56, 56))
    assert sizes == [(56, 56), (28, 28), (42, 42)]
    assert {name: tuple(t.shape[1:]) for name, t in out.translated.items()} == {"a": (4, 5), "b": (9, 4), "c": (4, 3)}


def test_fusion_weights_are_the_students_remainder():
    student = build_student(TINY, seed=0)
    with torch.no_grad():
        for projection, value in zip(student.projections, (10.0, 100.0), strict=True):
            projection.weight.zero_()
            projection.bias.fill_(value)
    last, fused = [], []
    student.backbone.norm.register_forward_hook(lambda _, __, out: last.append(out[:, 1:]))
    student.decoder.register_forward_pre_hook(lambda _, a: fused.append(a[0][3]))
    patch_inputs(student, image(56, 56))
    torch.testing.assert_close(fused[0], 0.8 * last[3] + 11.0)


def test_without_fusion_the_decoder_reads_the_student_alone():
    student = build_student(change(TINY, fusion=False), seed=0)
    assert len(student.projections) == 0
    fused, norms = [], []
    student.decoder.register_forward_pre_hook(lambda _, a: fused.append(a[0][3]))
    student.backbone.norm.register_forward_hook(lambda _, __, out: norms.append(out[:, 1:]))
    _, out = patch_inputs(student, image(56, 56))
    assert torch.equal(fused[0], norms[3])
    assert set(out.translated) == {"dense.teacher", "fixed"}


def test_the_extra_pass_receives_gradient():
    student = build_student(TINY, seed=0)
    student(image(56, 56)).translated["fixed"].sum().backward()
    first = student.backbone.blocks[0].attn.qkv.weight.grad
    assert first is not None
    assert bool(first.any())
    assert student.translators[0][0].weight.grad is None


def test_seed_and_spec_alone_fix_the_weights():
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    a = build_student(TINY, seed=5).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(4)
    b, c = build_student(TINY, seed=5).state_dict(), build_student(TINY, seed=6).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["decoder.project.0.weight"], c["decoder.project.0.weight"])
    assert not torch.equal(a["backbone.blocks.0.mlp.fc1.weight"], c["backbone.blocks.0.mlp.fc1.weight"])


def test_builds_on_the_meta_device():
    with torch.device("meta"):
        student = build_student(StudentSpec(classes=7), seed=0)
    assert all(p.is_meta for p in student.parameters())


def test_the_unreachable_unit_is_not_built():
    names = dict(build_student(TINY, seed=0).named_parameters())
    assert "decoder.refine.2.skip_unit.conv1.weight" in names
    assert "decoder.refine.3.unit.conv1.weight" in names
    assert not any(name.startswith("decoder.refine.3.skip_unit") for name in names)


def test_spec_round_trip():
    assert StudentSpec.from_dict(TINY.to_dict()) == TINY
    with pytest.raises(ValueError, match="no field depth"):
        StudentSpec.from_dict({**TINY.to_dict(), "depth": 3})


def test_heads_from_feature_specs():
    def feature(name, grid, dim):
        return FeatureSpec(
            name=name, library="timm", model="m", weights_sha256="0", input_px=(1, 1), grid=grid, dim=dim
        )

    heads = teacher_heads([feature("d", (37, 37), 768), feature("c", (16, 16), 1024)], student_grid=(37, 37))
    assert heads == (
        TeacherHead(name="d", grid=(37, 37), dim=768, dense=True, weight=0.1),
        TeacherHead(name="c", grid=(16, 16), dim=1024, dense=False, weight=0.1),
    )


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"layers": (0, 1, 2)}, "four ascending layers"),
        ({"layers": (0, 2, 1, 3)}, "four ascending layers"),
        ({"overrides": (("depth", 5), ("embed_dim", 16), ("num_heads", 2))}, "last of layers .* must be 4"),
        ({"overrides": (("checkpoint_path", "x"),)}, "overrides checkpoint_path are not among"),
        ({"overrides": (("drop_path_rate", 0.1),)}, "overrides drop_path_rate are not among"),
        ({"backbone": "vit_smal_patch14"}, "timm has no model 'vit_smal_patch14'"),
        ({"img_px": 60}, "img_px 60 is no multiple"),
        ({"classes": 0}, "at least one class"),
        ({"teachers": [TINY.to_dict()["teachers"][0]] * 2}, "teacher names must differ"),
        ({"teachers": [{"name": "a", "grid": [2, 2], "dim": 5, "dense": True, "weight": 1.0}]}, "sum to less than 1"),
    ],
)
def test_specs_that_cannot_be(fields, match):
    with pytest.raises(ConfigError, match=match):
        build_student(change(TINY, **fields), seed=0)


def test_an_input_that_is_no_multiple_of_the_patch():
    student = build_student(TINY, seed=0)
    with pytest.raises(ConfigError, match="patches of 14 px, so 56 x 60 px does not fit; use multiples of 14, such"):
        student(image(56, 60))


class TestLoadBackbone:
    def weights(self, **prefix):
        state = build_student(TINY, seed=9).backbone.state_dict()
        return {prefix.get("prefix", "") + name: t.clone() for name, t in state.items()}

    def test_timm_and_original_names(self):
        for prefix in ("", "module.backbone."):
            state = self.weights(prefix=prefix) | {f"{prefix}mask_token": torch.zeros(1, 16)}
            if prefix:  # what lies beside the one transformer is no concern of ours
                state["module.head.weight"] = torch.ones(1)
            student = build_student(TINY, seed=0)
            load_backbone(student, state)
            want = self.weights()
            assert all(torch.equal(t, want[name]) for name, t in student.backbone.state_dict().items())

    def test_dinov2_register_names(self):
        spec = change(TINY, overrides=(*TINY.overrides, ("reg_tokens", 2), ("no_embed_class", True)))
        student = build_student(spec, seed=0)
        state = copy.deepcopy(build_student(spec, seed=9).backbone.state_dict())
        table, cls = torch.randn(1, 17, 16), torch.randn(1, 1, 16)
        state["register_tokens"] = state.pop("reg_token")
        state |= {"pos_embed": table, "cls_token": cls}
        load_backbone(student, state)
        assert torch.equal(student.backbone.pos_embed, table[:, 1:])
        assert torch.equal(student.backbone.cls_token, cls + table[:, :1])

    def test_errors_list_names_and_change_nothing(self):
        student = build_student(TINY, seed=0)
        before = copy.deepcopy(student.state_dict())
        state = self.weights()
        del state["norm.weight"]
        state["extra.weight"] = torch.zeros(1)
        state["pos_embed"] = torch.zeros(1, 26, 16)
        with pytest.raises(CheckpointError) as error:
            load_backbone(student, state)
        for part in ("1 missing (norm.weight)", "1 unknown (extra.weight)", "pos_embed is (1, 26, 16), expected (1,"):
            assert part in str(error.value)
        assert "img_px" in str(error.value)
        assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())

    def test_not_exactly_one_transformer(self):
        student = build_student(TINY, seed=0)
        with pytest.raises(CheckpointError, match=r"found none; it begins with conv1\.weight"):
            load_backbone(student, {"conv1.weight": torch.zeros(1)})
        both = self.weights(prefix="student.") | self.weights(prefix="teacher.")
        with pytest.raises(CheckpointError, match=r"found 2 \(student\., teacher\.\)"):
            load_backbone(student, both)
