"""timm vision transformers with a stated position-embedding rule: student backbones and timm teachers alike.

timm and the DINOv2 code resample a position table for another grid differently: timm by size (antialiased bicubic),
DINOv2 by `scale_factor` with an offset of 0.1 and no antialias. With random weights that costs 15 % of the features
at 224 px, which the student's second pass meets in every step (`reference/official_code`, section 2); both the
offset and the antialias matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any, Literal, cast

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from rsmtdf.errors import ConfigError

PosEmbedRule = Literal["official", "timm"]


def build_vit(
    model: str, *, img_px: tuple[int, int], pos_embed: PosEmbedRule, overrides: Mapping[str, Any] | None = None
) -> VisionTransformer:
    """A timm ViT without head and with random weights; it takes any input whose sides are multiples of its patch.

    Args:
        model: a timm name (`vit_small_patch14_dinov2`, with or without a `.tag`).
        img_px: (height, width) of the input its position table is made for.
        pos_embed: how the table is resampled for other grids.
        overrides: further arguments of the timm model (`depth`, `embed_dim`, `patch_size`, ...).

    Raises:
        ConfigError: timm has no such model, it is no plain ViT, or an override does not fit it.
    """
    if not timm.is_model(model):
        near = ", ".join(timm.list_models(f"*{model.split('.')[0][:12]}*")[:4]) or "timm.list_models('vit_*')"
        raise ConfigError(f"timm has no model {model!r}; near names: {near}")
    try:
        vit = timm.create_model(
            model, pretrained=False, num_classes=0, img_size=img_px, dynamic_img_size=True, **dict(overrides or {})
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"timm model {model!r} cannot be built with {dict(overrides or {})}: {error}") from error
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"timm model {model!r} is a {type(vit).__name__}, not a plain vision transformer")
    if pos_embed == "official":
        vit._pos_embed = MethodType(_official_pos_embed, vit)  # type: ignore[method-assign]
    return vit


def patch_tokens(vit: VisionTransformer, x: torch.Tensor, *, layers: Sequence[int], norm: bool) -> list[torch.Tensor]:
    """Patch tokens [b, gh*gw, d] (row-major, prefix tokens dropped) after each of `layers` (0-based blocks).

    With `norm`, the final LayerNorm is applied to every one of them (timm's default is not to).
    """
    tokens = vit.forward_intermediates(
        x, indices=list(layers), norm=norm, output_fmt="NLC", intermediates_only=True, stop_early=True
    )
    return cast("list[torch.Tensor]", tokens)


def patch_px(vit: VisionTransformer) -> int:
    """The side of a patch in pixels."""
    return int(vit.patch_embed.patch_size[0])


def _official_pos_embed(self: VisionTransformer, x: torch.Tensor) -> torch.Tensor:
    """timm's `_pos_embed` with DINOv2's resampling; `x` is [b, gh, gw, d]."""
    b, gh, gw, d = x.shape
    prefix = [t.expand(b, -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
    tokens = x.reshape(b, gh * gw, d)
    if self.pos_embed is None:
        return torch.cat([*prefix, tokens], dim=1)
    n_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
    table = _resample(self.pos_embed, n_prefix, tuple(self.patch_embed.grid_size), (gh, gw))
    if self.no_embed_class:
        x = torch.cat([*prefix, tokens + table], dim=1)
    else:
        x = torch.cat([*prefix, tokens], dim=1) + table
    return cast("torch.Tensor", self.pos_drop(x))


def _resample(table: torch.Tensor, n_prefix: int, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """A position table [1, n_prefix + old, d] for the grid `new`: bicubic, in float32 whatever its dtype."""
    if old == new:
        return table
    d = table.shape[-1]
    grid = table[:, n_prefix:].reshape(1, *old, d).permute(0, 3, 1, 2).float()
    factors = [(n + 0.1) / o for n, o in zip(new, old, strict=True)]
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", antialias=False)
    if tuple(grid.shape[-2:]) != new:
        raise ConfigError(f"a position table of {old} patches cannot be resampled to {new}")
    flat = grid.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], d).to(table.dtype)
    return torch.cat([table[:, :n_prefix], flat], dim=1)
