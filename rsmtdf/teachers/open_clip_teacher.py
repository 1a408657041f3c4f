"""The image towers of open_clip's ViTs as teachers: OpenAI's CLIP from the paper, and its relatives.

Two traps are guarded. OpenAI's weights need QuickGELU, which the plain `ViT-L-14` lacks: with a local file the
library says nothing, and the features are off by 1 % (`reference/official_code`, section 2). And only the image
tower is built: the text tower is a third of the memory and never used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import open_clip
import torch
from open_clip.model import resize_pos_embed
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

from rsmtdf.errors import ConfigError, TeacherError
from rsmtdf.specs import FeatureSpec
from rsmtdf.teachers.base import VitTeacher, input_size, model_label, resolve_layer
from rsmtdf.teachers.hub import HubFile, weights_path
from rsmtdf.teachers.loading import activation_name, build_loaded, build_random, freeze
from rsmtdf.teachers.source import TeacherSource
from rsmtdf.vit import patch_tokens
from rsmtdf.weights import read_weights, weights_digest

logger = logging.getLogger(__name__)

_TINY_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
_OPENAI_MARKS = {"input_resolution", "context_length", "vocab_size"}
"""Entries that only OpenAI's own files have; open_clip tells them by the same."""


class OpenClipTeacher(VitTeacher):
    """The image tower of an open_clip model whose tower is a ViT, open_clip's own or timm's."""

    def __init__(self, *, visual: nn.Module, spec: FeatureSpec, device: torch.device) -> None:
        super().__init__(spec=spec, device=device)
        self._visual = freeze(visual, device)

    @classmethod
    def build(cls, source: TeacherSource, *, student_grid: tuple[int, int], device: torch.device) -> OpenClipTeacher:
        """The teacher of `source` with its weights, on `device`.

        Raises:
            ConfigError: open_clip has no such model, or an override does not fit it.
            TeacherError: the weights are missing or do not fit, or the model has no such layer or input size.
        """
        if source.weights == "random":
            visual = build_random(lambda: _make(source), model=model_label(source.model, source), seed=source.seed)
        else:
            path = cls.fetch(source)
            visual = load_visual(source, read_weights(path), origin=path.name)
        # Before the position table is resampled, so that the digest says which weights, whatever the input.
        digest = weights_digest(visual.state_dict())
        spec = _spec(source, visual, student_grid=student_grid, digest=digest)
        _set_input(visual, spec.input_px)
        return cls(visual=visual, spec=spec, device=device)

    @classmethod
    def fetch(cls, source: TeacherSource) -> Path:
        """The local weights file of `source`, downloaded where it is missing.

        Raises:
            TeacherError: it cannot be had (says how to get it), or the tag's weights need another activation.
        """
        _check_tag(source)
        published = replace(source, weights="hub") if is_tag(source) else source
        return weights_path(published, lambda: cls.published(source))

    @classmethod
    def describe(cls, source: TeacherSource, *, student_grid: tuple[int, int]) -> FeatureSpec:
        """The feature of `source`, but for the weights (`weights_sha256` is empty): nothing is loaded.

        Raises:
            ConfigError, TeacherError: as `build`, but for weights.
        """
        with torch.device("meta"):
            visual = _make(source)
        return _spec(source, visual, student_grid=student_grid, digest="")

    @classmethod
    def published(cls, source: TeacherSource) -> HubFile:
        """Where open_clip publishes the weights that `source.weights`, a tag, names.

        Raises:
            TeacherError: nowhere; lists the model's tags.
        """
        cfg = open_clip.get_pretrained_cfg(source.model, source.weights)
        if cfg.get("hf_hub"):
            repo, _, file = cfg["hf_hub"].rpartition("/")
            files = (file,) if file else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
            return HubFile(repo=repo, files=files)
        if cfg.get("url"):
            return HubFile(url=cfg["url"])
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(source.model)) or "none"
        raise TeacherError(
            f"teacher '{source.name}': open_clip publishes several or no weights for {source.model}; give the tag as "
            f"`weights` (tags: {tags}), or a path"
        )

    @property
    def module(self) -> nn.Module:
        return self._visual

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self._visual, TimmModel):
            trunk = cast("TimmViT", self._visual.trunk)
            return patch_tokens(trunk, x, layers=[self._spec.layer], norm=self._spec.final_norm)[0]
        found = cast("Any", self._visual).forward_intermediates(
            x,
            indices=[self._spec.layer],
            stop_early=True,
            normalize_intermediates=self._spec.final_norm,
            intermediates_only=True,
            output_fmt="NLC",
        )
        return cast("torch.Tensor", found["image_intermediates"][0])


