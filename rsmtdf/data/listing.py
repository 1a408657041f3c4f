"""What is in a data set, from file names and headers alone: scenes, sizes, tiles, and the names they go by."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rsmtdf.data.layouts import layout_of
from rsmtdf.data.names import few
from rsmtdf.data.raster import Header, choose_bands, is_guess, read_header
from rsmtdf.data.scaling import suggest_scaling, yaml_line
from rsmtdf.data.scene import Scan, Scene
from rsmtdf.errors import DatasetError
from rsmtdf.specs import DatasetSpec, Tile

log = logging.getLogger(__name__)

_THREADS = 8  # header reads wait for the disk (or the network), not for a core


@dataclass(frozen=True, slots=True)
class Listing:
    """A data set's files and tiles. Keyed by image path unless said otherwise."""

    scan: Scan
    scenes: Mapping[str, Scene]
    headers: Mapping[str, Header]
    unreadable: Mapping[str, str]
    """Images whose header cannot be read, or that lack the bands that most have, and why: they have no tiles."""
    tiles: Mapping[str, Tile]
    """By id, in sorted order."""
    left_out: tuple[str, ...]
    """Ids of tiles below `min_valid` by geometry alone, sorted."""
    names: Mapping[str, tuple[str, ...]]
    """Tile ids by every name a list may use; empty where all tiles of a name are left out."""


def list_dataset(spec: DatasetSpec, root: Path) -> Listing:
    """Lists `root`. Every image's header is read, no pixel is.

    Raises:
        DatasetError: the tree is not of the spec's layout, or holds no image.
    """
    scan = layout_of(spec.layout).scan(spec, root)
    scenes = {scene.image: scene for scene in scan.scenes}
    headers, unreadable = _headers(root, list(scenes))
    strange = _without_bands(headers, spec)
    unreadable |= strange
    headers = {image: header for image, header in headers.items() if image not in strange}
    tiles: dict[str, Tile] = {}
    left_out: list[str] = []
    parts: dict[str, list[Tile]] = {image: [] for image in scenes}
    for image, header in headers.items():
        for tile in tiles_of(scenes[image], header, spec.tile_px):
            if tile.width * tile.height < spec.min_valid * spec.tile_px**2:
                left_out.append(tile.id)
            else:
                tiles[tile.id] = tile
                parts[image].append(tile)
    if unreadable:
        log.warning("%d image(s) cannot be used and are left out: %s", len(unreadable), few(unreadable))
    return Listing(
        scan=scan,
        scenes=scenes,
        headers=headers,
        unreadable=unreadable,
        tiles=dict(sorted(tiles.items())),
        left_out=tuple(sorted(left_out)),
        names=_names(spec, scenes, headers, parts),
    )


def tiles_of(scene: Scene, header: Header, tile_px: int) -> list[Tile]:
    """The windows that cover a scene from its upper left corner, row by row, each pixel once.

    Raises:
        DatasetError: an already cropped tile that is larger than `tile_px`.
    """
    if scene.cell is not None:
        if header.width > tile_px or header.height > tile_px:
            raise DatasetError(
                f"{scene.image} is a crop of {header.size}, but tile_px is {tile_px}; a cropped tree is read as it "
                f"is, so set `tile_px: {max(header.width, header.height)}`"
            )
        row, column = scene.cell
        return [Tile(f"{scene.id}/{row}_{column}", scene.image, scene.mask, 0, 0, header.width, header.height)]
    return [
        Tile(
            id=f"{scene.id}/{row}_{column}",
            image=scene.image,
            mask=scene.mask,
            x0=x0,
            y0=y0,
            width=min(tile_px, header.width - x0),
            height=min(tile_px, header.height - y0),
        )
        for row, y0 in enumerate(range(0, header.height, tile_px))
        for column, x0 in enumerate(range(0, header.width, tile_px))
    ]


