"""What fixes a student's architecture: enough to build it again from a file's header, and nothing about training.

The key decision: whether a teacher's tokens are translated from the student's main pass (`dense`) or from an extra
pass of fixed size is decided once, from the training crop, and kept in the spec. Deciding it from each input would
move the DINO branch to an extra pass as soon as a map is predicted at another size than the training crop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rsmtdf.specs import FeatureSpec, from_dict, to_dict


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherHead:
    """One teacher as the student sees it: a translator to its feature space and its share in the fusion."""

    name: str
    grid: tuple[int, int]
    """(rows, columns) of the teacher's patch tokens for the training crop."""
    dim: int
    """The teacher's feature width."""
    dense: bool
    """True: the teacher's grid is the student's own, whatever the input size, so the main pass is translated.
    False: the grid stays `grid`, and the student makes an extra pass at patch x grid pixels."""
    weight: float = 0.1
    """Share of the projected translation in the fused tokens (the paper: 0.1 for each of two, 0.8 for the student)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSpec:
    """The student's architecture; the defaults are the paper's."""

    classes: int
    backbone: str = "vit_small_patch14_dinov2"
    """A timm ViT."""
    overrides: tuple[tuple[str, int | float | bool | str], ...] = ()
    """Further arguments of the timm model, out of `rsmtdf.student.model.OVERRIDES`."""
    img_px: int = 518
    """Side of the square input that the position table is made for."""
    layers: tuple[int, ...] = (2, 5, 8, 11)
    """The four blocks (0-based, ascending) the decoder reads; the last is the backbone's last."""
    pos_embed: Literal["official", "timm"] = "official"
    dpt_features: int = 64
    dpt_channels: tuple[int, int, int, int] = (48, 96, 192, 384)
    translator_hidden: int = 1024
    teachers: tuple[TeacherHead, ...] = ()
    fusion: bool = True
    """False: translators only serve the distillation loss; the decoder reads the student's own tokens."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data; `from_dict` is its exact inverse."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StudentSpec:
        """The spec that `data` describes.

        Raises:
            ValueError: a key without field, or a field without value.
        """
        heads = [from_dict(TeacherHead, head) for head in data.get("teachers", ())]
        return from_dict(cls, {**data, "teachers": heads})


def teacher_heads(
    specs: Iterable[FeatureSpec], *, student_grid: tuple[int, int], weight: float = 0.1
) -> tuple[TeacherHead, ...]:
    """The heads for teachers of these features; `student_grid` is the student's patch grid for the training crop."""
    return tuple(
        TeacherHead(name=s.name, grid=s.grid, dim=s.dim, dense=s.grid == student_grid, weight=weight) for s in specs
    )
