"""The frozen nouns that every part shares: dataset, tile, view recipe, feature, and the protocols at the seams.

Standard library only, so that anything may import it. A spec is data: it is compared by value, goes to a plain
dict and back without loss, and its digest is the sha256 of its canonical JSON. What enters an identity is decided
here and nowhere else (design, section 4): the pixel fields of a dataset, the whole view recipe, and every field of
a feature except its display name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE_INDEX = 255
"""The label of pixels that neither train nor count: uint8, as in the official code."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""All models, CLIP included, see ImageNet-normalised pixels (reference behaviour, `reference/official_code`)."""

Stream = Literal["plain", "weak", "strong", "strong2"]
STREAMS: tuple[Stream, ...] = ("plain", "weak", "strong", "strong2")

S = TypeVar("S")

_STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}
"""How `rsmtdf.config` validates specs out of YAML (read by pydantic, meaningless to anything else)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """A data set as data: what its pixels and its labels mean, and how its files lie on disk."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """RGB, 0-255, one per class: colours of maps, and of masks in `palette`/`rgb` encoding."""
    layout: str = "folder"
    """A key of `rsmtdf.data.layouts.LAYOUTS`."""
    images: str = "images"
    """Folder layout: where the images are, relative to the root ('.' for the root itself)."""
    masks: str = "masks"
    """Folder layout: where the masks are, relative to the root."""
    mask_name: str = "{stem}"
    """Folder layout: a mask's file name without suffix, from its image's stem."""
    mask_encoding: Literal["auto", "index", "rgb"] = "auto"
    """index: a band of class values (a palette PNG is index too); rgb: colours of `palette`; auto: by band count."""
    label_map: tuple[tuple[int, int], ...] = ()
    """(raw mask value, class index or 255) pairs; empty: raw value = class index, 255 ignored."""
    unknown_labels: Literal["error", "ignore"] = "error"
    excluded: tuple[str, ...] = ()
    """Class names left out of the mean of metrics."""
    bands: tuple[int, int, int] | None = None
    """1-based bands for R, G, B; None: by colour interpretation, else 1, 2, 3."""
    scaling: tuple[tuple[float, float], ...] | None = None
    """(low, high) per output band, mapped to 0..255; None: only for 8-bit data."""
    nodata: float | None = None
    """Overrides the files' own nodata value."""
    gsd_m: float | None = None
    """Ground sampling distance in metres per pixel."""
    tile_px: int = 512
    min_valid: float = 0.25
    """Tiles with a smaller valid share are left out (and counted)."""

    def pixel_fields(self) -> dict[str, Any]:
        """The fields that change a tile's pixels: the dataset's part of a store's identity."""
        return {"bands": self.bands, "scaling": self.scaling, "nodata": self.nodata, "tile_px": self.tile_px}


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSpec:
    """Which tiles train, validate and test, and which of the training tiles count as labelled.

    Lists are files of tile ids, image paths or official two-column lines; what has no list is generated: sorted
    names, keyed shuffle, cut by `fractions`. Where train is generated, tiles without a mask join it, unlabelled,
    unless their scene or group is held out.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    train: str | None = None
    val: str | None = None
    test: str | None = None
    by: Literal["official", "tile", "scene", "group"] = "scene"
    """What stays together: official (the layout's own rule), tile (the published protocol: leaky), scene, or group."""
    group: str | None = None
    """For `by: group`: a regular expression on the scene; its first group (or whole match) names the group."""
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)
    seed: int = 0
    labels: str = "all"
    """all, a share (`5%`), a number of tiles (`20`), or a list file."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One fixed crop of a scene, the data set's sample: `id` is `<scene>/<row>_<col>` whatever the layout on disk.

    The tile's array is always tile_px x tile_px; `width` and `height` tell the part inside the scene (the rest,
    right and bottom, is black padding and not valid). Paths are POSIX, relative to the data root.
    """

    id: str
    image: str
    mask: str | None
    x0: int
    y0: int
    width: int
    height: int

    @property
    def scene(self) -> str:
        return self.id.rsplit("/", 1)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRecipe:
    """The augmentation of the paper (design, section 3). Every field is part of the store's identity."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    version: int = 1
    """Changes whenever the same recipe would give other bytes."""
    crop_px: int = 518
    scale: tuple[float, float] = (0.5, 2.0)
    hflip_p: float = 0.5
    vflip_p: float = 0.0
    quarter_turns: bool = False
    jitter_p: float = 0.8
    brightness: float = 0.5
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.25
    grey_p: float = 0.2
    blur_p: float = 0.5
    blur_radius: tuple[float, float] = (0.1, 2.0)
    """In pixels, Pillow's Gaussian radius."""
    cutmix_p: float = 0.5
    cutmix_area: tuple[float, float] = (0.02, 0.4)
    cutmix_ratio: tuple[float, float] = (0.3, 1 / 0.3)
    """Aspect ratio, drawn *uniformly* (reference behaviour), not log-uniformly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpec:
    """What fixes a teacher's feature, bit for bit up to the device's arithmetic."""

    name: str
    """The group's name in a store; not part of the identity."""
    library: str
    model: str
    weights_sha256: str
    """Of the weights as loaded (names, shapes, bytes), so the file format they came in does not matter."""
    input_px: tuple[int, int]
    """(height, width) the model sees, after `resize` of the normalised fp32 view."""
    resize: Literal["bilinear"] = "bilinear"
    align_corners: bool = True
    antialias: bool = False
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    pos_embed: Literal["official", "timm", "native"] = "official"
    activation: str = "gelu"
    layer: int = -1
    """0-based block whose output it is."""
    final_norm: bool = True
    prefix_tokens: int = 1
    """Class and register tokens, dropped."""
    patch_px: int = 14
    grid: tuple[int, int] = (37, 37)
    """(rows, columns) of patch tokens."""
    dim: int = 768
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def identity(self) -> dict[str, Any]:
        """Every field but the display name."""
        fields = to_dict(self)
        del fields["name"]
        return fields


