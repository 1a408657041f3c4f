"""The data set on disk: its tiles, and their pixels, valid masks and labels.

A `Dataset` is cheap to make and to pickle: it holds no open file, lists its root on first use, and a copy in a
worker brings the listing but not the decoded scenes. Scenes that fit are decoded whole and kept for their other
tiles; larger ones are read by window, so memory does not grow with the raster.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rsmtdf.data.cache import Decoded, SceneCache
from rsmtdf.data.layouts import layout_of
from rsmtdf.data.listing import Listing, list_dataset, require_readable
from rsmtdf.data.masks import MaskRule, read_labels
from rsmtdf.data.names import inside, near
from rsmtdf.data.raster import Header, read_pixels
from rsmtdf.data.scaling import to_bytes
from rsmtdf.data.scene import Scene
from rsmtdf.data.usable import Usable, usable_tiles
from rsmtdf.errors import DatasetError
from rsmtdf.specs import IGNORE_INDEX, DatasetSpec, Tile

__all__ = ["Dataset", "Usable", "usable_tiles"]

log = logging.getLogger(__name__)

_WHOLE_SHARE = 4  # a scene is kept whole only where at least this many fit into the cache


class Dataset:
    """Reads the tiles of one data set; implements `rsmtdf.specs.TileReader`. Safe for threads and for pickling."""

    def __init__(self, spec: DatasetSpec, root: Path, *, cache_bytes: int = 256 * 2**20) -> None:
        """Checks the spec and that the root is there; reads nothing yet.

        Args:
            spec: What the pixels and labels mean.
            root: The folder all paths are relative to.
            cache_bytes: For decoded scenes, per process.

        Raises:
            DatasetError: no such root, or a spec that contradicts itself.
        """
        if not root.is_dir():
            raise DatasetError(
                f"the data root {root} of data set {spec.name!r} "
                f"{'is not a folder' if root.exists() else 'does not exist'}; give the folder with --root"
            )
        _check_spec(spec)
        self._rule = MaskRule.of(spec, is_index=layout_of(spec.layout).mask_is_index())
        self.spec = spec
        self.root = root
        self._cache = SceneCache(budget_bytes=cache_bytes)
        self._listing: Listing | None = None
        self._is_checked = False

    @property
    def listing(self) -> Listing:
        """Scenes, headers and tiles as found on disk, made on first use; not checked to be readable as RGB bytes.

        Raises:
            DatasetError: the root is not of the spec's layout, or holds no image.
        """
        if self._listing is None:
            self._listing = list_dataset(self.spec, self.root)
        return self._listing

    @property
    def mask_rule(self) -> MaskRule:
        """How raw mask values become classes."""
        return self._rule

    @property
    def left_out(self) -> tuple[str, ...]:
        """Ids of the tiles that are below `min_valid` by geometry alone."""
        return self.listing.left_out

    @property
    def unreadable(self) -> dict[str, str]:
        """Images whose header cannot be read, and why: they have no tiles."""
        return dict(self.listing.unreadable)

    def tiles(self) -> tuple[Tile, ...]:
        """Every tile of every scene, sorted by id, without those in `left_out`.

        Raises:
            DatasetError: nothing there, names that clash, fewer than three bands, or 16-bit and float images without
                `scaling` (the message has the line to paste).
        """
        self._check()
        return tuple(self.listing.tiles.values())

    def tile(self, tile_id: str) -> Tile:
        """The tile with this id.

        Raises:
            DatasetError: there is none; the message names near ones.
        """
        found = self.listing.tiles.get(tile_id)
        if found is None:
            known = self.listing.tiles
            why = "was left out: too small a part of it lies inside its scene" if tile_id in self.left_out else ""
            raise DatasetError(
                f"data set {self.spec.name!r} in {self.root}: tile {tile_id!r} "
                f"{why or 'does not exist'}{'' if why else near(tile_id, known)}"
            )
        return found

    def scene(self, tile: Tile) -> Scene:
        """The scene a tile was cut from, as its layout listed it (domain, official part)."""
        return self.listing.scenes[tile.image]

    def header(self, tile: Tile) -> Header:
        """The header of the file a tile is read from."""
        return self.listing.headers[tile.image]

    def resolve_name(self, name: str, *, hint: bool = True) -> list[Tile]:
        """The tiles that a list entry names: a tile id, a scene, an image or mask path, or a name of public lists.

        Empty where the name is known but all its tiles were left out (or the image cannot be opened). `hint`: the
        error names near names, which takes a second among many.

        Raises:
            DatasetError: the name is not known, or leaves the root.
        """
        listing = self.listing
        clean = inside(self.root, name, what="list entry")
        if clean not in listing.names:
            raise DatasetError(
                f"{name!r} is no tile, scene or image of data set {self.spec.name!r} in {self.root}"
                f"{near(clean, listing.names) if hint else ''}"
            )
        return [listing.tiles[tile_id] for tile_id in listing.names[clean]]

    def read_image(self, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 [tile_px, tile_px, 3] and valid bool [tile_px, tile_px]; what is not valid is black.

        Raises:
            DatasetError: the file is missing, truncated, changed or not readable as RGB bytes; names it and why.
        """
        header = self._header_of(tile)
        cost = header.width * header.height * 4
        if self._is_kept_whole(cost):
            whole = self._cache.get(f"image:{tile.image}", lambda: self._decode(tile.image, header, None))
            part = _crop(whole, tile)
        else:
            part = self._decode(tile.image, header, (tile.x0, tile.y0, tile.width, tile.height))
        size = self.spec.tile_px
        pixels = np.zeros((size, size, 3), dtype=np.uint8)
        mask = np.zeros((size, size), dtype=np.bool_)
        pixels[: tile.height, : tile.width] = part.data
        mask[: tile.height, : tile.width] = True if part.valid is None else part.valid
        return pixels, mask

    def read_label(self, tile: Tile) -> np.ndarray:
        """Class index uint8 [tile_px, tile_px]; 255 where ignored, unlabelled or outside the scene.

        The image's valid mask plays no part here: a label on nodata is the caller's to drop.

        Raises:
            DatasetError: the mask is unreadable, of another size than its image, or holds a value outside the
                classes.
        """
        labels = np.full((self.spec.tile_px, self.spec.tile_px), IGNORE_INDEX, dtype=np.uint8)
        if tile.mask is None:
            return labels
        header = self._header_of(tile)
        if self._is_kept_whole(header.width * header.height):
            whole = self._cache.get(f"mask:{tile.mask}", lambda: self._decode_mask(tile, header, None))
            part = _crop(whole, tile)
        else:
            part = self._decode_mask(tile, header, (tile.x0, tile.y0, tile.width, tile.height))
        labels[: tile.height, : tile.width] = part.data
        return labels

    def with_empty_cache(self) -> Dataset:
        """A twin that shares the listing and has decoded nothing yet."""
        twin = copy.copy(self)
        twin._cache = SceneCache(budget_bytes=self._cache.budget_bytes)
        return twin

    def expected_decodes(self, tiles: Iterable[Tile], *, reads: int) -> float:
        """How many of `reads` reads, in random order and evenly over `tiles`, will decode a scene anew.

        Scenes that are read by window are decoded at each read.
        """
        images = {tile.image: self._header_of(tile) for tile in tiles}
        costs = {image: header.width * header.height * 4 for image, header in images.items()}
        kept = [cost for cost in costs.values() if self._is_kept_whole(cost)]
        windowed = reads * (1 - len(kept) / len(costs)) if costs else 0.0
        # Where not all fit, a scene is still there from its last turn with the probability that it fits.
        missing = 1 - min(self._cache.budget_bytes / max(sum(kept), 1), 1.0)
        return windowed + max(min(len(kept), reads - windowed), (reads - windowed) * missing)

    def _check(self) -> None:
        if not self._is_checked:
            require_readable(self.listing, self.spec, self.root)
            self._is_checked = True

    def _header_of(self, tile: Tile) -> Header:
        header = self.listing.headers.get(tile.image)
        if header is None:
            reason = self.listing.unreadable.get(tile.image, f"{self.root / tile.image} is not in the data set")
            raise DatasetError(f"tile {tile.id}: {reason}")
        return header

    def _is_kept_whole(self, cost_bytes: int) -> bool:
        return cost_bytes * _WHOLE_SHARE <= self._cache.budget_bytes

    def _decode(self, image: str, header: Header, window: tuple[int, int, int, int] | None) -> Decoded:
        spec = self.spec
        if spec.scaling is None and header.dtype != "uint8":
            self._check()  # raises, with the line to paste
        pixels = read_pixels(self.root / image, header, bands=spec.bands, nodata=spec.nodata, window=window)
        return Decoded(to_bytes(pixels, spec.scaling), pixels.valid)

    def _decode_mask(self, tile: Tile, header: Header, window: tuple[int, int, int, int] | None) -> Decoded:
        path = self.root / str(tile.mask)
        size = (header.width, header.height)
        labels = read_labels(path, self._rule, spec=self.spec, size=size, image=tile.image, window=window)
        return Decoded(labels)


