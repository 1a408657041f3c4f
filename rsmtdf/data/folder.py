"""The generic layout: a folder of images, and one of masks that mirrors its names.

An image's scene id is its path below the images folder, without suffix. Sub-folders called train, val or test are
the official split. Images without a mask are unlabelled.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from rsmtdf.data.names import few, inside
from rsmtdf.data.raster import SUFFIXES
from rsmtdf.data.scene import Parts, Scan, Scene
from rsmtdf.errors import DatasetError
from rsmtdf.specs import DatasetSpec

_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_FIELD = re.compile(r"\{stem(?::([^={}]+)=([^={}]*))?\}")


class FolderLayout:
    """Images in one folder (or tree), masks in another, or beside them under another name."""

    def scan(self, spec: DatasetSpec, root: Path) -> Scan:
        """See `Layout.scan`."""
        images_dir = inside(root, spec.images, what="images")
        masks_dir = inside(root, spec.masks, what="masks")
        if not (root / images_dir).is_dir():
            raise DatasetError(
                f"no folder {spec.images!r} in {root} (found: {_folders(root)}); set `images:` to the one that "
                f"holds the images"
            )
        skip = root / masks_dir if masks_dir != images_dir and masks_dir != "." else None
        images = _rasters(root, images_dir, skip=skip)
        mask_files = _rasters(root, masks_dir, skip=root / images_dir if images_dir not in (masks_dir, ".") else None)
        masks: dict[str, list[str]] = defaultdict(list)
        for path in mask_files:
            masks[_key(path, masks_dir)].append(path)

        wanted = {path: mask_key(_key(path, images_dir), spec.mask_name) for path in images}
        if masks_dir == images_dir:
            found = {key for path, key in wanted.items() if key in masks and key != _key(path, images_dir)}
            images = [path for path in images if _key(path, images_dir) not in found]
            mask_files = [path for path in mask_files if _key(path, masks_dir) in found]
            masks = defaultdict(list, {key: paths for key, paths in masks.items() if key in found})
        if not images:
            raise DatasetError(
                f"no images in {root / images_dir}: expected {', '.join(SUFFIXES)} files"
                f"{_other_files(root / images_dir)}"
            )
        return self._pair(images, images_dir, masks, {p: wanted[p] for p in images}, mask_files, spec)

    def _pair(
        self,
        images: list[str],
        images_dir: str,
        masks: dict[str, list[str]],
        wanted: dict[str, str],
        mask_files: list[str],
        spec: DatasetSpec,
    ) -> Scan:
        problems: list[str] = []
        scenes: dict[str, Scene] = {}
        used: set[str] = set()
        for path in images:
            scene_id = _key(path, images_dir)
            candidates = masks.get(wanted[path], [])
            used.update(candidates)
            if len(candidates) > 1:
                problems.append(f"scene {scene_id!r} has {len(candidates)} masks: {few(candidates)}; keep one of them")
            if scene_id in scenes:
                problems.append(
                    f"two images have the same name {scene_id!r}: {scenes[scene_id].image} and {path}; rename or "
                    f"remove one, because a tile's id is its image's path without suffix"
                )
                continue
            part = _PARTS.get(scene_id.split("/")[0].lower(), "") if "/" in scene_id else ""
            scenes[scene_id] = Scene(scene_id, path, candidates[0] if candidates else None, part=part)
        orphans = tuple(path for path in mask_files if path not in used)
        if mask_files and not used:
            raise DatasetError(
                f"none of the {len(mask_files)} masks in {spec.masks!r} belongs to an image: for {images[0]} a mask "
                f"called {wanted[images[0]]!r} is expected, found {few(mask_files, 3)}; set `mask_name:` "
                f"(such as '{{stem}}_mask', or '{{stem:_sat=_mask}}' to replace a part)"
            )
        return Scan(tuple(scenes[key] for key in sorted(scenes)), orphans, tuple(problems))

    def official_splits(self, tiles: Parts, *, seed: int) -> tuple[list[str], list[str], list[str]] | None:
        """The sub-folders train, val and test, if there are any; images elsewhere train."""
        del seed  # nothing is left to chance
        if not (tiles.get("train") and (tiles.get("val") or tiles.get("test"))):
            return None
        train = [t.id for part in ("train", "") for t in tiles.get(part, [])]
        # Without masks there is nothing to evaluate: such images are part of the unlabelled pool.
        train += [t.id for part in ("val", "test") for t in tiles.get(part, []) if t.mask is None]
        val = [t.id for t in tiles.get("val", []) if t.mask is not None]
        test = [t.id for t in tiles.get("test", []) if t.mask is not None]
        return train, val, test

    def aliases(self, spec: DatasetSpec, scene: Scene) -> list[tuple[str, str]]:
        """The image's and the mask's path below their own folders."""
        names = [(posixpath.relpath(scene.image, posixpath.normpath(spec.images)), "")]
        if scene.mask is not None:
            names.append((posixpath.relpath(scene.mask, posixpath.normpath(spec.masks)), ""))
        return names

    def mask_is_index(self) -> bool:
        """The band count decides."""
        return False


def mask_key(image_key: str, mask_name: str) -> str:
    """Where the mask of image `image_key` (path below the images folder, no suffix) lies below the masks folder.

    `{stem}` is the image's stem; `{stem:OLD=NEW}` replaces the first OLD in it.

    Raises:
        DatasetError: `mask_name` has no `{stem}`, or another field.
    """
    folder, stem = posixpath.split(image_key)
    name, fields = _FIELD.subn(lambda m: stem.replace(m[1], m[2], 1) if m[1] else stem, mask_name)
    if not fields or "{" in _FIELD.sub("", mask_name) or "/" in name:
        raise DatasetError(
            f"mask_name {mask_name!r} must hold {{stem}} or {{stem:OLD=NEW}}, no other field and no folder"
        )
    return posixpath.join(folder, name)


def _rasters(root: Path, folder: str, *, skip: Path | None) -> list[str]:
    """Raster files below `folder`, sorted, relative to `root`; hidden ones (and macOS's copies) are not data."""
    found: list[str] = []
    seen: set[str] = set()  # linked folders are followed, but not round and round
    for path, folders, files in os.walk(root / folder, followlinks=True):
        here = Path(path)
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [f for f in folders if not f.startswith((".", "__MACOSX")) and here / f != skip]
        found.extend(
            (here / name).relative_to(root).as_posix()
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        )
    return sorted(found)


def _key(path: str, folder: str) -> str:
    """The path below `folder` without suffix."""
    return posixpath.splitext(posixpath.relpath(path, folder))[0]


def _folders(root: Path) -> str:
    return few(sorted(_visible(root)), 8) or "no folders"


def _visible(root: Path) -> Iterator[str]:
    return (p.name + "/" for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _other_files(folder: Path) -> str:
    suffixes = sorted({p.suffix for p in folder.iterdir() if p.is_file() and p.suffix})
    return f", found {few(suffixes)}" if suffixes else ", but the folder is empty"
