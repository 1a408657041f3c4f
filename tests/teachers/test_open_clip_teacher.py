"""open_clip image towers as teachers: the contract, OpenAI's and bare files, and the QuickGELU trap."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

from rsmtdf.errors import ConfigError, TeacherError
from rsmtdf.pixels import normalise, resize
from rsmtdf.teachers.open_clip_teacher import OpenClipTeacher
from rsmtdf.teachers.source import TeacherSource
from rsmtdf.testing.teacher_contract import TeacherContract

CPU = torch.device("cpu")
TINY = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 14, "image_size": 56, "embed_dim": 24}
CLIP = TeacherSource(
    name="clip",
    library="open_clip",
    model="ViT-L-14-quickgelu",
    weights="random",
    input_px=56,
    final_norm=False,
    overrides=TINY,
)
SIGLIP = TeacherSource(
    name="siglip",
    library="open_clip",
    model="ViT-B-16-SigLIP",
    weights="random",
    overrides={"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "image_size": 224},
)


def build(source: TeacherSource, grid: tuple[int, int] = (5, 5)) -> OpenClipTeacher:
    return OpenClipTeacher.build(source, student_grid=grid, device=CPU)


def pixels(b: int, h: int = 70, w: int = 70) -> torch.Tensor:
    generator = torch.Generator().manual_seed(b)
    return torch.randint(0, 256, (b, h, w, 3), dtype=torch.uint8, generator=generator)


class TestFixedGrid(TeacherContract):
    """Like the paper's CLIP: 56 px whatever the views' size."""

    view_px = (70, 84)

    def make_teacher(self) -> OpenClipTeacher:
        return build(CLIP)


class TestDense(TeacherContract):
    """The position table is resampled to the student's oblong grid."""

    view_px = (56, 98)

    def make_teacher(self) -> OpenClipTeacher:
        return build(replace(CLIP, input_px=None, final_norm=True), (4, 7))


class TestTimmTower(TeacherContract):
    def make_teacher(self) -> OpenClipTeacher:
        return build(SIGLIP, (4, 4))


def test_spec_is_read_from_the_model() -> None:
    spec = build(CLIP).spec
    assert (spec.input_px, spec.grid, spec.patch_px, spec.dim) == ((56, 56), (4, 4), 14, 32)
    assert (spec.prefix_tokens, spec.layer, spec.pos_embed, spec.activation) == (1, 2, "native", "quick_gelu")
    assert build(replace(CLIP, overrides={**TINY, "quick_gelu": False})).spec.activation == "gelu"
    assert (build(replace(CLIP, input_px=None), (4, 7)).spec.grid) == (4, 7)
    siglip = build(SIGLIP, (4, 4)).spec
    assert (siglip.grid, siglip.dim, siglip.prefix_tokens, siglip.layer) == ((4, 4), 192, 1, 11)


@pytest.mark.parametrize("source", [CLIP, replace(CLIP, input_px=None), SIGLIP], ids=["fixed", "dense", "timm"])
def test_description_is_the_spec_without_weights(source: TeacherSource) -> None:
    spec = build(source, (4, 7)).spec
    assert OpenClipTeacher.describe(source, student_grid=(4, 7)) == replace(spec, weights_sha256="")


def test_features_come_before_the_last_norm_of_the_tower() -> None:
    """Against a hook on open_clip's own forward pass of the whole tower."""
    teacher, views = build(CLIP), pixels(2)
    seen = []
    hook = teacher.module.get_submodule("transformer").register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        teacher.module(resize(normalise(views), (56, 56)))
        hook.remove()
        assert torch.allclose(teacher(views), seen[0][:, 1:], atol=1e-5)
        normed = build(replace(CLIP, final_norm=True))(views)
        assert torch.allclose(normed, teacher.module.get_submodule("ln_post")(seen[0])[:, 1:], atol=1e-5)
        early = build(replace(CLIP, layer=0))(views)
        assert float((early - teacher(views)).abs().max()) > 1e-3


