"""From mask files to class indices: index bands, palette PNGs, RGB colours, and what to do with anything else.

A value outside the classes is never turned into a class: the common converters map it to class 0, silently, which
is how wrong labels get trained. It is an error that names file, value and count, or ignored where asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rasterio.io import DatasetReader
from rasterio.windows import Window

from rsmtdf.data.names import few
from rsmtdf.data.raster import open_raster
from rsmtdf.errors import DatasetError
from rsmtdf.specs import IGNORE_INDEX, DatasetSpec

_UNMAPPED = -1


@dataclass(frozen=True, slots=True)
class MaskRule:
    """How raw mask values become class indices. A colour's raw value is 0xRRGGBB."""

    encoding: str
    """auto, index or rgb."""
    index: Mapping[int, int]
    """Raw value -> class index or 255, for index masks."""
    rgb: Mapping[int, int]
    """The same for colours."""
    ignore_unknown: bool

    @classmethod
    def of(cls, spec: DatasetSpec, *, is_index: bool = False) -> MaskRule:
        """The rule of a data set.

        `label_map` replaces the identity of index masks (255 stays ignored unless it is mapped); for colours it adds
        to the palette, with 0xRRGGBB as raw value: `[[0x000000, 255]]` ignores black.

        Args:
            spec: The data set.
            is_index: The layout knows its masks to be indices; decides where the encoding is `auto`.

        Raises:
            DatasetError: a label map that leads to no class.
        """
        for raw, label in spec.label_map:
            if not (0 <= label < len(spec.classes) or label == IGNORE_INDEX):
                raise DatasetError(
                    f"label_map of data set {spec.name!r} maps {raw} to {label}, which is no class: expected "
                    f"0..{len(spec.classes) - 1} or {IGNORE_INDEX}"
                )
        own = dict(spec.label_map)
        index = {IGNORE_INDEX: IGNORE_INDEX} | (own or {i: i for i in range(len(spec.classes))})
        rgb = {(r << 16) | (g << 8) | b: i for i, (r, g, b) in enumerate(spec.palette)} | own
        encoding = "index" if is_index and spec.mask_encoding == "auto" else spec.mask_encoding
        return cls(encoding, index, rgb, spec.unknown_labels == "ignore")


@dataclass(frozen=True, slots=True)
class RawMask:
    """A window of a mask as stored."""

    values: np.ndarray
    """[h, w], integer: the index band, or 0xRRGGBB."""
    is_rgb: bool
    transparent: np.ndarray | None
    """bool [h, w]: alpha is 0, which labels nothing."""
    nodata: float | None


def read_raw(
    path: Path,
    *,
    encoding: str,
    size: tuple[int, int] | None = None,
    image: str = "",
    window: tuple[int, int, int, int] | None = None,
) -> RawMask:
    """The stored values of a mask.

    Args:
        path: The mask.
        encoding: auto, index or rgb; auto takes three or more colour bands for colours.
        size: (width, height) it must have, if that is known.
        image: The image it belongs to, for messages.
        window: (x0, y0, width, height); None for the whole mask.

    Raises:
        DatasetError: unreadable, of another size, or not a mask of this encoding.
    """
    with open_raster(path) as source:
        if size is not None and (source.width, source.height) != size:
            raise DatasetError(
                f"mask {path} is {source.width} x {source.height}, but its image {image} is "
                f"{size[0]} x {size[1]}; a mask "
                f"must have its image's size, pixel by pixel"
            )
        area = None if window is None else Window(*window)
        colours = [c.name for c in source.colorinterp]
        bands = [i for i, colour in enumerate(colours, start=1) if colour != "alpha"]
        is_rgb = encoding == "rgb" or (encoding == "auto" and len(bands) >= 3)
        if is_rgb:
            values = _colours(source, bands, area, path)
        else:
            values = _indices(source, bands, area, path)
        alpha = colours.index("alpha") + 1 if "alpha" in colours else None
        transparent = None if alpha is None else source.read(alpha, window=area) == 0
        nodata = None if is_rgb else source.nodata
    return RawMask(values, is_rgb, transparent, nodata)


def decode(raw: RawMask, rule: MaskRule) -> tuple[np.ndarray, dict[int, int]]:
    """Class index uint8 [h, w], and how many pixels each unknown raw value has (they are 255 in the result).

    A mask's own nodata value is ignored, unless it is a class; so is what is transparent.
    """
    mapping = dict(rule.rgb if raw.is_rgb else rule.index)
    if raw.nodata is not None and float(raw.nodata).is_integer():
        mapping.setdefault(int(raw.nodata), IGNORE_INDEX)
    values = raw.values
    if values.dtype == np.uint8:
        table = np.full(256, _UNMAPPED, dtype=np.int16)
        for value, label in mapping.items():
            if 0 <= value < 256:
                table[value] = label
        labels = table[values]
    else:
        labels = np.full(values.shape, _UNMAPPED, dtype=np.int16)
        for value, label in mapping.items():
            labels[values == value] = label
    if raw.transparent is not None:
        labels[raw.transparent] = IGNORE_INDEX
    strange = labels == _UNMAPPED
    unknown: dict[int, int] = {}
    if strange.any():
        unknown = value_counts(values[strange])
        labels[strange] = IGNORE_INDEX
    return labels.astype(np.uint8), unknown


