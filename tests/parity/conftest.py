"""The recorded numbers of the published code, and models filled with the same formula weights.

The references lie beside the checkout (`../shared/parity`); where they are absent these tests are skipped.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

PARITY = Path(__file__).parents[2].parent / "shared" / "parity"

DECODER = {
    **{f"head.projects.{i}": f"decoder.project.{i}" for i in range(4)},
    **{f"head.resize_layers.{i}": f"decoder.rescale.{i}" for i in (0, 1, 3)},
    **{f"head.scratch.layer{i + 1}_rn": f"decoder.reduce.{i}" for i in range(4)},
    **{f"head.scratch.refinenet{i + 1}.out_conv": f"decoder.refine.{i}.mix" for i in range(4)},
    **{
        f"head.scratch.refinenet{i + 1}.resConfUnit{unit}.conv{c}": f"decoder.refine.{i}.{name}.conv{c}"
        for i in range(4)
        for unit, name in ((1, "skip_unit"), (2, "unit"))
        for c in (1, 2)
    },
    **{f"head.scratch.output_conv.{i}": f"decoder.predict.{i}" for i in (0, 2)},
}
TRANSLATION = {
    **{f"feature_translator_for_dino.layer.{i}": f"translators.0.{i}" for i in (0, 2)},
    **{f"feature_translator_for_clip.layer.{i}": f"translators.1.{i}" for i in (0, 2)},
    "project_dino": "projections.0",
    "project_clip": "projections.1",
}
UNBUILT = {"backbone.mask_token"} | {
    f"head.scratch.refinenet4.resConfUnit1.conv{c}.{kind}" for c in (1, 2) for kind in ("weight", "bias")
}
"""Official parameters without gradient: ours has no such modules."""


class Parity:
    """Recorded tensors by key, the weight and input formulas, and the official names in our student."""

    def __init__(self):
        spec = importlib.util.spec_from_file_location("parity_recipe", PARITY / "recipe.py")
        self.recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.recipe)
        self.name_map = self.json("name_map")["map"]
        self.anchors = self.json("recipe_anchors")

    def json(self, name):
        return json.loads((PARITY / f"{name}.json").read_text())

    def arrays(self, name):
        with np.load(PARITY / f"{name}.npz") as file:
            return {key.replace("__", "/"): file[key] for key in file.files}

    def official_student(self):
        """Official name -> shape of every student parameter."""
        frozen = ("Dino_teacher_model.", "clip_model.")
        return {name: entry[2] for name, entry in self.name_map.items() if not name.startswith(frozen)}

    @staticmethod
    def ours(official):
        """Our name of an official student parameter."""
        module, _, kind = official.rpartition(".")
        if official.startswith("backbone."):
            return official
        return f"{(DECODER | TRANSLATION)[module]}.{kind}"

    def fill_student(self, student):
        """Gives every parameter of the student its formula value, by its official name."""
        state = {
            self.ours(name): torch.from_numpy(self.recipe.param(name, shape))
            for name, shape in self.official_student().items()
            if name not in UNBUILT
        }
        student.load_state_dict(state, strict=True)
        return student

    def fill_teacher(self, module, prefix):
        """Gives a timm or open_clip model its formula values (names after `prefix` are the official ones)."""
        state = {
            name: torch.from_numpy(self.recipe.param(prefix + name, tuple(t.shape)))
            for name, t in module.state_dict().items()
        }
        module.load_state_dict(state, strict=True, assign=True)
        return module.eval().requires_grad_(False)

    def error(self, tensor, probes, reference):
        """Largest probe error over the reference's root mean square; shapes must agree."""
        assert list(tensor.shape) == reference["shape"]
        flat = tensor.detach().reshape(-1).double().numpy()
        rms = reference["l2"] / np.sqrt(max(1, flat.size))
        return float(np.abs(flat[self.recipe.positions(flat.size)] - probes).max() / max(rms, 1e-30))


@pytest.fixture(scope="session")
def parity():
    if not PARITY.is_dir():
        pytest.skip(f"no numeric references at {PARITY}")
    return Parity()


@pytest.fixture(scope="session")
def paper_spec():
    """The student the references were recorded with: 7 classes, DINOv2-B and CLIP-L as teachers."""
    from rsmtdf.student.model import StudentSpec, TeacherHead

    return StudentSpec(
        classes=7,
        teachers=(
            TeacherHead(name="dino", grid=(37, 37), dim=768, dense=True),
            TeacherHead(name="clip", grid=(16, 16), dim=1024, dense=False),
        ),
    )


@pytest.fixture(scope="session")
def formula_teachers(parity):
    """A function of (normalised images, dtype) -> targets by DINOv2-B and CLIP-L/14 with formula weights.

    Plain timm and open_clip models, one in memory at a time.
    """
    import open_clip

    from rsmtdf.pixels import resize
    from rsmtdf.vit import build_vit, patch_tokens

    def dino(x):
        with torch.device("meta"):
            vit = build_vit("vit_base_patch14_dinov2", img_px=(518, 518), pos_embed="official")
        vit = parity.fill_teacher(vit, "Dino_teacher_model.").to(x.dtype)
        return patch_tokens(vit, x, layers=[11], norm=True)[0]

    def clip(x):
        config = open_clip.get_model_config("ViT-L-14-quickgelu")
        with torch.device("meta"):
            visual = open_clip.model._build_vision_tower(config["embed_dim"], config["vision_cfg"], quick_gelu=True)
        visual = parity.fill_teacher(visual, "clip_model.visual.").to(x.dtype)
        out = visual.forward_intermediates(
            resize(x, (224, 224)),
            indices=1,
            normalize_intermediates=False,
            intermediates_only=True,
            output_fmt="NLC",
        )
        return out["image_intermediates"][-1]

    @torch.no_grad()
    def targets(x):
        return {"dino": dino(x), "clip": clip(x)}

    return targets
