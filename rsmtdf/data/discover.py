"""`rsmtdf init`: looks at a user's folder and proposes the data set's description, saying what it saw.

Every guess ends up as a line of YAML that can be corrected, with a note that names the evidence. Nothing is written
here, and nothing is guessed where a wrong guess would train wrong labels silently.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rsmtdf.data.dataset import Dataset
from rsmtdf.data.folder import mask_key
from rsmtdf.data.listing import Listing, list_dataset
from rsmtdf.data.loveda import LOVEDA
from rsmtdf.data.masks import read_raw, value_counts
from rsmtdf.data.names import few
from rsmtdf.data.raster import SUFFIXES, is_guess, open_raster, read_header
from rsmtdf.data.scaling import suggest_scaling
from rsmtdf.errors import DatasetError
from rsmtdf.specs import IGNORE_INDEX, DatasetSpec, SplitSpec

_MASK_WORDS = ("mask", "label", "annotation", "ann_dir", "ground_truth", "groundtruth", "gt", "segmentationclass")
_IMAGE_WORDS = ("image", "img", "jpegimage", "rgb", "ortho", "scene", "photo", "sat")
_SUFFIX_PAIRS = (("_sat", "_mask"), ("_image", "_mask"), ("_img", "_mask"), ("_RGB", "_label"), ("_rgb", "_label"))
_LIST_FOLDERS = ("", "splits", "lists", "ImageSets/Segmentation")
_MASK_SAMPLE = 256
_MAX_CLASSES = 64
# Colours that stay apart for most colour-blind readers (Okabe and Ito), then plain ones.
_COLOURS = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (86, 180, 233),
    (213, 94, 0),
    (128, 128, 128),
    (127, 0, 255),
    (139, 69, 19),
)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A description to correct and save."""

    spec: DatasetSpec
    splits: SplitSpec
    """List paths in it are relative to the folder that was looked at."""
    notes: tuple[str, ...]
    """What was seen and what to check, one sentence each."""


def propose(root: Path) -> Proposal:
    """A data set and its splits as they appear to lie below `root`.

    Reads all headers and up to 256 masks, evenly spaced.

    Raises:
        DatasetError: no folder, no images, or masks that fit no encoding.
    """
    if not root.is_dir():
        raise DatasetError(f"{root} {'is not a folder' if root.exists() else 'does not exist'}")
    if any(
        (root / part / domain / "images_png").is_dir() for part in ("Train", "Val") for domain in ("Urban", "Rural")
    ):
        note = "this is LoveDA's folder tree: its classes, label values and official split are used"
        return Proposal(LOVEDA, SplitSpec(by="official"), (note,))
    notes: list[str] = []
    spec = _folders(root, notes)
    listing = list_dataset(spec, root)
    spec = _classes(spec, listing, root, notes)
    spec = _pixels(spec, listing, root, notes)
    dataset = Dataset(spec, root)
    return Proposal(spec, _splits(dataset, notes), tuple(notes))


def _folders(root: Path, notes: list[str]) -> DatasetSpec:
    """Where images and masks are, and how their names correspond."""
    stems = _stems_by_folder(root)
    if not stems:
        raise DatasetError(f"no images in {root}: expected {', '.join(SUFFIXES)} files in it or in a folder below it")
    name = re.sub(r"[^a-z0-9]+", "-", root.resolve().name.lower()).strip("-") or "data"
    base = DatasetSpec(name=name, classes=("background",), palette=((0, 0, 0),))
    tops = _tops(stems)
    masks = _named(tops, _MASK_WORDS)
    images = _named({folder: n for folder, n in tops.items() if folder != masks}, _IMAGE_WORDS)
    if images is None:
        others = {folder: n for folder, n in tops.items() if folder != masks}
        images = max(others, key=lambda folder: others[folder]) if others else masks
    if images is None or images == masks:
        raise DatasetError(f"{root} holds masks ({masks}), but no images beside them")
    if masks is not None:
        spec = replace(base, images=images, masks=masks)
        rule = _mask_rule(_keys(stems, images), _keys(stems, masks))
        if rule is None:
            raise DatasetError(
                f"images in {images!r} and masks in {masks!r} have no names in common: found "
                f"{few(sorted(_keys(stems, images)), 2)} and {few(sorted(_keys(stems, masks)), 2)}; rename them alike"
            )
        notes.append(f"images in {images}/, masks in {masks}/" + ("" if rule == "{stem}" else f" named {rule}"))
        return replace(spec, mask_name=rule)
    inner = _keys(stems, images)
    for old, new in _SUFFIX_PAIRS:
        rule = f"{{stem:{old}={new}}}"
        if any(key.endswith(old) and mask_key(key, rule) in inner for key in inner):
            notes.append(f"images and masks lie together in {images}/: *{old} and *{new}")
            return replace(base, images=images, masks=images, mask_name=rule)
    for new in ("_mask", "_label", "_gt"):
        if any(key + new in inner for key in inner):
            notes.append(f"images and masks lie together in {images}/: masks end in {new}")
            return replace(base, images=images, masks=images, mask_name=f"{{stem}}{new}")
    notes.append(f"images in {images}/; no masks found: put them in masks/, named like their images")
    return replace(base, images=images)