def read_labels(
    path: Path,
    rule: MaskRule,
    *,
    spec: DatasetSpec,
    size: tuple[int, int],
    image: str,
    window: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Class index uint8 [h, w] of a mask or a window of it.

    Raises:
        DatasetError: as `read_raw`, or a value outside the classes (unless the spec ignores those).
    """
    raw = read_raw(path, encoding=rule.encoding, size=size, image=image, window=window)
    labels, unknown = decode(raw, rule)
    if unknown and not rule.ignore_unknown:
        raise DatasetError(unknown_message(path, unknown, spec, is_rgb=raw.is_rgb))
    return labels


def unknown_message(path: Path | str, unknown: Mapping[int, int], spec: DatasetSpec, *, is_rgb: bool) -> str:
    """What is wrong with a mask that holds other values than the classes, and what it probably is."""
    common = sorted(unknown.items(), key=lambda item: (-item[1], item[0]))
    shown = few((f"{raw_name(value, is_rgb=is_rgb)} ({count} pixels)" for value, count in common), 4)
    if is_rgb:
        expected = f"a colour of the palette of {len(spec.palette)}"
        grey = all((v >> 16) == (v >> 8) & 255 == v & 255 for v in unknown)
        if str(path).lower().endswith((".jpg", ".jpeg")):
            hint = "JPEG changes colours: masks must be PNG or TIFF"
        elif grey:
            hint = "they are all grey, so these may be indices stored in three bands: set `mask_encoding: index`"
        else:
            hint = "correct `palette:`, or map the colour with `label_map:` (raw value 0xRRGGBB)"
    else:
        raws = sorted(value for value, _ in spec.label_map) or list(range(len(spec.classes)))
        expected = f"one of {few(map(str, raws), 12)}, or {IGNORE_INDEX} for ignored"
        if set(unknown) <= {0, 255, 254, 128, 127, 1}:
            hint = "a mask of 0 and 255 needs `label_map: [[0, 0], [255, 1]]`"
        else:
            hint = (
                "masks may be RGB colours saved as grey, or 0/255; set `label_map:` to map raw values, or "
                "`unknown_labels: ignore` to leave these pixels out"
            )
    return f"mask {path} holds {shown}; expected {expected} ({hint})"


def value_counts(values: np.ndarray) -> dict[int, int]:
    """How often each value occurs, by value."""
    if values.dtype == np.uint8:  # ten times faster than sorting
        counts = np.bincount(values.reshape(-1), minlength=256)
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def raw_name(value: int, *, is_rgb: bool) -> str:
    """A raw value as people write it: a number, or (r, g, b)."""
    return f"colour ({value >> 16}, {value >> 8 & 255}, {value & 255})" if is_rgb else f"value {value}"


def _indices(source: DatasetReader, bands: list[int], area: Window | None, path: Path) -> np.ndarray:
    if not bands:
        raise DatasetError(f"mask {path} has only an alpha band")
    values: np.ndarray = source.read(bands[0], window=area)
    for band in bands[1:]:
        if not np.array_equal(values, source.read(band, window=area)):
            raise DatasetError(
                f"mask {path} has {len(bands)} bands that differ, so it holds colours, not class indices: set "
                f"`mask_encoding: rgb` and list the colours in `palette:`"
            )
    if values.dtype.kind == "f":
        whole = np.where(np.isfinite(values), np.rint(values), 0)
        if not np.array_equal(whole, np.nan_to_num(values, nan=0.0, posinf=0.5, neginf=0.5)):
            raise DatasetError(f"mask {path} is {values.dtype} and holds fractions; class indices are whole numbers")
        # NaN marks what a GIS left unlabelled; 255 is ignored by default.
        values = np.where(np.isnan(values), IGNORE_INDEX, whole).astype(np.int64)
    return values


def _colours(source: DatasetReader, bands: list[int], area: Window | None, path: Path) -> np.ndarray:
    if source.dtypes[0] != "uint8":
        raise DatasetError(f"mask {path} is {source.dtypes[0]}; colours must be 8-bit")
    if len(bands) == 1 and source.colorinterp[bands[0] - 1].name == "palette":
        table = np.zeros(256, dtype=np.int32)
        for value, (r, g, b, _) in source.colormap(bands[0]).items():
            table[value] = (r << 16) | (g << 8) | b
        packed: np.ndarray = table[source.read(bands[0], window=area)]
        return packed
    if len(bands) < 3:
        raise DatasetError(
            f"mask {path} has {len(bands)} colour band(s), but `mask_encoding: rgb` needs three; set "
            f"`mask_encoding: index` if it holds class indices"
        )
    r, g, b = (source.read(band, window=area).astype(np.int32) for band in bands[:3])
    colours: np.ndarray = (r << 16) | (g << 8) | b
    return colours
