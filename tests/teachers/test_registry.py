"""Teachers by name: entries resolve, presets describe themselves, the paper's two are exactly the paper's."""

import dataclasses
from pathlib import Path

import pytest
import torch

from rsmtdf.errors import ConfigError, TeacherError
from rsmtdf.specs import IMAGENET_MEAN, IMAGENET_STD, FeatureSpec
from rsmtdf.teachers.registry import (
    LIBRARIES,
    PRESETS,
    build_teacher,
    describe,
    fetch,
    resolve_source,
)
from rsmtdf.teachers.source import TeacherSource

PAPER = (37, 37)


def test_the_papers_teachers() -> None:
    dino = describe(PRESETS["dinov2_vitb14"], student_grid=PAPER)
    assert dino == FeatureSpec(
        name="dinov2_vitb14",
        library="timm",
        model="vit_base_patch14_dinov2",
        weights_sha256="",
        input_px=(518, 518),
        pos_embed="official",
        activation="gelu",
        layer=11,
        final_norm=True,
        prefix_tokens=1,
        patch_px=14,
        grid=(37, 37),
        dim=768,
    )
    clip = describe(PRESETS["clip_vitl14"], student_grid=PAPER)
    assert clip == FeatureSpec(
        name="clip_vitl14",
        library="open_clip",
        model="ViT-L-14-quickgelu",
        weights_sha256="",
        input_px=(224, 224),
        pos_embed="native",
        activation="quick_gelu",
        layer=23,
        final_norm=False,
        prefix_tokens=1,
        patch_px=14,
        grid=(16, 16),
        dim=1024,
    )
    for spec in (dino, clip):
        assert (spec.mean, spec.std) == (IMAGENET_MEAN, IMAGENET_STD)
        assert (spec.resize, spec.align_corners, spec.antialias) == ("bilinear", True, False)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_describes_itself(name: str) -> None:
    source = PRESETS[name]
    assert source.name == name
    assert source.licence
    assert source.origin.startswith("https://")
    assert source.weights != "random"
    spec = describe(source, student_grid=PAPER)
    assert spec.grid == (PAPER if source.input_px is None else (224 // spec.patch_px, 224 // spec.patch_px))
    assert spec.prefix_tokens == (5 if "reg4" in name or "dinov3" in name else 0 if "siglip" in name else 1)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_offline_where_its_weights_are(name: str) -> None:
    with pytest.raises(TeacherError, match=rf"'{name}' are not on this machine.*rsmtdf teachers fetch {name}"):
        fetch(PRESETS[name])


def test_entry_by_name_by_preset_and_in_full() -> None:
    assert resolve_source("dinov2_vitb14") is PRESETS["dinov2_vitb14"]
    changed = resolve_source({"preset": "clip_vitl14", "name": "clip_local", "weights": "/data/ViT-L-14.pt"})
    assert changed == dataclasses.replace(PRESETS["clip_vitl14"], name="clip_local", weights="/data/ViT-L-14.pt")
    full = resolve_source(
        {
            "name": "tiny",
            "library": "timm",
            "model": "vit_tiny_patch16_224",
            "weights": "random",
            "input_px": [64, 96],
            "mean": [0.5, 0.5, 0.5],
            "overrides": {"depth": 1, "img_size": [64, 96]},
        }
    )
    assert full.input_px == (64, 96)
    assert full.mean == (0.5, 0.5, 0.5)
    assert full.overrides == {"depth": 1, "img_size": (64, 96)}
    teacher = build_teacher(full, student_grid=(3, 3), device=torch.device("cpu"))
    assert teacher(torch.zeros(1, 30, 30, 3, dtype=torch.uint8)).shape == (1, 24, 192)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("dinov2_vitb41", "did you mean 'dinov2_vitb14'"),
        ({"preset": "clip_vitl"}, "did you mean 'clip_vitl14'"),
        ({"name": "a", "library": "tim", "model": "b"}, "no library 'tim'; did you mean 'timm'"),
        ({"name": "a", "library": "timm", "model": "b", "weigths": "c"}, "did you mean 'weights'"),
        ({"library": "timm"}, "lacks name, model"),
        ({"name": "a/b", "library": "timm", "model": "c"}, "teacher name 'a/b'"),
        ({"name": "a", "library": "timm", "model": "b", "compute_dtype": "fp16"}, "compute_dtype is 'fp16'"),
        ({"name": "a", "library": "timm", "model": "b", "pos_embed": "mine"}, "pos_embed is 'mine'"),
        ({"name": "a", "library": "timm", "model": "b", "mean": [0.5]}, "mean is .0.5,., expected 3"),
        ({"name": "a", "library": "timm", "model": "b", "overrides": 3}, "overrides is 3"),
    ],
)
def test_wrong_entries_name_what_is_wrong(entry: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_source(entry)  # type: ignore[arg-type]


def test_a_source_made_by_hand_with_an_unknown_library() -> None:
    source = TeacherSource(name="a", library="open-clip", model="b")
    with pytest.raises(ConfigError, match="did you mean 'open_clip'"):
        describe(source, student_grid=PAPER)


def test_libraries_are_visible() -> None:
    assert set(LIBRARIES) == {"timm", "open_clip"}


def test_fetch_returns_a_local_file_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"x")
    source = resolve_source({"preset": "dinov2_vitb14", "weights": str(tmp_path / "w.pth")})
    assert fetch(source) == tmp_path / "w.pth"
    with pytest.raises(TeacherError, match="random weights: there is no file"):
        fetch(dataclasses.replace(source, weights="random"))
    with pytest.raises(TeacherError, match="should read hf:owner/repo/file"):
        fetch(dataclasses.replace(source, weights="hf:owner"))


def test_a_teacher_is_compiled_where_its_source_says_so() -> None:
    tiny = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    entry = {"name": "t", "library": "timm", "model": "vit_tiny_patch16_224", "weights": "random", "overrides": tiny}
    for wanted in (False, True):
        source = resolve_source({**entry, "compile": wanted})
        teacher = build_teacher(source, student_grid=(3, 3), device=torch.device("cpu"))
        assert teacher.is_compiled == wanted
