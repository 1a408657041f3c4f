import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rsmtdf.errors import CheckpointError
from rsmtdf.specs import DatasetSpec, to_dict
from rsmtdf.student.artifact import FORMAT, load_student, save_student
from rsmtdf.student.model import StudentSpec, TeacherHead, build_student

SPEC = StudentSpec(
    classes=2,
    overrides=(("depth", 4), ("embed_dim", 16), ("num_heads", 2)),
    img_px=56,
    layers=(0, 1, 2, 3),
    dpt_features=8,
    dpt_channels=(4, 4, 8, 8),
    translator_hidden=12,
    teachers=(TeacherHead(name="fixed.teacher", grid=(2, 3), dim=5, dense=False),),
)
DATASET = DatasetSpec(name="d", classes=("field", "water"), palette=((0, 0, 0), (1, 2, 3)), scaling=((0.0, 0.1 + 0.2),))
META = {"dataset": to_dict(DATASET), "crop_px": 56, "run": {"step": 3, "miou": 0.1 + 0.2}}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "best.safetensors"
    save_student(path, build_student(SPEC, seed=3), meta=META)
    return path


def test_round_trip_is_exact(saved):
    loaded = load_student(saved, device="cpu")
    original = build_student(SPEC, seed=3).eval()
    assert loaded.meta == META
    assert loaded.student.spec == SPEC
    assert not loaded.student.training
    x = torch.randn(1, 3, 42, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.student(x).logits, original(x).logits)
    assert all(torch.equal(t, original.state_dict()[name]) for name, t in loaded.student.state_dict().items())


def test_equal_students_give_equal_bytes_and_nothing_else_is_left(saved, tmp_path):
    again = tmp_path / "again.safetensors"
    save_student(again, build_student(SPEC, seed=3), meta=dict(reversed(META.items())))
    assert again.read_bytes() == saved.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.safetensors", "best.safetensors"]


def test_the_stored_dtype_is_kept(tmp_path):
    path = tmp_path / "half.safetensors"
    save_student(path, build_student(SPEC, seed=3).bfloat16(), meta=META)
    assert {p.dtype for p in load_student(path, device="cpu").student.parameters()} == {torch.bfloat16}


def test_a_student_without_its_classes_is_not_saved(tmp_path):
    student = build_student(SPEC, seed=0)
    for meta, match in (
        ({}, "class list .* is missing"),
        ({"dataset": {"classes": None}}, "class list .* is missing"),
        ({"dataset": {"classes": ["a"]}}, "1 class names for 2 outputs"),
    ):
        with pytest.raises(CheckpointError, match=match):
            save_student(tmp_path / "x.safetensors", student, meta=meta)
    assert list(tmp_path.iterdir()) == []


def header_of(path):
    raw = path.read_bytes()
    return json.loads(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"][FORMAT])


def rewrite(path, edit, tensors=None):
    header = header_of(path)
    edit(header)
    save_file(tensors or load_file(path), path, metadata={FORMAT: json.dumps(header)})


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda h: h.update(version=2), "format version 2, this rsmtdf reads version 1"),
        (lambda h: h.pop("version"), "header is damaged"),
        (lambda h: h["meta"].pop("dataset"), "class list .* is missing"),
        (lambda h: h["meta"]["dataset"]["classes"].pop(), "1 class names for 2 outputs"),
        (lambda h: h.pop("student"), "does not describe a student"),
        (lambda h: h["student"].update(surprise=1), "has no field surprise"),
        (lambda h: h["student"].update(overrides=[["checkpoint_path", "x"]]), "checkpoint_path are not among"),
        (lambda h: h["student"].update(backbone="hf-hub:a/b"), "timm has no model"),
        (lambda h: h["student"].update(teachers=[1]), "does not describe a student"),
        (lambda h: h["student"].update(dpt_features=6), r"expected \(6,\), found \(8,\)"),
    ],
)
def test_files_that_are_not_what_they_should_be(saved, edit, match):
    rewrite(saved, edit)
    with pytest.raises(CheckpointError, match=match):
        load_student(saved, device="cpu")


def test_other_files(saved, tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_student(tmp_path / "none", device="cpu")
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_student(tmp_path, device="cpu")
    whole = saved.read_bytes()
    for data in (b"", b"PK\x03\x04", whole[:40], whole[:-1]):
        saved.write_bytes(data)
        with pytest.raises(CheckpointError, match="no complete safetensors file"):
            load_student(saved, device="cpu")
    save_file({"a": torch.zeros(1)}, saved)
    with pytest.raises(CheckpointError, match="not of an rsmtdf student"):
        load_student(saved, device="cpu")
