"""timm vision transformers as teachers: DINOv2 from the paper, and any other ViT or rotary ViT of the library.

The position table is kept at the size it was trained for and resampled in the forward pass by the rule that the
feature's spec names. timm's own loading would resample table and even patch embedding without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import eva, vision_transformer
from torch import nn

from rsmtdf.errors import TeacherError
from rsmtdf.specs import FeatureSpec
from rsmtdf.teachers.base import VitTeacher, input_size, model_label, resolve_layer
from rsmtdf.teachers.hub import HubFile, weights_path
from rsmtdf.teachers.loading import activation_name, build_loaded, build_random, freeze
from rsmtdf.teachers.source import PosEmbed, TeacherSource
from rsmtdf.vit import build_vit, patch_tokens
from rsmtdf.weights import read_weights, weights_digest

_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}


class TimmTeacher(VitTeacher):
    """A ViT of timm."""

    def __init__(self, *, vit: nn.Module, spec: FeatureSpec, device: torch.device) -> None:
        super().__init__(spec=spec, device=device)
        self._vit = freeze(vit, device)

    @classmethod
    def build(cls, source: TeacherSource, *, student_grid: tuple[int, int], device: torch.device) -> TimmTeacher:
        """The teacher of `source` with its weights, on `device`.

        Raises:
            ConfigError: timm has no such model, or an override does not fit it.
            TeacherError: the weights are missing or do not fit, or the model has no such layer or input size.
        """
        if source.weights == "random":
            label = model_label(source.model.split(".")[0], source)
            vit = build_random(lambda: _make(source, _default_px(source)), model=label, seed=source.seed)
        else:
            path = cls.fetch(source)
            vit = load_vit(source, read_weights(path), origin=path.name)
        digest = weights_digest(vit.state_dict())
        return cls(vit=vit, spec=_spec(source, vit, student_grid=student_grid, digest=digest), device=device)

    @classmethod
    def fetch(cls, source: TeacherSource) -> Path:
        """The local weights file of `source`, downloaded where it is missing.

        Raises:
            TeacherError: it cannot be had; says how to get it.
        """
        return weights_path(source, lambda: cls.published(source))

    @classmethod
    def describe(cls, source: TeacherSource, *, student_grid: tuple[int, int]) -> FeatureSpec:
        """The feature of `source`, but for the weights (`weights_sha256` is empty): nothing is loaded.

        Raises:
            ConfigError, TeacherError: as `build`, but for weights.
        """
        with torch.device("meta"):
            vit = _make(source, _default_px(source))
        return _spec(source, vit, student_grid=student_grid, digest="")

    @classmethod
    def published(cls, source: TeacherSource) -> HubFile:
        """Where timm publishes the weights of `source.model`.

        Raises:
            TeacherError: nowhere.
        """
        cfg = timm.models.get_pretrained_cfg(source.model) if timm.is_model(source.model) else None
        if cfg is not None and cfg.hf_hub_id:
            files = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
            return HubFile(repo=cfg.hf_hub_id, files=files)
        if cfg is not None and isinstance(cfg.url, str) and cfg.url:
            return HubFile(url=cfg.url)
        tags = ", ".join(timm.list_pretrained(f"{source.model.split('.')[0]}.*")) or "none"
        raise TeacherError(
            f"teacher '{source.name}': timm publishes no weights for {source.model} (published: {tags}); give a path, "
            "or `weights: random` for a trial"
        )

    @property
    def module(self) -> nn.Module:
        return self._vit

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        # Eva models share forward_intermediates with the plain ViTs that patch_tokens is typed for.
        vit = cast("vision_transformer.VisionTransformer", self._vit)
        return patch_tokens(vit, x, layers=[self._spec.layer], norm=self._spec.final_norm)[0]


def load_vit(source: TeacherSource, state: Mapping[str, torch.Tensor], *, origin: str) -> nn.Module:
    """The timm model of `source` with the weights `state`: timm's own names, or those of DINOv2, DINOv3 or CLIP.

    Raises:
        TeacherError: they do not fit; names the model that they look like.
    """
    hint = _hint(state)
    what = f"{source.model} of teacher '{source.name}' ({origin})"
    native = _native_px(source, state)

    def convert(vit: nn.Module) -> Mapping[str, torch.Tensor]:
        patches = state.get("patch_embed.proj.weight")
        expected = tuple(cast("Any", vit).patch_embed.patch_size)
        # timm would resample the patch embedding to the other size, silently.
        if patches is not None and patches.ndim == 4 and tuple(patches.shape[-2:]) != expected:
            raise TeacherError(
                f"the weights do not fit {what}: patches of {patches.shape[-1]} px, expected {expected[0]}. {hint}"
            )
        return _own_names(dict(state), vit, what=what, hint=hint)

    return build_loaded(lambda: _make(source, native), convert, what=what, hint=hint)


def _make(source: TeacherSource, native_px: tuple[int, int]) -> nn.Module:
    """The model without head, with a position table for `native_px`, for any input of whole patches."""
    overrides = {k: v for k, v in source.overrides.items() if k != "img_size"}
    rule = _rule(source)
    if rule != "native":
        return build_vit(source.model, img_px=native_px, pos_embed=rule, overrides=overrides)
    try:
        model = timm.create_model(
            source.model, pretrained=False, num_classes=0, img_size=native_px, dynamic_img_size=True, **overrides
        )
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise TeacherError(
            f"teacher '{source.name}': timm cannot build {source.model} as a vision transformer with "
            f"{overrides}: {error}"
        ) from error
    if not all(hasattr(model, a) for a in ("blocks", "patch_embed", "num_prefix_tokens", "forward_intermediates")):
        raise TeacherError(
            f"teacher '{source.name}': {source.model} is a {type(model).__name__}, not a vision transformer with "
            "patch tokens; choose from timm.list_models('vit_*')"
        )
    return model


def _rule(source: TeacherSource) -> PosEmbed:
    if source.pos_embed is not None:
        return source.pos_embed
    if "dinov2" in source.model:
        return "timm" if "_reg4_" in source.model else "official"
    # An unknown name goes to build_vit, which says so and lists near ones.
    known_elsewhere = timm.is_model(source.model) and not timm.models.is_model_in_modules(
        source.model.split(".")[0], ["vision_transformer"]
    )
    return "native" if known_elsewhere else "timm"


def _default_px(source: TeacherSource) -> tuple[int, int]:
    """The input that the model's position table is made for: `overrides.img_size`, else timm's default."""
    size = source.overrides.get("img_size")
    if size is None:
        cfg = timm.models.get_pretrained_cfg(source.model) if timm.is_model(source.model) else None
        size = cfg.input_size[1:] if cfg is not None and cfg.input_size else 224
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _native_px(source: TeacherSource, state: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """The input that the weights' position table is made for: timm's default where it fits, else square."""
    default = _default_px(source)
    with torch.device("meta"):
        vit = cast("Any", _make(source, default))
    table = state.get("pos_embed")
    if table is None or vit.pos_embed is None or table.ndim != 3:
        return default
    # With registers, timm's tables have no prefix rows, the original files one; others one or several.
    prefixes = sorted({0, 1, int(vit.num_prefix_tokens)})
    rows, grid = int(table.shape[1]), math.prod(vit.patch_embed.grid_size)
    if rows - grid in prefixes:
        return default
    for prefix in prefixes:
        side = math.isqrt(max(rows - prefix, 0))
        if side and side * side == rows - prefix:
            ph, pw = vit.patch_embed.patch_size
            return side * int(ph), side * int(pw)
    return default


def _own_names(state: dict[str, torch.Tensor], vit: nn.Module, *, what: str, hint: str) -> dict[str, torch.Tensor]:
    """`state` under timm's names, without head and mask token."""
    if "register_tokens" in state and "mask_token" not in state:
        # timm recognises original DINOv2 files by a mask token, which some copies lack.
        state["mask_token"] = torch.zeros(1, state["register_tokens"].shape[-1])
    convert: Callable[..., dict[str, torch.Tensor]] | None = None
    if isinstance(vit, vision_transformer.VisionTransformer):
        convert = vision_transformer.checkpoint_filter_fn
    elif isinstance(vit, eva.Eva):
        convert = eva.checkpoint_filter_fn
    if convert is not None:
        try:
            state = convert(state, vit)
        except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            raise TeacherError(f"the weights do not fit {what}: {type(error).__name__}: {error}. {hint}") from error
    head = tuple(f"{part}." for part in ("head", "head_dist"))
    known = vit.state_dict()
    return {n: t for n, t in state.items() if n in known or not n.startswith(head)}


