"""LoveDA as downloaded, and the same tree cropped by RS-DWL's script: one set of tile ids for both.

    Train/{Urban,Rural}/{images_png,masks_png}/<id>.png     Val/... the same     Test/{Urban,Rural}/images_png/<id>.png

Scene ids are the file numbers, which are unique over the whole data set. RS-DWL's crops `<id>_<k>.png` are the
quarters of a scene in reading order: 1 up-left, 2 up-right, 3 down-left, 4 down-right. Raw masks hold 0 for no data
and 1..7 for the classes; the cropped tree stores them three times over. Sources: zhu-xlab/RS-DWL
(loveDA_crop_split.py), Zenodo record 5706578.
"""

from __future__ import annotations

import re
from pathlib import Path

from rsmtdf.data.names import few
from rsmtdf.data.scene import Parts, Scan, Scene
from rsmtdf.errors import DatasetError
from rsmtdf.keyed import Draws
from rsmtdf.specs import DatasetSpec

LOVEDA = DatasetSpec(
    name="loveda",
    layout="loveda",
    classes=("background", "building", "road", "water", "barren", "forest", "agriculture"),
    palette=(
        (255, 255, 255),
        (255, 0, 0),
        (255, 255, 0),
        (0, 0, 255),
        (159, 129, 183),
        (0, 255, 0),
        (255, 195, 128),
    ),
    mask_encoding="index",
    label_map=((0, 255), *((raw, raw - 1) for raw in range(1, 8))),
    gsd_m=0.3,
)

_PARTS = ("Train", "Val", "Test")
_DOMAINS = ("Urban", "Rural")
_NAME = re.compile(r"(\d+)(?:_([1-4]))?\.png")


class LovedaLayout:
    """The tree of the three zip files."""

    def scan(self, spec: DatasetSpec, root: Path) -> Scan:
        """See `Layout.scan`."""
        del spec
        scenes: dict[tuple[str, str], Scene] = {}
        problems: list[str] = []
        orphans: list[str] = []
        strange: list[str] = []
        for part in _PARTS:
            for domain in _DOMAINS:
                base = f"{part}/{domain}"
                images, masks = _names(root / base / "images_png"), _names(root / base / "masks_png")
                orphans += [f"{base}/masks_png/{name}" for name in sorted(masks - images)]
                for name in sorted(images):
                    if (match := _NAME.fullmatch(name)) is None:
                        strange.append(f"{base}/images_png/{name}")
                        continue
                    number, quarter = str(int(match[1])), match[2] or ""
                    image = f"{base}/images_png/{name}"
                    mask = f"{base}/masks_png/{name}" if name in masks else None
                    if (other := scenes.get((number, quarter))) is not None:
                        problems.append(
                            f"scene {number} appears twice: {other.image} and {image}; LoveDA's numbers are unique, "
                            f"so one of them is a copy"
                        )
                        continue
                    cell = divmod(int(quarter) - 1, 2) if quarter else None
                    scenes[number, quarter] = Scene(number, image, mask, domain.lower(), part.lower(), cell)
        if not scenes:
            found = sorted(p.name for p in root.iterdir())
            raise DatasetError(
                f"no LoveDA images in {root}: expected Train/Urban/images_png/<number>.png and so on "
                f"(found: {few(found, 8) or 'nothing'}); unpack Train.zip and Val.zip there, or set `layout: folder`"
            )
        if strange:
            problems.append(f"{len(strange)} file name(s) are not LoveDA numbers: {few(strange)}")
        whole = {number for number, quarter in scenes if not quarter}
        if twice := sorted({number for number, quarter in scenes if quarter and number in whole}, key=int):
            problems.append(
                f"{len(twice)} scene(s) are there both whole and cropped: {few(twice)}; keep one of the two trees"
            )
        return Scan(tuple(scenes[key] for key in sorted(scenes)), tuple(orphans), tuple(problems))

    def official_splits(self, tiles: Parts, *, seed: int) -> tuple[list[str], list[str], list[str]] | None:
        """RS-DWL's rule: Train trains; Val's tiles pooled and shuffled, first half test, second half val.

        The published lists are not public and no seed was set, so the shuffle is ours (keyed), the counts theirs.
        The Test folder has no masks and is in none of the three, as published.
        """
        pool = sorted(t.id for t in tiles.get("val", []))
        pool = Draws("loveda official val", seed).choose(pool, len(pool))
        half = len(pool) // 2
        return [t.id for t in tiles.get("train", [])], pool[half:], pool[:half]

    def aliases(self, spec: DatasetSpec, scene: Scene) -> list[tuple[str, str]]:
        """Names of the other tree: the crops of a whole scene, or the scene of a crop; also without folders."""
        del spec
        base = "/".join(scene.image.split("/")[:2])
        folders = [f"{base}/images_png/", f"{base}/masks_png/", ""]
        quarters = ["1", "2", "3", "4"] if scene.cell is None else [str(scene.cell[0] * 2 + scene.cell[1] + 1)]
        names = [(f"{folder}{scene.id}_{quarter}.png", quarter) for folder in folders for quarter in quarters]
        return names + [(f"{folder}{scene.id}.png", "") for folder in folders]

    def mask_is_index(self) -> bool:
        """Masks are indices; the cropped tree repeats them in three bands."""
        return True


def _names(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    return {p.name for p in folder.iterdir() if p.suffix.lower() == ".png" and not p.name.startswith(".")}
