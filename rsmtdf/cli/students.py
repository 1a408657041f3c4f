"""The student that a configuration describes, and the weights that its backbone starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from rsmtdf.cli.planning import student_grid
from rsmtdf.config import Experiment
from rsmtdf.specs import FeatureSpec
from rsmtdf.student.spec import StudentSpec, TeacherHead, teacher_heads
from rsmtdf.teachers.registry import fetch
from rsmtdf.teachers.source import TeacherSource
from rsmtdf.weights import read_weights


def student_spec(experiment: Experiment, features: Mapping[str, FeatureSpec]) -> StudentSpec:
    """The experiment's student, with a translator for each of `features`."""
    config = experiment.student
    weights = {t.name: t.fusion_weight for t in experiment.teachers}
    heads: tuple[TeacherHead, ...] = tuple(
        head
        for name, spec in features.items()
        for head in teacher_heads([spec], student_grid=student_grid(experiment), weight=weights[name])
    )
    return StudentSpec(
        classes=len(experiment.dataset.classes),
        backbone=config.backbone,
        overrides=tuple(sorted(config.overrides.items())),
        img_px=config.img_px,
        layers=config.layers,
        pos_embed=config.pos_embed,
        dpt_features=config.dpt_features,
        dpt_channels=config.dpt_channels,
        translator_hidden=config.translator_hidden,
        teachers=heads,
        fusion=config.fusion,
    )


def backbone_weights(experiment: Experiment, *, base: Path) -> Mapping[str, torch.Tensor] | None:
    """Pretrained weights for the student's backbone; None where random ones were asked for.

    Raises:
        TeacherError: they cannot be had.
    """
    weights = experiment.student.weights
    if weights == "random":
        return None
    if weights == "hub":
        named = TeacherSource(name="student backbone", library="timm", model=experiment.student.backbone)
        return read_weights(fetch(named))
    return read_weights(base / weights)
