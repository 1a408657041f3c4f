"""Which tiles are worth making views of: those that open and have enough valid pixels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from rsmtdf.data.names import few
from rsmtdf.errors import DatasetError
from rsmtdf.specs import Tile

if TYPE_CHECKING:
    from rsmtdf.data.dataset import Dataset

A = TypeVar("A")
B = TypeVar("B")
Progress = Callable[[int, int], None]
"""Called with (done, total), from the calling thread."""


@dataclass(frozen=True, slots=True)
class Usable:
    """What became of the tiles asked for."""

    kept: tuple[Tile, ...]
    """In the order given."""
    left_out: tuple[str, ...]
    """Ids of tiles with fewer valid pixels than `min_valid`, those left out by geometry alone included, sorted."""
    unreadable: dict[str, str]
    """Image path -> why it cannot be read; images whose header is unreadable included."""


def usable_tiles(
    dataset: Dataset, tiles: Iterable[Tile], *, workers: int = 0, progress: Progress | None = None
) -> Usable:
    """Sorts out tiles without enough valid pixels.

    Pixels are read only of files that have nodata, alpha, a mask or floating point values: elsewhere everything in
    the scene is valid, and a broken file shows when it is first read.

    Args:
        dataset: Where the tiles are from.
        tiles: The tiles to look at.
        workers: Threads; 0 reads in this one.
        progress: Called after each file.

    Raises:
        DatasetError: there are tiles, but none is kept.
    """
    asked = list(tiles)
    by_image: dict[str, list[Tile]] = defaultdict(list)
    for tile in asked:
        if dataset.header(tile).has_validity(dataset.spec.nodata):
            by_image[tile.image].append(tile)

    poor: set[str] = set()
    unreadable = dict(dataset.unreadable)

    def look(group: list[Tile]) -> tuple[list[str], str]:
        limit = dataset.spec.min_valid * dataset.spec.tile_px**2
        try:
            return [t.id for t in group if dataset.read_image(t)[1].sum() < limit], ""
        except DatasetError as error:
            return [], str(error)

    for group, (ids, reason) in zip(
        by_image.values(), each(look, list(by_image.values()), workers, progress), strict=True
    ):
        poor.update(ids)
        if reason:
            unreadable[group[0].image] = reason

    kept = tuple(t for t in asked if t.id not in poor and t.image not in unreadable)
    left_out = tuple(sorted(poor | set(dataset.left_out)))
    if asked and not kept:
        if unreadable:
            why = few(f"{image}: {reason}" for image, reason in unreadable.items())
        else:
            own = sorted({n for t in asked for n in dataset.header(t).nodata if n is not None})
            value = few(map(str, own)) if dataset.spec.nodata is None else str(dataset.spec.nodata)
            why = f"nodata is {value or 'not set'}; `nodata:` overrides the files' own, `min_valid:` lowers the share"
        raise DatasetError(
            f"none of the {len(asked)} tile(s) in {dataset.root} has {dataset.spec.min_valid:.0%} valid pixels and "
            f"can be read ({why})"
        )
    return Usable(kept, left_out, unreadable)


def each(work: Callable[[A], B], items: list[A], workers: int, progress: Progress | None) -> list[B]:
    """`work` of every item, in order, in `workers` threads (rasterio releases the lock while it decodes)."""
    results: list[B] = []
    if workers < 1:
        for item in items:
            results.append(work(item))
            if progress is not None:
                progress(len(results), len(items))
        return results
    with ThreadPoolExecutor(workers) as pool:
        for result in pool.map(work, items):
            results.append(result)
            if progress is not None:
                progress(len(results), len(items))
    return results
