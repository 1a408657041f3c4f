"""Which training tiles count as labelled: all that have masks, a share, a number, or a list.

A tile becomes labelled in an order that its own key decides, so less is always a part of more: 1 % lies in 5 % lies
in 10 %.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rsmtdf.data.lists import read_list, require_masks, tile_ids
from rsmtdf.data.names import few
from rsmtdf.errors import ConfigError, DatasetError
from rsmtdf.keyed import key_words

if TYPE_CHECKING:
    from rsmtdf.data.dataset import Dataset


def labelled_tiles(
    dataset: Dataset,
    train_ids: Collection[str],
    labels: str,
    *,
    seed: int,
    base: Path,
    left_out: Collection[str] = (),
) -> tuple[str, ...]:
    """The training tiles whose labels are used, sorted.

    A share is RS-DWL's rule: the first int(share x n) of the shuffled train tiles that have masks, per domain where
    the layout has domains; so 1 % lies in 5 % lies in 10 %. A count is a prefix of the same order, domains
    interleaved in proportion.

    Args:
        dataset: Knows masks and domains.
        train_ids: The train split.
        labels: `all`, a share (`5%`), a number of tiles (`20`), or a list file.
        seed: Of the shuffle.
        base: The folder that a relative list path starts from.
        left_out: Tiles that a list may name without being in the train split (`Usable.left_out`).

    Raises:
        DatasetError: nothing is labelled, fewer masks than asked for, or a list naming tiles outside the train split.
        ConfigError: an option that is none of the four.
    """
    masked = sorted(tile_id for tile_id in train_ids if dataset.tile(tile_id).mask is not None)
    text = labels.strip()
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    is_amount = text == "all" or share is not None or text.isdecimal()
    if not masked and is_amount:
        raise DatasetError(
            f"none of the {len(train_ids)} training tiles has a mask: expected masks in {dataset.spec.masks!r} below "
            f"{dataset.root}, named like their images (`masks:`, `mask_name:`)"
        )
    if text == "all":
        return tuple(masked)
    if share is not None:
        part = Fraction(share[1]) / 100
        if not 0 < part <= 1:
            raise ConfigError(f"labels: {labels!r} is not between 0 % and 100 %")
        chosen = [i for order in _label_order(dataset, masked, seed).values() for i in order[: int(part * len(order))]]
        if not chosen:
            raise DatasetError(
                f"labels: {labels} of {len(masked)} training tiles with masks is less than one tile; ask for a number "
                f"of tiles, such as --labels {min(20, len(masked))}"
            )
        return tuple(sorted(chosen))
    if text.isdecimal():
        count = int(text)
        if not 0 < count <= len(masked):
            raise DatasetError(
                f"labels: {count} labelled tiles asked for, but {len(masked)} training tiles have masks; ask for 1 to "
                f"{len(masked)}"
            )
        return tuple(sorted(_interleave(_label_order(dataset, masked, seed))[:count]))
    return _labels_from_list(dataset, set(train_ids), labels, base=base, left_out=set(left_out))


def _label_order(dataset: Dataset, masked: list[str], seed: int) -> dict[str, list[str]]:
    """Per domain, its tiles in the order in which they become labelled."""
    domains: dict[str, list[str]] = defaultdict(list)
    for tile_id in masked:
        domains[dataset.scene(dataset.tile(tile_id)).domain].append(tile_id)
    # By a key of each tile's own, so that one more mask moves no other tile.
    return {d: sorted(ids, key=partial(key_words, "labels", d, seed)) for d, ids in sorted(domains.items())}


def _interleave(orders: dict[str, list[str]]) -> list[str]:
    """One order in which every prefix holds the domains nearly in proportion."""
    ranked = [
        ((i + 0.5) / len(ids), domain, tile_id) for domain, ids in orders.items() for i, tile_id in enumerate(ids)
    ]
    return [tile_id for _, _, tile_id in sorted(ranked)]


def _labels_from_list(
    dataset: Dataset, train: set[str], labels: str, *, base: Path, left_out: set[str]
) -> tuple[str, ...]:
    path = base / labels
    if not path.is_file():
        raise DatasetError(
            f"labels {labels!r}: expected `all`, a share such as 5%, a number of tiles such as 20, or a list file; "
            f"there is no file {path}"
        )
    entries = read_list(dataset, path, what="the label list")
    require_masks(entries, path=path, what="the label list")
    outside = [(e, [t.id for t in e.tiles if t.id not in train and t.id not in left_out]) for e in entries]
    if stray := sum(len(ids) for _, ids in outside):
        lines = [f"line {e.line} ({ids[0] if len(ids) == 1 else e.name})" for e, ids in outside if ids]
        raise DatasetError(
            f"the label list {path} names {stray} tile(s) that are not in the train split: {few(lines)}; label "
            f"others (rsmtdf plan shows the splits), or change `splits:` so that these train"
        )
    chosen = tuple(sorted(tile_id for tile_id in tile_ids(entries) if tile_id in train))
    if not chosen:
        raise DatasetError(f"all tiles named in the label list {path} were left out")
    return chosen