def load_visual(source: TeacherSource, state: Mapping[str, torch.Tensor], *, origin: str) -> nn.Module:
    """The image tower of `source` with the weights `state`: of a whole CLIP (`visual.*`) or of the tower alone.

    Raises:
        TeacherError: they do not fit (names the models that they look like), or they are OpenAI's and `source.model`
            has no QuickGELU.
    """
    what = f"the image tower of {source.model} of teacher '{source.name}' ({origin})"
    if set(state) >= _OPENAI_MARKS and not _config(source).get("quick_gelu", False):
        raise TeacherError(_quick_gelu_message(source, f"{origin} holds OpenAI's weights, which"))
    tower = {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")} or dict(state)
    if "positional_embedding" in tower and tower["positional_embedding"].ndim == 2:
        source = _with_native_size(source, tower["positional_embedding"])
    return build_loaded(lambda: _make(source), lambda _: tower, what=what, hint=_hint(tower))


def is_tag(source: TeacherSource) -> bool:
    """Whether `source.weights` is one of open_clip's pretraining tags for its model."""
    return bool(open_clip.is_pretrained_cfg(source.model, source.weights))


def _check_tag(source: TeacherSource) -> None:
    """Raises TeacherError where the tag's weights were trained with another activation than the model has."""
    if not is_tag(source):
        return
    config = _config(source)
    trained = bool(open_clip.get_pretrained_cfg(source.model, source.weights).get("quick_gelu", False))
    if trained != bool(config.get("quick_gelu", False)) and "timm_model_name" not in config["vision_cfg"]:
        if trained:
            raise TeacherError(_quick_gelu_message(source, f"the weights '{source.weights}'"))
        raise TeacherError(
            f"teacher '{source.name}': the weights '{source.weights}' were trained with the exact GELU, {source.model} "
            f"has QuickGELU; use model {source.model.removesuffix('-quickgelu')}"
        )


def _quick_gelu_message(source: TeacherSource, what: str) -> str:
    name = f"{source.model}-quickgelu"
    remedy = f"use model {name}" if name in open_clip.list_models() else "set overrides: {quick_gelu: true}"
    return f"teacher '{source.name}': {what} need QuickGELU, and {source.model} has the exact GELU; {remedy}"


def _config(source: TeacherSource) -> dict[str, Any]:
    """open_clip's configuration of the model with the overrides: `quick_gelu`, `embed_dim`, or parts of vision_cfg."""
    if source.model.startswith(("hf-hub:", "local-dir:")):
        raise ConfigError(
            f"teacher '{source.name}': give open_clip's model name and its file as `weights` instead of {source.model}"
        )
    config = open_clip.get_model_config(source.model)
    if config is None:
        stem = source.model.split("-quickgelu")[0][:6]
        near = ", ".join([m for m in open_clip.list_models() if m.startswith(stem)][:5]) or "open_clip.list_models()"
        raise ConfigError(f"open_clip has no model {source.model!r}; near names: {near}")
    own = {k: v for k, v in source.overrides.items() if k in ("quick_gelu", "embed_dim")}
    vision = {k: v for k, v in source.overrides.items() if k not in own}
    return {**config, **own, "vision_cfg": {**config["vision_cfg"], **vision}}


def _make(source: TeacherSource) -> nn.Module:
    """The image tower, with random weights and the input size of its configuration."""
    config = _config(source)
    config["vision_cfg"]["timm_model_pretrained"] = False
    try:
        clip = open_clip.CLIP(
            embed_dim=config["embed_dim"],
            vision_cfg=config["vision_cfg"],
            text_cfg=_TINY_TEXT,
            quick_gelu=config.get("quick_gelu", False),
        )
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"open_clip model {source.model!r} cannot be built with {dict(source.overrides)}: {error}"
        ) from error
    visual = cast("nn.Module", clip.visual)
    is_vit = isinstance(visual, VisionTransformer) or (
        isinstance(visual, TimmModel) and isinstance(visual.trunk, TimmViT)
    )
    if not is_vit:
        raise ConfigError(f"the image tower of {source.model!r} is a {type(visual).__name__}, not a vision transformer")
    return visual