def _crop(whole: Decoded, tile: Tile) -> Decoded:
    area = slice(tile.y0, tile.y0 + tile.height), slice(tile.x0, tile.x0 + tile.width)
    return Decoded(whole.data[area], None if whole.valid is None else whole.valid[area])


def _check_spec(spec: DatasetSpec) -> None:
    """Raises DatasetError for a spec that contradicts itself, naming the field."""
    problems: list[str] = []
    if not 1 <= len(spec.classes) <= IGNORE_INDEX:
        problems.append(f"classes: {len(spec.classes)} given, expected 1 to {IGNORE_INDEX}")
    if len(set(spec.classes)) != len(spec.classes):
        problems.append("classes: a name appears twice")
    if len(spec.palette) != len(spec.classes):
        problems.append(f"palette: {len(spec.palette)} colours for {len(spec.classes)} classes")
    if strange := sorted(set(spec.excluded) - set(spec.classes)):
        problems.append(f"excluded: {', '.join(strange)} is no class{near(strange[0], spec.classes)}")
    if spec.scaling is not None and (len(spec.scaling) != 3 or any(high <= low for low, high in spec.scaling)):
        problems.append("scaling: expected three pairs [low, high] with low < high")
    if spec.tile_px < 1:
        problems.append(f"tile_px: {spec.tile_px} is not positive")
    if not 0 <= spec.min_valid <= 1:
        problems.append(f"min_valid: {spec.min_valid} is not between 0 and 1")
    if problems:
        raise DatasetError(f"data set {spec.name!r}: " + "; ".join(problems))