class TileReader(Protocol):
    """What makes pixels and labels of tiles (implemented by `rsmtdf.data.dataset.Dataset`)."""

    def read_image(self, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 [tile_px, tile_px, 3] and valid bool [tile_px, tile_px]."""
        ...

    def read_label(self, tile: Tile) -> np.ndarray:
        """Class index uint8 [tile_px, tile_px]; 255 where ignored, unlabelled or outside the scene."""
        ...


class Teacher(Protocol):
    """A frozen model that turns view pixels into patch tokens."""

    @property
    def spec(self) -> FeatureSpec: ...

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch tokens float32 [b, tokens, dim] of uint8 views [b, h, w, 3] on the teacher's device."""
        ...


class FeatureSource(Protocol):
    """Where training gets its distillation targets: a store (`CachedFeatures`) or live teachers (`OnlineFeatures`).

    Where it `needs_pixels`, each batch is asked for with `fetch`; otherwise the loop takes a `stream`.
    """

    @property
    def specs(self) -> Mapping[str, FeatureSpec]: ...

    @property
    def needs_pixels(self) -> bool: ...

    def fetch(self, rows: np.ndarray, pixels: torch.Tensor | None) -> Mapping[str, torch.Tensor]:
        """Teacher name -> targets float32 [b, tokens, dim], in the order of `rows` (int64 view rows of the store).

        `pixels`: the same views, uint8 [b, h, w, 3]; only read where `needs_pixels`.
        """
        ...

    def stream(self, batches: Iterable[np.ndarray], *, ahead: int) -> Iterator[Mapping[str, torch.Tensor]]:
        """What `fetch` gives for each batch of rows, in order, `ahead` of them being fetched meanwhile.

        Only where not `needs_pixels`. Closing it (a generator) ends what is under way.
        """
        ...


def to_dict(spec: Any) -> dict[str, Any]:
    """A spec as JSON-ready data: tuples become lists. `from_dict` is its exact inverse."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(spec))))


def from_dict(cls: type[S], data: Mapping[str, Any]) -> S:
    """The spec of class `cls` that `data` describes.

    Raises:
        ValueError: a key that `cls` has no field for, or a field without default that is missing.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(fields)):
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - set(data)):
        raise ValueError(f"{cls.__name__} lacks {', '.join(missing)}")
    return cls(**{name: _restore(hints[name], value) for name, value in data.items()})


def digest(data: Any) -> str:
    """The sha256 (hex) of the canonical JSON of `data`: sorted keys, no spaces, floats by `repr`."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _restore(hint: Any, value: Any) -> Any:
    """`value` out of JSON as the type `hint` names: lists become tuples, ints become floats where declared."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [h for h in typing.get_args(hint) if h is not type(None)]
        return None if value is None else _restore(options[0], value)
    if typing.get_origin(hint) is tuple:
        args = typing.get_args(hint)
        inner = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        return tuple(_restore(h, v) for h, v in zip(inner, value, strict=True))
    if hint is float and isinstance(value, int):
        return float(value)
    return value
