"""timm ViTs as teachers: the contract for each family, original file formats, and what does not fit."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from rsmtdf.errors import ConfigError, TeacherError
from rsmtdf.pixels import normalise, resize
from rsmtdf.teachers.source import TeacherSource
from rsmtdf.teachers.timm_teacher import TimmTeacher
from rsmtdf.testing.teacher_contract import TeacherContract
from rsmtdf.weights import weights_digest

CPU = torch.device("cpu")
TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2}
DINOV2 = TeacherSource(
    name="dino",
    library="timm",
    model="vit_small_patch14_dinov2",
    weights="random",
    overrides={**TINY, "img_size": 70, "init_values": 0.5},
)
REGISTERS = replace(DINOV2, model="vit_small_patch14_reg4_dinov2")
PLAIN = TeacherSource(
    name="plain",
    library="timm",
    model="vit_tiny_patch16_224",
    weights="random",
    layer=-2,
    final_norm=False,
    overrides={**TINY, "img_size": 64},
)
ROTARY = TeacherSource(
    name="dinov3", library="timm", model="vit_small_patch16_dinov3", weights="random", overrides=TINY
)


def build(source: TeacherSource, grid: tuple[int, int] = (4, 4)) -> TimmTeacher:
    return TimmTeacher.build(source, student_grid=grid, device=CPU)


def pixels(b: int, h: int, w: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(b * h * w)
    return torch.randint(0, 256, (b, h, w, 3), dtype=torch.uint8, generator=generator)


class TestDinov2(TeacherContract):
    def make_teacher(self) -> TimmTeacher:
        return build(DINOV2)


class TestRegisters(TeacherContract):
    view_px = (42, 70)

    def make_teacher(self) -> TimmTeacher:
        return build(REGISTERS, (3, 5))


class TestPlain(TeacherContract):
    """16-px patches: 64 px for the 4 x 4 grid that the student gets from 56."""

    def make_teacher(self) -> TimmTeacher:
        return build(PLAIN)


class TestRotary(TeacherContract):
    def make_teacher(self) -> TimmTeacher:
        return build(ROTARY, (4, 6))


class TestHalfPrecision(TeacherContract):
    tolerance = 2e-2

    def make_teacher(self) -> TimmTeacher:
        return build(replace(DINOV2, compute_dtype="bfloat16"))


def test_spec_is_read_from_the_model() -> None:
    spec = build(REGISTERS, (3, 5)).spec
    assert (spec.input_px, spec.grid, spec.patch_px, spec.dim) == ((42, 70), (3, 5), 14, 32)
    assert (spec.prefix_tokens, spec.layer, spec.pos_embed, spec.activation) == (5, 2, "timm", "gelu")
    assert spec.model == (
        "vit_small_patch14_reg4_dinov2(depth=3, embed_dim=32, img_size=70, init_values=0.5, num_heads=2)"
    )
    plain = build(PLAIN).spec
    assert (plain.input_px, plain.grid, plain.prefix_tokens, plain.layer) == ((64, 64), (4, 4), 1, 1)
    assert (plain.pos_embed, plain.final_norm) == ("timm", False)
    assert build(ROTARY).spec.pos_embed == "native"
    assert build(DINOV2).spec.pos_embed == "official"


def test_a_sixteen_pixel_patch_sees_592_pixels_for_the_paper_grid() -> None:
    spec = TimmTeacher.describe(PLAIN, student_grid=(37, 37))
    assert (spec.input_px, spec.grid) == ((592, 592), (37, 37))


@pytest.mark.parametrize("source", [DINOV2, REGISTERS, PLAIN, ROTARY], ids=lambda s: s.model)
def test_description_is_the_spec_without_weights(source: TeacherSource) -> None:
    spec = build(source, (3, 5)).spec
    assert TimmTeacher.describe(source, student_grid=(3, 5)) == replace(spec, weights_sha256="")


def test_features_are_the_named_layer_of_timm() -> None:
    """Through timm's own forward of the whole model, at the table's own size."""
    teacher, views = build(replace(REGISTERS, input_px=70)), pixels(2, 50, 60)
    x = resize(normalise(views), (70, 70))
    reference = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **REGISTERS.overrides).eval()
    reference.load_state_dict(teacher.module.state_dict())
    with torch.no_grad():
        assert torch.allclose(teacher(views), reference.forward_features(x)[:, 5:], atol=1e-6)
        early = build(replace(REGISTERS, input_px=70, layer=0, final_norm=False))
        tokens = reference.blocks[0](reference.norm_pre(reference._pos_embed(reference.patch_embed(x))))
        assert torch.allclose(early(views), tokens[:, 5:], atol=1e-6)


def test_random_weights_are_keyed_by_seed(run_python) -> None:
    digest = build(DINOV2).spec.weights_sha256
    assert build(DINOV2, (3, 3)).spec.weights_sha256 == digest
    assert build(replace(DINOV2, seed=1)).spec.weights_sha256 != digest
    code = (
        "import torch; torch.manual_seed(99)\n"
        "from rsmtdf.teachers.registry import build_teacher, resolve_source\n"
        f"source = resolve_source({ {**DINOV2.__dict__, 'overrides': dict(DINOV2.overrides)}!r})\n"
        "print(build_teacher(source, student_grid=(4, 4), device=torch.device('cpu')).spec.weights_sha256)"
    )
    assert run_python(code).strip() == digest


def original_dinov2(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names and conventions as those of the files that Meta publishes, from the format's description."""
    out = dict(state)
    out["mask_token"] = torch.ones(1, out["cls_token"].shape[-1])
    if "reg_token" in out:
        out["register_tokens"] = out.pop("reg_token")
        row = torch.randn(1, 1, out["cls_token"].shape[-1], generator=torch.Generator().manual_seed(1))
        out["pos_embed"] = torch.cat([row, out["pos_embed"]], dim=1)
        out["cls_token"] = out["cls_token"] - row
    return out


