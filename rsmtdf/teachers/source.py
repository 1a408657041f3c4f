"""What a teacher is made from: the one dataclass that a YAML entry, a preset and the builders share.

Standard library only, so that a configuration can be checked without importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rsmtdf.specs import IMAGENET_MEAN, IMAGENET_STD

ComputeDtype = Literal["float32", "bfloat16", "float16"]
PosEmbed = Literal["official", "timm", "native"]


@dataclass(frozen=True, kw_only=True)
class TeacherSource:
    """A frozen model by library name, where its weights come from, and which of its features are distilled."""

    name: str
    """The teacher's name in stores and reports."""
    library: str
    """A key of `rsmtdf.teachers.registry.LIBRARIES`."""
    model: str
    """The library's name; timm's may end in a pretraining tag (`vit_base_patch14_dinov2.lvd142m`)."""
    weights: str = "hub"
    """hub: what the library publishes for `model`; a pretraining tag of open_clip (`openai`); `hf:owner/repo/file` on
    the Hugging Face hub; a path; or `random`: for tests and trials, never by accident."""
    seed: int = 0
    """Keys the weights where `weights` is random."""
    input_px: int | tuple[int, int] | None = None
    """(height, width) the model sees; None: as many pixels as give the student's patch grid (dense)."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    layer: int = -1
    """0-based block whose output is taken; negative from the end."""
    final_norm: bool = True
    """Whether the model's last LayerNorm is applied to it (open_clip: `ln_post`)."""
    pos_embed: PosEmbed | None = None
    """How a position table is resampled to another grid. official: as the DINOv2 code does for its first models;
    timm: as timm does, and DINOv2 for its register models; native: by the model itself (rotary models, open_clip).
    None: by the model's name, in this sense."""
    compute_dtype: ComputeDtype = "float32"
    """float32, or the dtype of autocast."""
    compile: bool = False
    """Whether the model runs through `torch.compile`. Its sums may come in another order, as on another device: so it
    is no part of the feature's identity, and a store's provenance says it."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the library's model; part of the feature's identity."""
    licence: str = ""
    """Of the weights; shown, not checked."""
    origin: str = ""
    """Where weights and terms are to be found; shown in messages."""