def test_random_weights_are_keyed_by_seed_and_the_text_tower_is_gone() -> None:
    teacher = build(CLIP)
    assert build(replace(CLIP, input_px=None)).spec.weights_sha256 == teacher.spec.weights_sha256
    assert build(replace(CLIP, seed=1)).spec.weights_sha256 != teacher.spec.weights_sha256
    assert not any("text" in n or "token_embedding" in n for n, _ in teacher.module.named_parameters())


def whole_clip(teacher: OpenClipTeacher) -> dict[str, torch.Tensor]:
    """The state dict of a CLIP with the teacher's image tower and some text tower."""
    text = {"positional_embedding": torch.ones(7, 8), "token_embedding.weight": torch.ones(5, 8)}
    tower = {f"visual.{k}": v.clone() for k, v in teacher.module.state_dict().items()}
    return {**tower, **text, "logit_scale": torch.tensor(4.6), "text_projection": torch.ones(8, 24)}


def test_every_format_is_loaded_bit_by_bit(tmp_path: Path) -> None:
    random, views = build(CLIP), pixels(2)
    state = whole_clip(random)
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "trained.pt")
    torch.save(dict(random.module.state_dict()), tmp_path / "tower.pt")
    for file in tmp_path.iterdir():
        loaded = build(replace(CLIP, weights=str(file)))
        assert loaded.spec == random.spec
        assert torch.equal(loaded(views), random(views))


def save_openai(state: dict[str, torch.Tensor], path: Path) -> None:
    """A TorchScript archive in half precision with OpenAI's three size entries."""
    root = nn.Module()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_parameter(leaf, nn.Parameter(tensor.half()))
    for name, value in (("input_resolution", 56), ("context_length", 7), ("vocab_size", 5)):
        root.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; OpenAI's files are still in it
        torch.jit.save(torch.jit.script(root), str(path))


def test_openai_file_needs_quick_gelu(tmp_path: Path) -> None:
    random, path = build(CLIP), tmp_path / "ViT-L-14.pt"
    save_openai(whole_clip(random), path)
    loaded = build(replace(CLIP, weights=str(path)))
    for name, tensor in random.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], tensor.half().float())
    exact = replace(CLIP, model="ViT-L-14", weights=str(path))
    with pytest.raises(TeacherError, match="use model ViT-L-14-quickgelu"):
        build(exact)
    forced = build(replace(exact, overrides={**TINY, "quick_gelu": True}))
    assert forced.spec.activation == "quick_gelu"
    assert torch.equal(forced(pixels(1)), loaded(pixels(1)))
    assert forced.spec.weights_sha256 == loaded.spec.weights_sha256


def test_quick_gelu_changes_features() -> None:
    quick, exact = build(CLIP), build(replace(CLIP, overrides={**TINY, "quick_gelu": False}))
    exact.module.load_state_dict(quick.module.state_dict())
    assert float((quick(pixels(1)) - exact(pixels(1))).abs().max()) > 1e-4


def test_tags_are_checked_against_the_activation() -> None:
    with pytest.raises(TeacherError, match=r"'openai' need QuickGELU.*use model ViT-L-14-quickgelu"):
        OpenClipTeacher.fetch(replace(CLIP, model="ViT-L-14", weights="openai", overrides={}))
    with pytest.raises(TeacherError, match="exact GELU, ViT-L-14 has QuickGELU; use model"):
        OpenClipTeacher.fetch(
            replace(CLIP, model="ViT-L-14", weights="laion2b_s32b_b82k", overrides={"quick_gelu": True})
        )


def test_tag_offline_names_file_and_remedy() -> None:
    with pytest.raises(TeacherError, match=r"timm/vit_large_patch14_clip_224.openai .*on huggingface.co"):
        OpenClipTeacher.fetch(replace(CLIP, weights="openai", overrides={}))