def require_readable(listing: Listing, spec: DatasetSpec, root: Path) -> None:
    """Stops before the first pixel where the data set cannot give RGB bytes, with what to set.

    Raises:
        DatasetError: ambiguous names, too few bands, other than 8 bit without `scaling`, or no tile at all.
    """
    if listing.scan.problems:
        more = len(listing.scan.problems) - 1
        raise DatasetError(listing.scan.problems[0] + (f" ({more} more: rsmtdf data check)" if more else ""))
    if not listing.headers:
        image, reason = next(iter(listing.unreadable.items()))
        raise DatasetError(f"none of the {len(listing.unreadable)} image(s) in {root} can be opened: {image}: {reason}")
    guessed = [image for image, header in listing.headers.items() if is_guess(header, spec.bands)]
    for image, header in listing.headers.items():
        choose_bands(header, spec.bands, where=f"image {image}")
    if guessed:
        log.info(
            "%d image(s) do not name their bands (%s): taking bands 1, 2, 3 as red, green, blue; `bands:` sets others",
            len(guessed),
            few(guessed, 2),
        )
    if spec.scaling is None:
        require_bytes(listing.headers, spec, root)
    if not listing.tiles:
        raise DatasetError(
            f"all {len(listing.left_out)} tile(s) in {root} are smaller than {spec.min_valid:.0%} of "
            f"{spec.tile_px} x {spec.tile_px} px: set a smaller `tile_px:` (or `min_valid:`)"
        )


def require_bytes(headers: Mapping[str, Header], spec: DatasetSpec, root: Path) -> None:
    """Stops at images that are not 8 bit, measuring the scaling that would make them so.

    Raises:
        DatasetError: with the line to paste.
    """
    deep = [image for image, header in headers.items() if header.dtype != "uint8"]
    if not deep:
        return
    # Over all images, the 8-bit ones too where types are mixed: one scaling is applied to all.
    scaling = suggest_scaling(
        [(root / image, header) for image, header in headers.items()], bands=spec.bands, nodata=spec.nodata
    )
    raise DatasetError(
        f"{len(deep)} of {len(headers)} image(s) are {headers[deep[0]].dtype} ({few(deep, 2)}), and no scaling to "
        f"8 bit is set; add this line (2-98 % of the valid pixels) to the data set's section of the YAML file:\n"
        f"{yaml_line(scaling)}"
    )


def _without_bands(headers: Mapping[str, Header], spec: DatasetSpec) -> dict[str, str]:
    """Image -> why it gives no R, G, B, where fewer than half of the images do not: a stray grey scan among aerial
    images. Where more do not, it is the description that is wrong, and `require_readable` stops.
    """
    strange = {}
    for image, header in headers.items():
        try:
            choose_bands(header, spec.bands, where=f"image {image}")
        except DatasetError as error:
            strange[image] = str(error)
    return strange if 2 * len(strange) < len(headers) else {}


def _headers(root: Path, images: list[str]) -> tuple[dict[str, Header], dict[str, str]]:
    def read(image: str) -> Header | str:
        try:
            return read_header(root / image)
        except (DatasetError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(min(_THREADS, max(1, len(images) // 16))) as pool:
        results = dict(zip(images, pool.map(read, images), strict=True))
    headers = {image: result for image, result in results.items() if isinstance(result, Header)}
    return headers, {image: result for image, result in results.items() if isinstance(result, str)}


def _names(
    spec: DatasetSpec, scenes: Mapping[str, Scene], headers: Mapping[str, Header], parts: Mapping[str, list[Tile]]
) -> dict[str, tuple[str, ...]]:
    layout = layout_of(spec.layout)
    own: dict[str, list[str]] = {}
    for image, scene in scenes.items():
        ids = [tile.id for tile in parts[image]]
        for tile_id in ids:
            own[tile_id] = [tile_id]
        for name in {scene.id, scene.image, scene.mask or scene.image}:
            own.setdefault(name, []).extend(ids)
    names: dict[str, list[str]] = {}
    for image, scene in scenes.items():
        for alias, quarter in layout.aliases(spec, scene):
            ids = [tile.id for tile in parts[image]]
            if quarter and scene.cell is None and image in headers:
                ids = [tile.id for tile in parts[image] if _in_quarter(tile, headers[image], int(quarter))]
            known = names.setdefault(posixpath.normpath(alias), [])
            known.extend(tile_id for tile_id in ids if tile_id not in known)
    return {name: tuple(ids) for name, ids in (names | own).items()}


def _in_quarter(tile: Tile, header: Header, quarter: int) -> bool:
    row, column = divmod(quarter - 1, 2)
    width, height = header.width // 2, header.height // 2
    x0, y0 = column * width, row * height
    inside_x = x0 <= tile.x0 and tile.x0 + tile.width <= x0 + width
    return inside_x and y0 <= tile.y0 and tile.y0 + tile.height <= y0 + height