@pytest.mark.parametrize("source", [DINOV2, REGISTERS], ids=lambda s: s.model)
def test_original_dinov2_file_gives_the_same_features(source: TeacherSource, tmp_path: Path) -> None:
    random, views = build(source), pixels(2, 56, 56)
    original = original_dinov2(random.module.state_dict())
    torch.save(original, tmp_path / "dinov2.pth")
    torch.save({"teacher": {f"module.{k}": v for k, v in original.items()}}, tmp_path / "nested.pth")
    del original["mask_token"]
    torch.save(original, tmp_path / "no_mask.pth")
    for file in tmp_path.iterdir():
        loaded = build(replace(source, weights=str(file)))
        assert torch.allclose(loaded(views), random(views), atol=1e-5)
        if source is DINOV2:
            assert loaded.spec == random.spec
            assert torch.equal(loaded(views), random(views))


@pytest.mark.parametrize("source", [DINOV2, REGISTERS, PLAIN, ROTARY], ids=lambda s: s.model)
def test_timm_file_is_loaded_bit_by_bit(source: TeacherSource, tmp_path: Path) -> None:
    random, views = build(source), pixels(1, 56, 56)
    head = {"head.weight": torch.ones(10, 32), "head.bias": torch.ones(10)}
    safetensors.torch.save_file({**random.module.state_dict(), **head}, tmp_path / "m.safetensors")
    loaded = build(replace(source, weights=str(tmp_path / "m.safetensors")))
    assert loaded.spec == random.spec
    assert torch.equal(loaded(views), random(views))


def test_half_precision_file_is_computed_in_float32(tmp_path: Path) -> None:
    state = {k: v.half() for k, v in build(DINOV2).module.state_dict().items()}
    torch.save(state, tmp_path / "half.pth")
    loaded = build(replace(DINOV2, weights=str(tmp_path / "half.pth")))
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    assert loaded.spec.weights_sha256 == weights_digest({k: v.float() for k, v in state.items()})


def test_position_table_of_another_size_is_kept(tmp_path: Path) -> None:
    """It is resampled in the forward pass, by the named rule: timm would do it on loading, by its own."""
    at_98 = build(replace(DINOV2, overrides={**DINOV2.overrides, "img_size": 98}))
    torch.save(dict(at_98.module.state_dict()), tmp_path / "at98.pth")
    loaded = build(replace(DINOV2, weights=str(tmp_path / "at98.pth")))
    assert loaded.module.get_parameter("pos_embed").shape == (1, 50, 32)
    assert loaded.spec.weights_sha256 == at_98.spec.weights_sha256
    assert torch.equal(loaded(pixels(1, 56, 56)), at_98(pixels(1, 56, 56)))


def test_position_rules_differ() -> None:
    official, timms = build(DINOV2, (4, 6)), build(replace(DINOV2, pos_embed="timm"), (4, 6))
    assert official.spec.weights_sha256 == timms.spec.weights_sha256
    assert official.spec != timms.spec
    views = pixels(1, 56, 84)
    assert float((official(views) - timms(views)).abs().max()) > 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_is_close_and_named(dtype: str) -> None:
    full, half = build(DINOV2), build(replace(DINOV2, compute_dtype=dtype))
    views = pixels(2, 56, 56)
    assert half(views).dtype == torch.float32
    error = float((full(views) - half(views)).norm() / full(views).norm())
    assert 1e-5 < error < 2e-2
    assert half.spec == replace(full.spec, compute_dtype=dtype, attention_dtype=dtype)