def test_position_table_is_resampled_as_open_clip_does(tmp_path: Path) -> None:
    random = build(CLIP)
    torch.save(whole_clip(random), tmp_path / "w.pt")
    with torch.device("cpu"):
        config = open_clip.get_model_config("ViT-L-14-quickgelu")
        vision = {**config["vision_cfg"], **{k: v for k, v in TINY.items() if k != "embed_dim"}, "image_size": 98}
        text = {"context_length": 7, "vocab_size": 5, "width": 8, "heads": 1, "layers": 1}
        clip = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    state = {k: v for k, v in whole_clip(random).items() if k.startswith("visual.")}
    open_clip.model.resize_pos_embed(state, clip)
    table = build(replace(CLIP, weights=str(tmp_path / "w.pt"), input_px=98)).module.get_parameter(
        "positional_embedding"
    )
    assert table.shape == (50, 32)
    assert torch.equal(table, state["visual.positional_embedding"])


def test_weights_of_another_input_size_keep_their_digest(tmp_path: Path) -> None:
    """A 98-px table in a 56-px model: hashed as it is, then resampled."""
    large = build(replace(CLIP, overrides={**TINY, "image_size": 98}, input_px=98))
    torch.save(dict(large.module.state_dict()), tmp_path / "w.pt")
    loaded = build(replace(CLIP, weights=str(tmp_path / "w.pt")))
    assert loaded.spec.weights_sha256 == large.spec.weights_sha256
    assert loaded.module.get_parameter("positional_embedding").shape == (17, 32)


def test_wrong_weights_name_what_differs_and_the_likely_model(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    source = TeacherSource(name="t", library="open_clip", model="ViT-B-16", weights=str(path))
    with torch.device("meta"):
        config = open_clip.get_model_config("ViT-B-32")
        shapes = open_clip.CLIP(**config).state_dict()
    torch.save({k: torch.zeros(()).expand(v.shape) for k, v in shapes.items()}, path)
    with pytest.raises(TeacherError, match=r"conv1.weight \[768, 3, 32, 32\].*like ViT-B-32"):
        build(source)
    state = whole_clip(build(CLIP))
    del state["visual.ln_post.weight"]
    torch.save(state, path)
    with pytest.raises(TeacherError, match=r"1 missing \(ln_post.weight\)"):
        build(replace(CLIP, weights=str(path)))
    torch.save({"vision_model.embeddings.class_embedding": torch.ones(3)}, path)
    with pytest.raises(TeacherError, match="format of transformers"):
        build(source)
    torch.save({"patch_embed.proj.weight": torch.ones(3)}, path)
    with pytest.raises(TeacherError, match="library timm"):
        build(source)


def test_wrong_choices_are_named() -> None:
    with pytest.raises(ConfigError, match=r"open_clip has no model 'ViT-L-15'; near names: ViT-L"):
        build(replace(CLIP, model="ViT-L-15"))
    with pytest.raises(ConfigError, match="ModifiedResNet, not a vision transformer"):
        OpenClipTeacher.describe(replace(CLIP, model="RN50", overrides={}), student_grid=(4, 4))
    with pytest.raises(ConfigError, match="cannot be built"):
        build(replace(CLIP, overrides={"nonsense": 3}))
    with pytest.raises(ConfigError, match="pos_embed official is not for open_clip"):
        build(replace(CLIP, pos_embed="official"))
    with pytest.raises(TeacherError, match=r"give the tag as `weights` \(tags: openai"):
        build(replace(CLIP, weights="hub", overrides={}))
    with pytest.raises(TeacherError, match="no weights file at openay"):
        build(replace(CLIP, weights="openay"))


def test_a_model_config_of_ones_own(tmp_path: Path) -> None:
    config = {
        "embed_dim": 24,
        "vision_cfg": {k: v for k, v in TINY.items() if k != "embed_dim"},
        "text_cfg": {"context_length": 7, "vocab_size": 5, "width": 8, "heads": 1, "layers": 1},
    }
    (tmp_path / "rsmtdf-test-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    teacher = build(replace(CLIP, model="rsmtdf-test-tiny", overrides={}))
    assert (teacher.spec.model, teacher.spec.dim, teacher.spec.activation) == ("rsmtdf-test-tiny", 32, "gelu")
