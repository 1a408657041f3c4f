"""The student: a ViT, translators into each teacher's feature space, their fusion, and a DPT decoder.

    s           = four blocks of the backbone, final LayerNorm on all of them, patch tokens only
    t_k         = MLP_k of s[-1]                         (dense teachers)
                  MLP_k of the backbone's last tokens on x resized to patch x grid_k   (the others)
    fused       = (1 - sum w_k) s[-1] + sum w_k Linear_k( t_k resized to the patch grid )
    logits      = DPT(s[0], s[1], s[2], fused), resized to the input

The extra pass of the second line is part of the model: it happens in inference too, and gradients flow through it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from rsmtdf.errors import CheckpointError, ConfigError
from rsmtdf.keyed import key_seed
from rsmtdf.pixels import resize
from rsmtdf.student.dpt import DptDecoder, as_maps
from rsmtdf.student.spec import StudentSpec, TeacherHead, teacher_heads
from rsmtdf.vit import build_vit, patch_px, patch_tokens

__all__ = [
    "OVERRIDES",
    "Student",
    "StudentOutput",
    "StudentSpec",
    "TeacherHead",
    "build_student",
    "load_backbone",
    "teacher_heads",
]

log = logging.getLogger(__name__)

# Shape only. A spec also comes out of a file's header, so nothing that makes timm read another file may pass; and
# no drop rates: they would draw from torch's global generator, and a resumed run would not repeat them.
OVERRIDES = frozenset(
    {
        "class_token",
        "depth",
        "embed_dim",
        "init_values",
        "mlp_ratio",
        "no_embed_class",
        "num_heads",
        "patch_size",
        "qk_norm",
        "qkv_bias",
        "reg_tokens",
    }
)


@dataclass(frozen=True, slots=True)
class StudentOutput:
    """`logits` [b, classes, h, w]; `translated`: teacher name -> [b, tokens, dim] in that teacher's space."""

    logits: torch.Tensor
    translated: dict[str, torch.Tensor]