def _hint(state: Mapping[str, torch.Tensor]) -> str:
    """What the weights look like."""
    if any(n.startswith("visual.") for n in state):
        return "They look like CLIP weights: use library open_clip"
    patches = state.get("patch_embed.proj.weight")
    if patches is None or patches.ndim != 4:
        return f"They begin with {', '.join(list(state)[:3])}: not a ViT of timm or DINO"
    width, patch = int(patches.shape[0]), int(patches.shape[-1])
    depth = 1 + max((int(m[1]) for n in state if (m := re.match(r"blocks\.(\d+)\.", n))), default=-1)
    size = _SIZES.get(width, "?")
    registers = "_reg4" if {"register_tokens", "reg_token"} & set(state) else ""
    if "storage_tokens" in state:
        guess = f"vit_{size}_patch{patch}_dinov3"
    elif "blocks.0.ls1.gamma" in state and patch == 14:
        guess = f"vit_{size}_patch14{registers}_dinov2"
    else:
        guess = f"vit_{size}_patch{patch}_224"
    likely = f", like {guess}" if timm.is_model(guess) else ""
    return f"They are of a ViT with {depth} blocks, width {width} and {patch}-px patches{likely}"


def _spec(source: TeacherSource, vit: nn.Module, *, student_grid: tuple[int, int], digest: str) -> FeatureSpec:
    model = cast("Any", vit)
    patch = (int(model.patch_embed.patch_size[0]), int(model.patch_embed.patch_size[1]))
    if patch[0] != patch[1]:
        raise TeacherError(f"teacher '{source.name}': {source.model} has {patch[0]} x {patch[1]} patches, not square")
    height, width = input_size(source, student_grid=student_grid, patch=patch)
    return FeatureSpec(
        name=source.name,
        library="timm",
        model=model_label(source.model.split(".")[0], source),
        weights_sha256=digest,
        input_px=(height, width),
        mean=source.mean,
        std=source.std,
        pos_embed=_rule(source),
        activation=activation_name(model.blocks[0].mlp),
        layer=resolve_layer(source, depth=len(model.blocks)),
        final_norm=source.final_norm,
        prefix_tokens=int(model.num_prefix_tokens),
        patch_px=patch[0],
        grid=(height // patch[0], width // patch[1]),
        dim=int(model.embed_dim),
        compute_dtype=source.compute_dtype,
        attention_dtype=source.compute_dtype,
    )