def _classes(spec: DatasetSpec, listing: Listing, root: Path, notes: list[str]) -> DatasetSpec:
    """Classes, palette, encoding and label map, from the values in the masks."""
    masks = [scene.mask for scene in listing.scan.scenes if scene.mask is not None]
    unlabelled = len(listing.scan.scenes) - len(masks)
    notes.append(
        f"{len(listing.scan.scenes)} images, {len(masks)} with a mask" + (", the rest unlabelled" * (unlabelled > 0))
    )
    if listing.scan.orphan_masks:
        notes.append(
            f"{len(listing.scan.orphan_masks)} mask(s) belong to no image: {few(listing.scan.orphan_masks, 3)}"
        )
    if not masks:
        notes.append("classes are a placeholder: name yours")
        return replace(spec, classes=("background", "class_1"), palette=_palette(2))
    sample = [masks[round(i)] for i in np.linspace(0, len(masks) - 1, min(len(masks), _MASK_SAMPLE))]
    counts: dict[bool, Counter[int]] = {False: Counter(), True: Counter()}
    grey_rgb = True
    for mask in sample:
        raw = read_raw(root / mask, encoding="auto")
        found = value_counts(raw.values)
        if len(found) > 4 * _MAX_CLASSES:
            lossy = (
                " (JPEG changes colours: masks must be PNG or TIFF)" if mask.lower().endswith((".jpg", ".jpeg")) else ""
            )
            raise DatasetError(f"mask {mask} holds {len(found)} different values, so it is no class mask{lossy}")
        counts[raw.is_rgb].update(found)
        grey_rgb &= not raw.is_rgb or all((v >> 16) == (v >> 8) & 255 == v & 255 for v in found)
    if counts[True] and counts[False]:
        raise DatasetError(
            f"some masks below {spec.masks}/ have one band and some three; convert them to one kind (class indices)"
        )
    seen = f"in {len(sample)} of {len(masks)} masks" if len(sample) < len(masks) else f"in all {len(masks)} masks"
    if counts[True] and not (grey_rgb and len(counts[True]) > 0 and max(v & 255 for v in counts[True]) < _MAX_CLASSES):
        return _rgb_classes(spec, counts[True], seen, notes)
    index = Counter({v & 255: n for v, n in counts[True].items()}) if counts[True] else counts[False]
    if counts[True]:
        notes.append("the masks have three equal bands: read as class indices")
    return _index_classes(spec, index, seen, _own_palette(root / sample[0]), notes)


def _rgb_classes(spec: DatasetSpec, counts: Counter[int], seen: str, notes: list[str]) -> DatasetSpec:
    colours = sorted(counts, key=lambda v: (-counts[v], v))
    if len(colours) > _MAX_CLASSES:
        raise DatasetError(
            f"the masks hold {len(colours)} colours, so they are no class masks (resampled or saved as JPEG?); "
            f"expected at most {_MAX_CLASSES}"
        )
    palette = tuple((v >> 16, v >> 8 & 255, v & 255) for v in colours)
    notes.append(
        f"masks are RGB with {len(colours)} colours {seen}, most frequent first: name the classes in that order"
    )
    if 0 in counts and len(colours) > 2:
        notes.append(
            "black may mean unlabelled: then take it out of classes and palette, and add `label_map: [[0, 255]]`"
        )
    names = tuple(f"class_{i}" for i in range(len(colours)))
    return replace(spec, classes=names, palette=palette, mask_encoding="rgb")


