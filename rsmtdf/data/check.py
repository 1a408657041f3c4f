"""`data check`: reads every image and mask once and says all that is wrong, instead of stopping at the first."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rsmtdf.data.dataset import Dataset
from rsmtdf.data.listing import require_bytes
from rsmtdf.data.masks import decode, read_raw, unknown_message, value_counts
from rsmtdf.data.names import few
from rsmtdf.data.raster import choose_bands, read_header
from rsmtdf.data.usable import Progress, each
from rsmtdf.errors import DatasetError
from rsmtdf.specs import IGNORE_INDEX, Tile

_STRIP_PX = 16_000_000
"""Masks are read in strips of at most this many pixels, so a large raster does not fill the memory."""


@dataclass(frozen=True, slots=True)
class UnknownValue:
    """A raw mask value that is no class."""

    mask: str
    value: int
    """0xRRGGBB for colours."""
    pixels: int


@dataclass(slots=True, kw_only=True)
class Report:
    """What `check_dataset` found. `problems` is empty where everything is in order."""

    name: str
    root: str
    images: int = 0
    masks: int = 0
    tiles: int = 0
    labelled_tiles: int = 0
    left_out_tiles: int = 0
    """Below `min_valid`."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Images per 'width x height'."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Images per 'bands x dtype'."""
    class_pixels: dict[str, int] = field(default_factory=dict)
    """Labelled pixels per class, in class order."""
    ignored_pixels: int = 0
    """Pixels of masks that are 255."""
    images_without_mask: list[str] = field(default_factory=list)
    masks_without_image: list[str] = field(default_factory=list)
    size_mismatches: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    unknown_values: list[UnknownValue] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """One sentence each; the first is what reading would stop at."""
    notes: list[str] = field(default_factory=list)
    """What is worth a look, but may be meant."""

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        unknown = [{"mask": u.mask, "value": u.value, "pixels": u.pixels} for u in self.unknown_values]
        return {**plain, "unknown_values": unknown, "ok": self.ok}

    def text(self) -> str:
        """For people, several lines."""
        total = sum(self.class_pixels.values())
        lines = [
            f"{self.name} in {self.root}",
            f"  images  {self.images} ({_counts(self.sizes)}; {_counts(self.kinds)})",
            f"  masks   {self.masks}, {len(self.images_without_mask)} image(s) unlabelled",
            f"  tiles   {self.tiles}, {self.labelled_tiles} labelled; {self.left_out_tiles} left out (edges, nodata)",
        ]
        width = max((len(name) for name in self.class_pixels), default=0)
        for name, pixels in self.class_pixels.items():
            lines.append(f"  {name:<{width}}  {pixels / total if total else 0:7.2%}  {pixels} px")
        if self.masks:
            lines.append(f"  {'(ignored)':<{width}}  {'':>7}  {self.ignored_pixels} px")
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  PROBLEM {problem}" for problem in self.problems] or ["  no problems found"]
        return "\n".join(lines)


@dataclass(slots=True)
class _Found:
    """Of one image and its mask."""

    pixels: np.ndarray
    """Per label value, int64 [256]."""
    unreadable: dict[str, str] = field(default_factory=dict)
    mismatch: str = ""
    unknown: dict[int, int] = field(default_factory=dict)
    is_rgb: bool = False
    raw_values: set[int] = field(default_factory=set)
    poor_tiles: int = 0


def check_dataset(
    dataset: Dataset, *, tiles: Iterable[Tile] | None = None, workers: int = 0, progress: Progress | None = None
) -> Report:
    """Reads every image and mask (of `tiles`, or all) and reports counts, classes and everything that is wrong.

    Args:
        dataset: What to check.
        tiles: Only the files of these tiles.
        workers: Threads; 0 reads in this one.
        progress: Called after each file with (done, total).

    Raises:
        DatasetError: the root is not of the spec's layout, or holds no image; all else is in the report.
    """
    listing, spec = dataset.listing, dataset.spec
    wanted = None if tiles is None else {tile.image for tile in tiles}
    images = [image for image in listing.scenes if wanted is None or image in wanted]
    by_image: dict[str, list[Tile]] = defaultdict(list)
    for tile in listing.tiles.values():
        by_image[tile.image].append(tile)
    chosen = [tile for image in images for tile in by_image[image]]
    report = Report(
        name=spec.name,
        root=str(dataset.root),
        images=len(images),
        masks=sum(listing.scenes[image].mask is not None for image in images),
        tiles=len(chosen),
        labelled_tiles=sum(tile.mask is not None for tile in chosen),
        left_out_tiles=len(listing.left_out) if wanted is None else 0,
        sizes=dict(Counter(listing.headers[i].size for i in images if i in listing.headers)),
        kinds=dict(
            Counter(f"{h.count} x {h.dtype}" for i, h in listing.headers.items() if wanted is None or i in wanted)
        ),
        images_without_mask=[image for image in images if listing.scenes[image].mask is None],
        masks_without_image=list(listing.scan.orphan_masks) if wanted is None else [],
        unreadable={i: reason for i, reason in listing.unreadable.items() if wanted is None or i in wanted},
        problems=list(listing.scan.problems),
    )
    readable = [image for image in images if image in listing.headers]
    is_rgb_ready = _check_bands(dataset, readable, report)
    found = each(
        lambda image: _look(dataset, image, by_image[image], read_image=is_rgb_ready), readable, workers, progress
    )
    _summarise(dataset, dict(zip(readable, found, strict=True)), report)
    return report


def _check_bands(dataset: Dataset, images: list[str], report: Report) -> bool:
    """Adds what keeps images from being RGB bytes to the problems; True where nothing does."""
    headers = {image: dataset.listing.headers[image] for image in images}
    wrong: list[str] = []
    for image, header in headers.items():
        try:
            choose_bands(header, dataset.spec.bands, where=f"image {image}")
        except DatasetError as error:
            wrong.append(str(error))
    if wrong:
        report.problems.append(wrong[0] + (f" ({len(wrong) - 1} more like this)" if len(wrong) > 1 else ""))
        return False
    try:
        if dataset.spec.scaling is None:
            require_bytes(headers, dataset.spec, dataset.root)
    except DatasetError as error:
        report.problems.append(str(error))
        return False
    if len({header.dtype for header in headers.values()}) > 1:
        report.problems.append(
            f"images have different types ({_counts(report.kinds)}), but one scaling serves them all"
        )
    return True


def _look(dataset: Dataset, image: str, tiles: list[Tile], *, read_image: bool) -> _Found:
    listing, spec, rule = dataset.listing, dataset.spec, dataset.mask_rule
    header, mask = listing.headers[image], listing.scenes[image].mask
    found = _Found(np.zeros(256, dtype=np.int64))
    if read_image:
        limit = spec.min_valid * spec.tile_px**2
        try:
            found.poor_tiles = sum(bool(dataset.read_image(tile)[1].sum() < limit) for tile in tiles)
        except DatasetError as error:
            found.unreadable[image] = str(error)
    if mask is None:
        return found
    try:
        own = read_header(dataset.root / mask)
        if (own.width, own.height) != (header.width, header.height):
            found.mismatch = f"mask {mask} is {own.size}, but its image {image} is {header.size}"
            return found
        rows = max(1, min(header.height, _STRIP_PX // header.width))
        for y0 in range(0, header.height, rows):
            window = (0, y0, header.width, min(rows, header.height - y0))
            raw = read_raw(dataset.root / mask, encoding=rule.encoding, window=window)
            labels, unknown = decode(raw, rule)
            found.is_rgb = raw.is_rgb
            found.pixels += np.bincount(labels.reshape(-1), minlength=256)
            for value, count in unknown.items():
                found.unknown[value] = found.unknown.get(value, 0) + count
            if raw.values.dtype == np.uint8:
                found.raw_values.update(value_counts(raw.values))
    except DatasetError as error:
        found.unreadable[mask] = str(error)
    return found


def _summarise(dataset: Dataset, found: dict[str, _Found], report: Report) -> None:
    spec, problems = dataset.spec, report.problems
    pixels = sum((f.pixels for f in found.values()), np.zeros(256, dtype=np.int64))
    report.class_pixels = {name: int(pixels[i]) for i, name in enumerate(spec.classes)}
    report.ignored_pixels = int(pixels[IGNORE_INDEX])
    report.left_out_tiles += sum(f.poor_tiles for f in found.values())
    report.tiles -= sum(f.poor_tiles for f in found.values())
    report.labelled_tiles -= sum(f.poor_tiles for i, f in found.items() if dataset.listing.scenes[i].mask is not None)
    strange: list[str] = []
    for image, one in found.items():
        mask = str(dataset.listing.scenes[image].mask)
        report.unreadable |= one.unreadable
        if one.mismatch:
            report.size_mismatches.append(one.mismatch)
        if one.unknown:
            report.unknown_values += [UnknownValue(mask, value, n) for value, n in sorted(one.unknown.items())]
            strange.append(unknown_message(mask, one.unknown, spec, is_rgb=one.is_rgb))
    if report.unreadable:
        problems.append(f"{len(report.unreadable)} file(s) cannot be read: {few(report.unreadable.values(), 3)}")
    if report.size_mismatches:
        problems.append(f"{len(report.size_mismatches)} mask(s) of another size: {few(report.size_mismatches, 2)}")
    if strange and spec.unknown_labels == "error":
        problems.append(f"{len(strange)} mask(s) hold values outside the classes: {few(strange, 3)}")
    if report.masks_without_image:
        problems.append(
            f"{len(report.masks_without_image)} mask(s) belong to no image: {few(report.masks_without_image)}"
        )
    raw_values = set().union(*(f.raw_values for f in found.values()))
    if 255 in raw_values and raw_values <= {0, 255} and not spec.label_map and len(spec.classes) > 1:
        problems.append(
            "all masks hold only 0 and 255, and 255 is ignored, so only the first class is labelled: for 0/255 masks "
            "set `label_map: [[0, 0], [255, 1]]`"
        )
    elif report.masks and (absent := [name for name, n in report.class_pixels.items() if not n]) and not strange:
        report.notes.append(f"no pixel is labelled {few(absent, 8)}: check the order of `classes:` and `label_map:`")
    if report.images and not report.tiles and not report.unreadable:
        problems.append(
            f"no tile has {spec.min_valid:.0%} valid pixels: check nodata (`nodata:`), `tile_px:` and `min_valid:`"
        )


def _counts(counts: dict[str, int]) -> str:
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return few((f"{count} of {name}" if len(counts) > 1 else name for name, count in common), 4)
