"""The paper's two teachers at full size, through our own loading and forward code, against recorded numbers.

The references (features of the published code for formula weights and images) lie beside the checkout in
`../shared/parity`; where they are absent these tests are skipped.
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rsmtdf.pixels import resize
from rsmtdf.teachers.base import VitTeacher
from rsmtdf.teachers.registry import PRESETS, build_teacher, describe

PARITY = Path(__file__).parents[2].parent / "shared" / "parity"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PARITY.is_dir(), reason="no numeric references beside the checkout"),
]


@pytest.fixture(scope="module")
def recipe() -> Any:
    spec = importlib.util.spec_from_file_location("teacher_parity_recipe", PARITY / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images(recipe: Any) -> torch.Tensor:
    """The recorded input: normalised float32 [2, 3, 518, 518]."""
    return torch.from_numpy(recipe.batch([0, 1], 518, 518))


def shapes(prefix: str) -> dict[str, list[int]]:
    """Official name -> shape of the parameters under `prefix`."""
    names = json.loads((PARITY / "name_map.json").read_text())["map"]
    return {name: entry[2] for name, entry in names.items() if name.startswith(prefix)}


def formula_file(recipe: Any, prefix: str, strip: str, path: Path) -> Path:
    """A weights file as published: official names, formula values."""
    state = {
        name.removeprefix(strip): torch.from_numpy(recipe.param(name, shape)) for name, shape in shapes(prefix).items()
    }
    torch.save(state, path)
    return path


@pytest.fixture(params=["dino", "clip"], scope="module")
def teacher(request: pytest.FixtureRequest, recipe: Any, tmp_path_factory: Any) -> VitTeacher:
    """A preset with formula weights from a file; one in memory at a time."""
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.pth"
    if request.param == "dino":
        source = PRESETS["dinov2_vitb14"]
        formula_file(recipe, "Dino_teacher_model.", "Dino_teacher_model.", path)
    else:
        source = PRESETS["clip_vitl14"]
        formula_file(recipe, "clip_model.visual.", "clip_model.", path)
    source = replace(source, weights=str(path))
    try:
        built = build_teacher(source, student_grid=(37, 37), device=torch.device("cpu"))
    finally:
        path.unlink()
    assert isinstance(built, VitTeacher)
    assert built.spec == replace(describe(source, student_grid=(37, 37)), weights_sha256=built.spec.weights_sha256)
    return built


def test_features_match_the_published_code(teacher: VitTeacher, recipe: Any, images: torch.Tensor) -> None:
    key = "A_518x518_b2/" + ("dino_teacher" if teacher.spec.library == "timm" else "clip_teacher")
    reference = json.loads((PARITY / "fwd.json").read_text())["tensors"][key]
    with np.load(PARITY / "fwd.npz") as file:
        probes = file[key.replace("/", "__")]
    tokens = teacher.features(resize(images, teacher.spec.input_px))
    summary, found = recipe.summary(tokens.numpy())
    assert summary["shape"] == reference["shape"]
    rms = reference["l2"] / np.sqrt(np.prod(reference["shape"]))
    assert float(np.abs(found - probes).max()) <= 1e-5 * rms
    assert summary["l2"] == pytest.approx(reference["l2"], rel=1e-6)