class Student(nn.Module):
    """See the module docstring. Build it with `build_student`, which checks the spec and keys the initial weights."""

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = build_vit(
            spec.backbone,
            img_px=(spec.img_px, spec.img_px),
            pos_embed=spec.pos_embed,
            overrides=dict(spec.overrides),
        )
        dim, hidden = self.backbone.embed_dim, spec.translator_hidden
        # Lists, not dicts: teacher names may contain dots, which module names must not.
        self.translators = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, head.dim)) for head in spec.teachers
        )
        self.projections = nn.ModuleList(nn.Linear(head.dim, dim) for head in spec.teachers if spec.fusion)
        self.decoder = DptDecoder(dim=dim, channels=spec.dpt_channels, features=spec.dpt_features, classes=spec.classes)

    @property
    def patch_px(self) -> int:
        return patch_px(self.backbone)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the student's patches on an input of this size.

        Raises:
            ConfigError: a side is no multiple of the patch.
        """
        patch = self.patch_px
        if height % patch or width % patch or not height or not width:
            low, high = height // patch * patch, width // patch * patch
            raise ConfigError(
                f"the student cuts its input into patches of {patch} px, so {height} x {width} px does not fit; "
                f"use multiples of {patch}, such as {max(low, patch)} x {max(high, patch)}"
            )
        return height // patch, width // patch

    def forward(self, x: torch.Tensor) -> StudentOutput:
        """`x`: normalised images [b, 3, h, w], both sides multiples of the patch."""
        size = (int(x.shape[-2]), int(x.shape[-1]))
        grid = self.grid(*size)
        *shallow, last = patch_tokens(self.backbone, x, layers=self.spec.layers, norm=True)
        translated = self._translate(x, last)
        logits = self.decoder([*shallow, self._fuse(last, translated, grid)], grid)
        return StudentOutput(resize(logits, size), translated)

    def _translate(self, x: torch.Tensor, last: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every teacher's translation; fixed grids cost one extra pass each, shared by teachers of equal grid."""
        passes: dict[tuple[int, int], torch.Tensor] = {}
        translated = {}
        for head, translator in zip(self.spec.teachers, self.translators, strict=True):
            tokens = last
            if not head.dense:
                if head.grid not in passes:
                    rows, columns = head.grid
                    small = resize(x, (rows * self.patch_px, columns * self.patch_px))
                    final = self.spec.layers[-1:]
                    (passes[head.grid],) = patch_tokens(self.backbone, small, layers=final, norm=True)
                tokens = passes[head.grid]
            translated[head.name] = translator(tokens)
        return translated

    def _fuse(self, last: torch.Tensor, translated: Mapping[str, torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        if not self.spec.fusion or not self.spec.teachers:
            return last
        fused = (1 - sum(head.weight for head in self.spec.teachers)) * last
        for head, projection in zip(self.spec.teachers, self.projections, strict=True):
            tokens = translated[head.name]
            if not head.dense and head.grid != grid:
                maps = resize(as_maps(tokens, head.grid), grid)
                tokens = maps.flatten(2).transpose(1, 2)
            fused = fused + head.weight * projection(tokens)
        return fused


def build_student(spec: StudentSpec, *, seed: int) -> Student:
    """A student with random weights that depend on `spec` and `seed` alone.

    Raises:
        ConfigError: the spec does not fit itself or timm.
    """
    _check_before(spec)
    # The CPU generator only: `torch.manual_seed` would also reseed every accelerator, which fork_rng does not undo.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key_seed("student", seed))
        student = Student(spec)
    depth, patch = len(student.backbone.blocks), student.patch_px
    if spec.layers[-1] != depth - 1:
        raise ConfigError(
            f"the last of layers {list(spec.layers)} must be {depth - 1}: {spec.backbone} has {depth} blocks, and "
            "blocks behind the last layer read would never train"
        )
    if spec.img_px % patch:
        raise ConfigError(f"img_px {spec.img_px} is no multiple of the backbone's patch of {patch} px")
    return student


def load_backbone(student: Student, state: Mapping[str, torch.Tensor]) -> None:
    """Copies pretrained weights into the student's backbone: original DINOv2 names or timm's, any common prefix.

    Nothing is resampled: a position table of another size is an error (set `img_px` to the weights' own).

    Raises:
        CheckpointError: names are missing or unknown, or shapes differ; the student is unchanged then.
    """
    given = _timm_names(state)
    wanted = student.backbone.state_dict()
    problems = []
    if missing := sorted(set(wanted) - set(given)):
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if unknown := sorted(set(given) - set(wanted)):
        problems.append(f"{len(unknown)} unknown ({_some(unknown)})")
    shapes = [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({_some(shapes)})")
    if problems:
        hint = "; set the student's img_px to the input the weights were made for" if _is_table(given, wanted) else ""
        raise CheckpointError(f"weights do not fit the backbone {student.spec.backbone}: {'; '.join(problems)}{hint}")
    student.backbone.load_state_dict(given)


def _check_before(spec: StudentSpec) -> None:
    """What can be told without building anything."""
    if unknown := sorted({name for name, _ in spec.overrides} - OVERRIDES):
        raise ConfigError(f"student overrides {', '.join(unknown)} are not among {', '.join(sorted(OVERRIDES))}")
    if len(spec.layers) != 4 or list(spec.layers) != sorted(set(spec.layers)) or spec.layers[0] < 0:
        raise ConfigError(f"the decoder reads four ascending layers, found {list(spec.layers)}")
    if spec.classes < 1:
        raise ConfigError(f"a student needs at least one class, found {spec.classes}")
    names = [head.name for head in spec.teachers]
    if len(set(names)) != len(names):
        raise ConfigError(f"teacher names must differ, found {', '.join(names)}")
    total = sum(head.weight for head in spec.teachers)
    if spec.fusion and (total >= 1 or any(head.weight < 0 for head in spec.teachers)):
        raise ConfigError(
            f"fusion weights must not be negative and must sum to less than 1 (the rest is the student's own share), "
            f"found {[head.weight for head in spec.teachers]}"
        )


def _timm_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The one ViT in `state` under timm's names, without classifier and mask token."""
    anchor = "patch_embed.proj.weight"
    prefixes = sorted(name[: -len(anchor)] for name in state if name.endswith(anchor))
    if len(prefixes) != 1:
        found = f"{len(prefixes)} ({_some(prefixes)})" if prefixes else f"none; it begins with {_some(list(state))}"
        raise CheckpointError(f"weights for a backbone must hold exactly one vision transformer, found {found}")
    named = {}
    for name, tensor in state.items():
        short = name.removeprefix(prefixes[0])
        if name.startswith(prefixes[0]) and short != "mask_token" and not short.startswith("head."):
            short = re.sub(r"(blocks\.\d+\.mlp\.)w12\.", r"\1fc1.", short)
            named[re.sub(r"(blocks\.\d+\.mlp\.)w3\.", r"\1fc2.", short)] = tensor
    if left := sorted(set(state) - {prefixes[0] + short for short in named}):
        log.debug("weights not used by the backbone: %s", _some(left))
    if "register_tokens" in named:
        # DINOv2 adds the table's first entry to the class token; timm's register models have it already added.
        named["reg_token"] = named.pop("register_tokens")
        named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
        named["pos_embed"] = named["pos_embed"][:, 1:]
    return named


def _is_table(given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    return "pos_embed" in given and "pos_embed" in wanted and given["pos_embed"].shape != wanted["pos_embed"].shape


def _some(names: list[str], n: int = 4) -> str:
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")