def test_wrong_weights_name_what_differs_and_the_likely_model(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    source = TeacherSource(name="t", library="timm", model="vit_small_patch14_dinov2", weights=str(path))
    with torch.device("meta"):
        others = {
            name: timm.create_model(name, num_classes=0).state_dict()
            for name in ("vit_base_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_224")
        }
    for name, shapes in others.items():
        torch.save({k: torch.zeros(()).expand(v.shape) for k, v in shapes.items()}, path)
        with pytest.raises(TeacherError, match=f"like {name}") as caught:
            build(source)
        assert "w.pth" in str(caught.value)
    state = dict(build(DINOV2).module.state_dict())
    del state["blocks.2.mlp.fc1.weight"], state["norm.bias"]
    torch.save({**state, "extra": torch.ones(1)}, path)
    with pytest.raises(TeacherError, match=r"2 missing \(blocks.2.mlp.fc1.weight, norm.bias\); 1 unexpected \(extra\)"):
        build(replace(DINOV2, weights=str(path)))
    torch.save({"visual.conv1.weight": torch.ones(8, 3, 2, 2)}, path)
    with pytest.raises(TeacherError, match="library open_clip"):
        build(source)


def test_missing_file_and_unpublished_weights() -> None:
    with pytest.raises(TeacherError, match=r"'dino': no weights file at /nowhere/x\.pth"):
        build(replace(DINOV2, weights="/nowhere/x.pth"))
    with pytest.raises(TeacherError, match="timm publishes no weights"):
        build(replace(PLAIN, weights="hub", model="vit_base_patch32_plus_256", overrides={}))


def test_offline_hub_names_file_and_remedy() -> None:
    source = TeacherSource(name="d", library="timm", model="vit_small_patch14_dinov2", weights="hf:o/r/f.pth")
    with pytest.raises(TeacherError, match=r"o/r \(f\.pth\) on huggingface.co.*run this command once"):
        TimmTeacher.fetch(source)


def test_wrong_choices_are_named() -> None:
    with pytest.raises(ConfigError, match="timm has no model 'vit_smal'"):
        build(replace(DINOV2, model="vit_smal"))
    with pytest.raises(TeacherError, match="cannot build resnet18 as a vision transformer"):
        build(replace(DINOV2, model="resnet18", overrides={"img_size": 64}))
    with pytest.raises(TeacherError, match="layer 3, but vit_small_patch14_dinov2 has 3 blocks"):
        build(replace(DINOV2, layer=3))
    with pytest.raises(TeacherError, match=r"input_px 60 x 60 is no multiple of the 14-px patch.*56 x 56"):
        build(replace(DINOV2, input_px=60))
    with pytest.raises(ConfigError, match="cannot be built"):
        build(replace(DINOV2, overrides={"nonsense": 3}))


def test_features_that_are_not_finite_are_an_error() -> None:
    teacher = build(DINOV2)
    x = normalise(pixels(3, 56, 56))
    x[1, 0, 3, 3] = torch.inf
    with pytest.raises(TeacherError, match=r"teacher 'dino' gave NaN or infinite features at batch position 1 \(of 3"):
        teacher.features(x)
    with pytest.raises(TeacherError, match=r"takes images \[b, 3, 56, 56\], got \[3, 3, 50, 56\]"):
        teacher.features(x[:, :, :50])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_runs_in_its_dtype_without_gradients_and_with_fused_attention(dtype: str) -> None:
    teacher = build(replace(DINOV2, compute_dtype=dtype))
    (block, *_) = teacher.module.blocks
    seen = []
    block.attn.qkv.register_forward_hook(
        lambda module, given, out: seen.append((out.dtype, torch.is_inference_mode_enabled()))
    )
    assert teacher(pixels(1, 56, 56)).dtype == torch.float32
    assert seen == [(getattr(torch, dtype), True)]
    assert all(b.attn.fused_attn for b in teacher.module.blocks), "scaled_dot_product_attention"


def test_a_compiled_teacher_is_the_same_teacher() -> None:
    """The backend `eager` compiles nothing, so the bits are the same too; others may round in another order."""
    plain, compiled = build(DINOV2), build(DINOV2)
    compiled.compile(backend="eager")
    assert (plain.is_compiled, compiled.is_compiled) == (False, True)
    assert compiled.spec == plain.spec
    for b in (2, 1):
        assert torch.equal(compiled(pixels(b, 56, 56)), plain(pixels(b, 56, 56)))
