"""A scene (one source raster and its mask) and what a layout must do to list them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rsmtdf.specs import DatasetSpec, Tile


@dataclass(frozen=True, slots=True)
class Scene:
    """One image file, and the mask that belongs to it. Paths are POSIX, relative to the data root."""

    id: str
    image: str
    mask: str | None
    domain: str = ""
    """Where labelled tiles are drawn from separately (LoveDA's urban and rural)."""
    part: str = ""
    """train, val or test, where the layout itself says so."""
    cell: tuple[int, int] | None = None
    """(row, column) of the one tile this file holds, in a tree that was cropped already."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What a layout finds below a root."""

    scenes: tuple[Scene, ...]
    orphan_masks: tuple[str, ...] = ()
    """Mask files that belong to no image."""
    problems: tuple[str, ...] = ()
    """What makes tile ids ambiguous (two files of one name): reading stops at it, `data check` lists it."""


Parts = Mapping[str, Sequence[Tile]]


class Layout(Protocol):
    """How one kind of tree lies on disk. Layouts hold no state; `LAYOUTS` names them."""

    def scan(self, spec: DatasetSpec, root: Path) -> Scan:
        """Every scene below `root`, by file names alone.

        Raises:
            DatasetError: the tree is not of this layout; the message names the folders expected and found.
        """
        ...

    def official_splits(self, tiles: Parts, *, seed: int) -> tuple[list[str], list[str], list[str]] | None:
        """Train, val and test tile ids by the layout's own rule, or None where it has none.

        Args:
            tiles: Tiles per part (`Scene.part`), each sorted by id.
            seed: For what the rule leaves to chance.
        """
        ...

    def aliases(self, spec: DatasetSpec, scene: Scene) -> list[tuple[str, str]]:
        """Further names of a scene's parts in public lists: (name, quarter), quarter '' for the whole scene.

        A quarter is 1..4 in reading order.
        """
        ...

    def mask_is_index(self) -> bool:
        """Whether masks with several equal bands are indices, whatever their band count suggests."""
        ...