def _index_classes(
    spec: DatasetSpec, counts: Counter[int], seen: str, own: Mapping[int, tuple[int, int, int]], notes: list[str]
) -> DatasetSpec:
    values = sorted(counts)
    real = [v for v in values if v != IGNORE_INDEX]
    label_map: tuple[tuple[int, int], ...] = ()
    if values in ([0, 255], [255]):
        label_map = ((0, 0), (255, 1))
        names: tuple[str, ...] = ("background", "foreground")
        notes.append(f"masks hold 0 and 255 {seen}: taken as two classes (if 255 means unlabelled, drop `label_map:`)")
    elif real and real[0] >= 0 and real[-1] < max(_MAX_CLASSES // 4, 2 * len(real)):
        names = tuple(f"class_{i}" for i in range(real[-1] + 1))
        ignored = "; 255 is ignored" if IGNORE_INDEX in counts else ""
        notes.append(f"masks hold values {real[0]} to {real[-1]} {seen}{ignored}: name the {len(names)} classes")
        if real[0] == 1:
            notes.append("no mask holds 0: if classes start at 1, map them with `label_map: [[1, 0], [2, 1], ...]`")
    else:
        if len(real) > _MAX_CLASSES:
            raise DatasetError(f"the masks hold {len(real)} different values; expected at most {_MAX_CLASSES} classes")
        label_map = tuple((value, i) for i, value in enumerate(real))
        names = tuple(f"value_{value}" for value in real)
        notes.append(f"masks hold {few(map(str, real), 8)} {seen}: mapped to classes in that order (`label_map:`)")
    raws = {label: raw for raw, label in label_map} or {i: i for i in range(len(names))}
    table = [own.get(raws[i]) for i in range(len(names))]
    distinct = len(set(table)) == len(table) and None not in table
    palette = tuple(c for c in table if c is not None) if distinct else _palette(len(names))
    return replace(spec, classes=names, palette=palette, mask_encoding="index", label_map=label_map)


def _pixels(spec: DatasetSpec, listing: Listing, root: Path, notes: list[str]) -> DatasetSpec:
    """Bands, scaling, tile size and resolution, from the headers."""
    headers = listing.headers
    if listing.unreadable:
        notes.append(f"{len(listing.unreadable)} image(s) cannot be opened: {few(listing.unreadable.values(), 2)}")
    if not headers:
        raise DatasetError(f"none of the images in {root} can be opened: {few(listing.unreadable.values(), 2)}")
    colours = min(1 if h.is_palette else len(h.colour_bands) for h in headers.values())
    if colours < 3 and not all(h.is_palette for h in headers.values()):
        spec = replace(spec, bands=(1, 1, 1))
        notes.append(f"images have {colours} band(s): band 1 is shown as grey")
    elif any(len(h.colour_bands) > 3 for h in headers.values()):
        most = max(len(h.colour_bands) for h in headers.values())
        if any(is_guess(h, None) for h in headers.values()):
            notes.append(
                f"images have {most} bands without names: 1, 2, 3 are taken as red, green, blue; if they are not, say "
                "which are (`bands: [3, 2, 1]`)"
            )
        else:
            notes.append(f"images have {most} bands: red, green, blue are used; `bands: [4, 1, 2]` is false colour")
    types = sorted({h.dtype for h in headers.values()})
    if types != ["uint8"]:
        scaling = suggest_scaling(
            [(root / image, header) for image, header in headers.items()], bands=spec.bands, nodata=spec.nodata
        )
        spec = replace(spec, scaling=scaling)
        notes.append(
            f"images are {', '.join(types)}: `scaling:` is the 2nd to the 98th percentile of all scenes, for the bands "
            "above; with other `bands:`, take it out, and data check prints the new line"
        )
    short = float(np.median([min(h.width, h.height) for h in headers.values()]))
    if short < spec.tile_px:
        spec = replace(spec, tile_px=max(32, round(short)))
        notes.append(f"images are small: tiles of {spec.tile_px} px")
    gsd = [h.gsd_m for h in headers.values() if h.gsd_m is not None]
    if gsd:
        spec = replace(spec, gsd_m=float(f"{float(np.median(gsd)):.4g}"))
        notes.append(f"one pixel is about {spec.gsd_m:g} m")
    return spec


def _splits(dataset: Dataset, notes: list[str]) -> SplitSpec:
    """Lists where there are some, else sub-folders, groups in the names, scenes, tiles, in this order."""
    root = dataset.root
    for folder in _LIST_FOLDERS:
        lists = {
            p: f"{folder}/{p}.txt".lstrip("/")
            for p in ("train", "val", "test")
            if (root / folder / f"{p}.txt").is_file()
        }
        if lists:
            notes.append(f"lists found: {', '.join(lists.values())} (relative to {root.name}/)")
            return SplitSpec(train=lists.get("train"), val=lists.get("val"), test=lists.get("test"))
    listing = dataset.listing
    scenes = [scene for scene in listing.scan.scenes if scene.mask is not None]
    parts = {scene.part for scene in scenes}
    if {"train"} < parts - {""} or {"train", "val"} <= parts:
        notes.append(f"sub-folders {', '.join(sorted(parts - {''}))} are the splits")
        return SplitSpec(by="official")
    pattern = r"^(.+)[_-][^_-]+$"
    groups = Counter(m[1] for scene in scenes if (m := re.match(pattern, scene.id)))
    if sum(groups.values()) == len(scenes) and len(groups) >= 4 and len(scenes) >= 2 * len(groups):
        notes.append(f"{len(groups)} groups in the names ({few(sorted(groups), 3)}): kept whole when splitting")
        return SplitSpec(by="group", group=pattern)
    if len(scenes) >= 5 or not scenes:
        notes.append("split by scene: 60 % train, 20 % val, 20 % test")
        return SplitSpec(by="scene")
    notes.append(f"only {len(scenes)} labelled scene(s): split by tile, so results will look better than on new scenes")
    return SplitSpec(by="tile")


def _stems_by_folder(root: Path) -> dict[str, set[str]]:
    """Stems of the rasters directly in each folder, by its POSIX path below `root` ('.' for itself)."""
    stems: dict[str, set[str]] = defaultdict(set)
    seen: set[str] = set()  # linked folders are followed, as in reading, but not round and round
    for path, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        relative = Path(path).relative_to(root).as_posix()
        for file in files:
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                stems[relative].add(Path(file).stem)
    return dict(stems)


def _tops(stems: Mapping[str, set[str]]) -> dict[str, int]:
    """Number of rasters at or below each top-level folder ('.' for the root's own files)."""
    tops: Counter[str] = Counter()
    for folder, names in stems.items():
        tops[folder.split("/")[0]] += len(names)
    return dict(tops)


def _named(folders: Mapping[str, int], words: Iterable[str]) -> str | None:
    """The folder whose name holds one of `words`: a bare name before a longer one (masks before masks_original)."""
    fits = [f for f in folders if any(re.search(rf"(^|[^a-z]){word}", f.lower()) for word in words)]
    return min(fits, key=lambda f: (len(f), f)) if fits else None


def _keys(stems: Mapping[str, set[str]], top: str) -> set[str]:
    """Paths without suffix, below folder `top`."""
    keys: set[str] = set()
    for folder, names in stems.items():
        if folder == top:
            keys |= names
        elif folder.startswith(f"{top}/"):
            keys |= {f"{folder[len(top) + 1 :]}/{name}" for name in names}
    return keys


def _mask_rule(images: set[str], masks: set[str]) -> str | None:
    """The `mask_name` that pairs most images with a mask; None where none pairs any."""
    rules = ["{stem}", *(f"{{stem:{old}={new}}}" for old, new in _SUFFIX_PAIRS)]
    rules += [f"{{stem}}{new}" for new in ("_mask", "_label", "_gt")]
    rules += [f"{{stem:{old}={new}}}" for old in ("image", "img", "sat") for new in ("mask", "label", "gt")]
    hits = {rule: sum(mask_key(image, rule) in masks for image in images) for rule in rules}
    best = max(rules, key=lambda rule: hits[rule])
    return best if hits[best] else None


def _palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """`count` colours that differ; beyond the named ones, spread by the golden angle's cousin in each channel."""
    more = [((i * 67) % 256, (i * 139) % 256, (i * 211) % 256) for i in range(1, count + 1)]
    return tuple((*_COLOURS, *(c for c in more if c not in _COLOURS))[:count])


def _own_palette(mask: Path) -> dict[int, tuple[int, int, int]]:
    """The colour table of a palette mask."""
    if not read_header(mask).is_palette:
        return {}
    with open_raster(mask) as source:
        return {value: (r, g, b) for value, (r, g, b, _) in source.colormap(1).items()}
