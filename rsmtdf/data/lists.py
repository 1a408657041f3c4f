"""List files: one name a line (tile id, scene, image path or a name of the public lists), `#` starts a comment.

A second column, as in the official lists, must name the same tile's mask. Everything that is wrong with a file is
reported at once, with line numbers: a list that is silently cut short is a split that nobody asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rsmtdf.data.names import few
from rsmtdf.errors import DatasetError
from rsmtdf.specs import Tile

if TYPE_CHECKING:
    from rsmtdf.data.dataset import Dataset

SHOWN = 5
"""Wrong lines of a list that its error shows; near names are looked up for these alone."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a list."""

    line: int
    """1-based."""
    name: str
    tiles: tuple[Tile, ...]
    """Empty where the name is known but all its tiles were left out."""


def read_list(dataset: Dataset, path: Path, *, what: str) -> list[Entry]:
    """The entries of a list file, in its order.

    Args:
        dataset: Resolves the names.
        path: The file.
        what: What the list is for ('the val list'), for messages.

    Raises:
        DatasetError: no such file, no text, no entry; or lines that name nothing, leave the root, repeat an earlier
            line or pair an image with another's mask.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DatasetError(f"{what}: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{what}: {path} cannot be read as text: {error}") from error
    entries: list[Entry] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.split("#", 1)[0].strip()
        if not content:
            continue
        try:
            name, tiles = _resolve(dataset, content, hint=len(problems) < SHOWN)
        except DatasetError as error:
            problems.append(f"line {number}: {error}")
            continue
        entries.append(Entry(number, name, tuple(tiles)))
        repeated = next((t.id for t in tiles if t.id in first_line), None)
        if repeated is not None:
            problems.append(f"line {number}: {name!r} repeats line {first_line[repeated]} (tile {repeated})")
        for tile in tiles:
            first_line.setdefault(tile.id, number)
    if problems:
        shown = "\n  ".join(problems[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DatasetError(f"{what}: {path} has {len(problems)} wrong line(s):\n  {shown}{more}")
    if not entries:
        raise DatasetError(f"{what}: {path} names no tile")
    return entries


def tile_ids(entries: list[Entry]) -> list[str]:
    """The tiles of all entries, in order."""
    return [tile.id for entry in entries for tile in entry.tiles]


def require_masks(entries: list[Entry], *, path: Path, what: str) -> None:
    """Raises DatasetError where an entry's tile has no mask, though one is needed there."""
    bare = [f"line {e.line} ({e.tiles[0].image})" for e in entries if e.tiles and e.tiles[0].mask is None]
    if bare:
        raise DatasetError(
            f"{what}: {len(bare)} image(s) named in {path} have no mask, but one is needed there: {few(bare)}; add the "
            f"masks, or take the lines out"
        )


def _resolve(dataset: Dataset, content: str, *, hint: bool) -> tuple[str, list[Tile]]:
    columns = content.split()
    if len(columns) == 1:
        return content, dataset.resolve_name(content, hint=hint)
    if len(columns) > 2:
        try:  # a name with spaces in it
            return content, dataset.resolve_name(content, hint=False)
        except DatasetError:
            raise DatasetError(f"{len(columns)} columns; expected an image, or an image and its mask") from None
    try:
        tiles = dataset.resolve_name(columns[0], hint=False)
    except DatasetError:
        try:  # a name with a space in it
            return content, dataset.resolve_name(content, hint=False)
        except DatasetError:
            tiles = dataset.resolve_name(columns[0], hint=hint)  # raises again, with its hint
    if [t.id for t in dataset.resolve_name(columns[1], hint=hint)] != [t.id for t in tiles]:
        masks = few(sorted({str(t.mask) for t in tiles})) or "none"
        raise DatasetError(f"pairs {columns[0]} with {columns[1]}, but its mask here is {masks}")
    return columns[0], tiles
