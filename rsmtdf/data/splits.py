"""Which tiles train, validate and test.

Given lists are read; what has no list is generated, from names sorted by text and a keyed shuffle, so a split depends
on neither the file system's order nor the machine. Cutting by scene or group keeps neighbours together: crops of one
scene on both sides of a split make results look better than they are.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rsmtdf.data.layouts import layout_of
from rsmtdf.data.lists import Entry, read_list, require_masks, tile_ids
from rsmtdf.data.names import few, near
from rsmtdf.errors import ConfigError, DatasetError
from rsmtdf.keyed import Draws
from rsmtdf.specs import SplitSpec, Tile

if TYPE_CHECKING:
    from rsmtdf.data.dataset import Dataset

log = logging.getLogger(__name__)

PARTS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Splits:
    """Tile ids, each tuple sorted; no tile is in two of them."""

    train: tuple[str, ...]
    """The pool: labelled or not."""
    val: tuple[str, ...]
    test: tuple[str, ...]


def make_splits(
    dataset: Dataset,
    tiles: Sequence[Tile],
    spec: SplitSpec,
    *,
    base: Path,
    held_out: Mapping[str, Collection[str]] | None = None,
) -> Splits:
    """The three splits of `tiles`.

    A given list is taken as it is: with a train list, the pool is exactly that list. The parts without a list are cut
    from the tiles that no list names, in proportion to their fractions; tiles without a mask go to the train part.

    Args:
        dataset: Resolves names and knows the official split.
        tiles: The usable tiles. Tiles of a list that are not among them (too few valid pixels) are left out.
        spec: Lists, or how to cut.
        base: The folder that relative list paths start from.
        held_out: `val` and `test` tiles that were drawn before, from a folder that may have grown since: they stay,
            with all that belongs to their scenes or groups, and everything else trains. Lists come before it.

    Raises:
        DatasetError: a wrong list, lists that overlap, or too few scenes, groups or tiles to cut.
        ConfigError: fractions or a group rule that make no sense.
    """
    usable = {tile.id: tile for tile in tiles}
    listed = _read_parts(dataset, spec, usable, base)
    if len(listed) < len(PARTS):
        taken = {tile_id for ids in listed.values() for tile_id in ids}
        rest = [usable[tile_id] for tile_id in sorted(usable) if tile_id not in taken]
        parts = [part for part in PARTS if part not in listed]
        listed |= (
            _keep(rest, spec, parts, held_out)
            if held_out and spec.by != "official"
            else _generate(dataset, rest, spec, parts)
        )
    splits = Splits(*(tuple(sorted(listed[part])) for part in PARTS))
    if not splits.train:
        raise DatasetError(f"the train split of data set {dataset.spec.name!r} is empty")
    return splits


def select_tiles(dataset: Dataset, splits: Splits, which: str, *, base: Path) -> tuple[str, ...]:
    """The tiles to evaluate: those of split `which`, or of the list file it names, that have masks; sorted.

    Raises:
        DatasetError: no such split or file, or nothing in it has a mask.
    """
    if which in PARTS:
        ids = getattr(splits, which)
        chosen = tuple(i for i in ids if dataset.tile(i).mask is not None)
        if not chosen:
            raise DatasetError(
                f"split {which!r} of data set {dataset.spec.name!r} has no tile with a mask ({len(ids)} without), so "
                f"there is nothing to compare with; name another split or a list file"
            )
        return chosen
    path = base / which
    if not path.is_file():
        raise DatasetError(
            f"no split or list file {which!r}: expected {', '.join(PARTS)} or a file{near(which, PARTS)}"
        )
    entries = read_list(dataset, path, what=f"split {which}")
    require_masks(entries, path=path, what=f"split {which}")
    if not (ids := tile_ids(entries)):
        raise DatasetError(f"split {which}: all tiles named in {path} were left out")
    return tuple(sorted(ids))


def summary(splits: Splits, spec: SplitSpec) -> str:
    """One line: the tiles of each part, and the groups or scenes they come from."""
    parts = []
    for part in PARTS:
        ids: tuple[str, ...] = getattr(splits, part)
        scenes = {tile_id.rsplit("/", 1)[0] for tile_id in ids}
        names = {_group_in(scene, spec.group) or scene for scene in scenes} if spec.by == "group" else scenes
        is_short = spec.by == "group" or len(names) <= 3
        of = few(sorted(names), 8) if is_short else f"{len(names):,} scenes"
        parts.append(f"{part} {len(ids):,}" + (f" ({of})" if ids else ""))
    return ", ".join(parts)


def _read_parts(dataset: Dataset, spec: SplitSpec, usable: dict[str, Tile], base: Path) -> dict[str, list[str]]:
    listed: dict[str, list[str]] = {}
    owner: dict[str, tuple[str, Entry]] = {}
    for part in PARTS:
        name: str | None = getattr(spec, part)
        if name is None:
            continue
        entries = read_list(dataset, base / name, what=f"the {part} list")
        if part != "train":
            require_masks(entries, path=base / name, what=f"the {part} list")
        for entry in entries:
            for tile in entry.tiles:
                other, its_entry = owner.setdefault(tile.id, (part, entry))
                if other != part:
                    raise DatasetError(
                        f"tile {tile.id} is in the {other} list (line {its_entry.line}) and in the {part} list (line "
                        f"{entry.line}); a tile belongs to one split"
                    )
        ids = tile_ids(entries)
        listed[part] = [tile_id for tile_id in ids if tile_id in usable]
        if missing := [tile_id for tile_id in ids if tile_id not in usable]:
            log.info("the %s list names %d tile(s) that were left out: %s", part, len(missing), few(missing))
    return listed


def _generate(dataset: Dataset, rest: list[Tile], spec: SplitSpec, parts: list[str]) -> dict[str, list[str]]:
    """`parts` of the tiles `rest` (sorted by id)."""
    if spec.by == "official":
        return _official(dataset, rest, spec, parts)
    masked = [tile for tile in rest if tile.mask is not None]
    cut: dict[str, list[str]] = {part: [] for part in parts}
    unlabelled = [tile for tile in rest if tile.mask is None]
    weights = _weights(spec, parts)
    if not masked or not weights:
        return cut | ({"train": [tile.id for tile in unlabelled]} if "train" in parts else {})
    units: dict[str, list[str]] = defaultdict(list)
    for tile in masked:
        units[_unit(tile, spec)].append(tile.id)
    if len(units) < len(weights):
        plural = {"tile": "tiles", "scene": "scenes", "group": "groups"}[spec.by]
        raise DatasetError(
            f"{len(units)} labelled {plural} cannot be cut into {', '.join(weights)}: every part needs one; add "
            f"{plural}, "
            + ("cut by tile (`by: tile`; neighbouring tiles make results optimistic), " if spec.by != "tile" else "")
            + "give lists, or set a part's fraction to 0"
        )
    names = Draws("split", spec.by, spec.seed).choose(sorted(units), len(units))
    assign = _cut_exact if spec.by == "tile" else _cut_balanced
    chosen = dict(zip(names, assign([len(units[n]) for n in names], weights), strict=True))
    for name, part in chosen.items():
        cut[part] += units[name]
    _add_unlabelled(cut, unlabelled, chosen, spec)
    return cut


def _add_unlabelled(
    cut: dict[str, list[str]], unlabelled: list[Tile], part_of: Mapping[str, str], spec: SplitSpec
) -> None:
    """Unlabelled tiles join the training pool, but for those whose scene or group is held out.

    In the pool they would show the student the very ground it is tested on.
    """
    if "train" in cut:
        cut["train"] += [t.id for t in unlabelled if part_of.get(_unit_if_any(t, spec), "train") == "train"]


def _keep(
    rest: list[Tile], spec: SplitSpec, parts: list[str], held_out: Mapping[str, Collection[str]]
) -> dict[str, list[str]]:
    """`parts` as they were drawn before; what is new trains, unless its scene or group is held out."""
    before = {tile_id: part for part, ids in held_out.items() for tile_id in ids}
    part_of = {_unit(tile, spec): before[tile.id] for tile in rest if tile.id in before}
    cut: dict[str, list[str]] = {part: [] for part in parts}
    for tile in rest:
        if tile.mask is not None and (part := part_of.get(_unit(tile, spec), "train")) in cut:
            cut[part].append(tile.id)
    _add_unlabelled(cut, [tile for tile in rest if tile.mask is None], part_of, spec)
    return cut


def _official(dataset: Dataset, rest: list[Tile], spec: SplitSpec, parts: list[str]) -> dict[str, list[str]]:
    by_part: dict[str, list[Tile]] = defaultdict(list)
    for tile in rest:
        by_part[dataset.scene(tile).part].append(tile)
    official = layout_of(dataset.spec.layout).official_splits(by_part, seed=spec.seed)
    if official is None:
        raise DatasetError(
            f"data set {dataset.spec.name!r} (layout {dataset.spec.layout}) has no official split (sub-folders train, "
            f"val, test below {dataset.spec.images!r}); set `by:` to scene, group or tile, or give lists"
        )
    return {part: ids for part, ids in zip(PARTS, official, strict=True) if part in parts}


def _weights(spec: SplitSpec, parts: list[str]) -> dict[str, float]:
    """The fractions of `parts` that get something, rescaled to add up to 1."""
    if any(f < 0 for f in spec.fractions) or abs(sum(spec.fractions) - 1) > 1e-6:
        raise ConfigError(f"fractions {list(spec.fractions)} of train, val, test must not be negative and add up to 1")
    chosen = {part: f for part, f in zip(PARTS, spec.fractions, strict=True) if part in parts and f > 0}
    total = sum(chosen.values())
    return {part: f / total for part, f in chosen.items()}


def _unit(tile: Tile, spec: SplitSpec) -> str:
    """What `tile` must stay together with."""
    if spec.by == "tile":
        return tile.id
    if spec.by == "scene":
        return tile.scene
    if not spec.group:
        raise ConfigError("splits by group need `group:`, a regular expression whose first group names a scene's group")
    name = _group_in(tile.scene, spec.group)
    if name is None:
        raise DatasetError(f"group {spec.group!r} does not match scene {tile.scene!r}, so it would be in no group")
    return name


def _unit_if_any(tile: Tile, spec: SplitSpec) -> str:
    """`_unit`, or nothing for an unlabelled tile that the group rule does not cover: it trains."""
    if spec.by == "group" and _group_in(tile.scene, spec.group) is None:
        return ""
    return _unit(tile, spec)


def _group_in(scene: str, rule: str | None) -> str | None:
    """The group that the regular expression `rule` finds in a scene's name; None where it does not match."""
    try:
        match = re.search(rule or "", scene)
    except re.error as error:
        raise ConfigError(f"group {rule!r} is no regular expression: {error}") from None
    return None if match is None else str((match[1] if match.re.groups else match[0]) or "")


def _cut_exact(sizes: Sequence[int], weights: dict[str, float]) -> list[str]:
    """RS-DWL's counts: int(fraction x n) for each part but the last, which gets the rest; none stays empty."""
    n, parts = len(sizes), list(weights)
    counts = [int(round(weights[part] * n, 6)) for part in parts[:-1]]
    counts.append(n - sum(counts))
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return [part for part, count in zip(parts, counts, strict=True) for _ in range(count)]


def _cut_balanced(sizes: Sequence[int], weights: dict[str, float]) -> list[str]:
    """Each unit, in shuffled order, to the part that lacks most tiles; the last ones fill parts still empty."""
    total = sum(sizes)
    lacks = {part: weight * total for part, weight in weights.items()}
    empty = list(weights)
    chosen: list[str] = []
    for position, size in enumerate(sizes):
        candidates = empty if len(sizes) - position <= len(empty) else list(weights)
        part = max(candidates, key=lambda p: lacks[p])
        lacks[part] -= size
        if part in empty:
            empty.remove(part)
        chosen.append(part)
    return chosen