def _with_native_size(source: TeacherSource, table: torch.Tensor) -> TeacherSource:
    """`source` with the input size that the weights' position table (rows, width) is made for, where it is square."""
    vision = _config(source)["vision_cfg"]
    if "timm_model_name" in vision:
        return source
    side = round((table.shape[0] - 1) ** 0.5)
    size = vision.get("image_size", 224)
    patch = int(vision.get("patch_size", 16))
    rows = (size // patch) ** 2 if isinstance(size, int) else (size[0] // patch) * (size[1] // patch)
    if table.shape[0] - 1 == rows or side * side != table.shape[0] - 1:
        return source
    logger.info("teacher '%s': its position table is made for %d px", source.name, side * patch)
    return replace(source, overrides={**source.overrides, "image_size": side * patch})


def _set_input(visual: nn.Module, size: tuple[int, int]) -> None:
    """Resamples the position table, in place, for inputs of `size`, by the library's own rule."""
    if isinstance(visual, TimmModel):
        if tuple(visual.trunk.patch_embed.img_size) != size:
            visual.trunk.set_input_size(img_size=size)
        return
    tower = cast("Any", visual)
    patch = tower.patch_size
    grid = (size[0] // patch[0], size[1] // patch[1])
    if tuple(tower.grid_size) == grid:
        return
    old = tuple(tower.grid_size)
    if old[0] != old[1]:
        raise TeacherError(
            f"open_clip cannot resample a position table of {old[0]} x {old[1]} patches, only square ones"
        )
    table = {"visual.positional_embedding": tower.positional_embedding.detach()}
    resize_pos_embed(table, SimpleNamespace(visual=SimpleNamespace(grid_size=grid)))
    tower.positional_embedding = nn.Parameter(table["visual.positional_embedding"])
    tower.grid_size, tower.image_size = grid, size


def _hint(tower: Mapping[str, torch.Tensor]) -> str:
    """What the weights look like."""
    patches = tower.get("conv1.weight")
    if patches is None or patches.ndim != 4:
        if any(n.startswith("vision_model.") for n in tower):
            return "They are in the format of transformers; use the open_clip or OpenAI file"
        if "patch_embed.proj.weight" in tower:
            return "They look like a timm or DINO ViT: use library timm"
        return f"They begin with {', '.join(list(tower)[:3])}: not a CLIP ViT"
    width, patch = int(patches.shape[0]), int(patches.shape[-1])
    depth = len({n.split(".")[2] for n in tower if n.startswith("transformer.resblocks.")})
    fits = []
    for name in open_clip.list_models():
        vision = (open_clip.get_model_config(name) or {}).get("vision_cfg", {})
        shape = (vision.get("width", 768), vision.get("patch_size", 16), vision.get("layers", 12))
        if "timm_model_name" not in vision and shape == (width, patch, depth):
            fits.append(name)
    likely = f", like {', '.join(sorted(fits, key=len)[:3])}" if fits else ""
    return f"They are of a ViT with {depth} blocks, width {width} and {patch}-px patches{likely}"


def _spec(source: TeacherSource, visual: nn.Module, *, student_grid: tuple[int, int], digest: str) -> FeatureSpec:
    if source.pos_embed not in (None, "native"):
        raise ConfigError(
            f"teacher '{source.name}': pos_embed {source.pos_embed} is not for open_clip models; leave it out"
        )
    if isinstance(visual, TimmModel):
        trunk = cast("Any", visual.trunk)
        blocks, patch, dim = trunk.blocks, tuple(trunk.patch_embed.patch_size), int(trunk.embed_dim)
        prefix = int(trunk.num_prefix_tokens)
    else:
        tower = cast("Any", visual)
        blocks, patch, dim = tower.transformer.resblocks, tuple(tower.patch_size), int(tower.transformer.width)
        prefix = 1
    height, width = input_size(source, student_grid=student_grid, patch=(int(patch[0]), int(patch[1])))
    return FeatureSpec(
        name=source.name,
        library="open_clip",
        model=model_label(source.model, source),
        weights_sha256=digest,
        input_px=(height, width),
        mean=source.mean,
        std=source.std,
        pos_embed="native",
        activation=activation_name(blocks[0].mlp),
        layer=resolve_layer(source, depth=len(blocks)),
        final_norm=source.final_norm,
        prefix_tokens=prefix,
        patch_px=int(patch[0]),
        grid=(height // int(patch[0]), width // int(patch[1])),
        dim=dim,
        compute_dtype=source.compute_dtype,
        attention_dtype=source.compute_dtype,
    )
