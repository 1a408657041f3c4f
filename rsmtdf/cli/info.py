"""Behind `rsmtdf cache info`: what a store holds, as a table, and as a picture of its features."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rsmtdf.cli.workspace import data_root, source_from_record
from rsmtdf.data.dataset import Dataset
from rsmtdf.errors import ConfigError, DatasetError, StoreIncomplete
from rsmtdf.files import write_whole
from rsmtdf.keyed import Draws
from rsmtdf.objects import StorePath
from rsmtdf.stages.cache import view_maker
from rsmtdf.store.portrait import Panel, contact_sheet, pca_rgb
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.status import crc_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.views.view import view_crc

SEEDS_SHOWN = 30
"""Lines of the table of seeds."""


def store_info(path: StorePath) -> tuple[dict[str, Any], str]:
    """What a store holds, as data and as text."""
    info = FeatureStore.open(path).info()
    state = "complete" if info["complete"] else "INCOMPLETE: run rsmtdf cache-features again"
    skipped = f"; {info['views_skipped']:,} skipped (unreadable)" if info["views_skipped"] else ""
    more = skipped + (f"; {info['views_removed']:,} removed" if info["views_removed"] else "")
    kept = "sealed" if info["sealed"] else "not sealed"
    lines = [
        f"store      {info['path']} ({_size(info['bytes'])}), {state}",
        f"identity   {info['identity'][:16]}  data set {info['dataset']}, images at {info['data_root']}",
        f"made by    {', '.join(f'{name} {version}' for name, version in info['versions'].items())}",
        f"views      {info['views']:,} of {info['tiles']:,} tiles in {info['shards']:,} shards{more}; {kept}",
    ]
    lines += ["", *_seed_table(info), "", *_teacher_table(info)]
    for name, teacher in info["teachers"].items():
        lines += _statistics_lines(name, teacher)
    if (pixels := info["pixels"]) is not None:
        lines += ["", _pixels_line(pixels, info["views"])]
    if not info["complete"]:
        lines += ["", f"next       {_finish(info)}"]
    return info, "\n".join(lines)


def _pixels_line(pixels: Mapping[str, Any], views: int) -> str:
    size = "" if pixels["bytes"] is None else f" ({_size(pixels['bytes'])})"
    more = "" if pixels["complete"] else "; rsmtdf cache-features --store-pixels stores the rest"
    return f"pixels     of {pixels['done']:,} of {views:,} views are stored{size}{more}"


def draw_features(path: StorePath, png: Path, *, views: int, root: Path | None) -> str:
    """Writes a picture of some views and their features to `png`; what is to be said about it.

    Args:
        path: the store.
        png: the file; it is replaced.
        views: how many, drawn by key from those that are done for every teacher.
        root: where the images are; None: where the store was made from, or its configuration says.

    Raises:
        StoreIncomplete: no view is done for every teacher.
        ConfigError: `png` cannot be written.
    """
    store = FeatureStore.open(path)
    done = np.flatnonzero(store.usable(list(store.teachers)))
    if not store.teachers or not len(done):
        raise StoreIncomplete(f"feature store {path} has no view that is done for every teacher, so none can be drawn")
    rows = np.sort(done[Draws("portrait", store.identity).permutation(len(done))[:views]])
    pixels, note = _pixels(store, rows, root)
    panels = [] if pixels is None else [Panel(title="view", subtitle="as the teachers saw it", images=pixels)]
    for name, teacher in store.teachers.items():
        with FeatureReader(store, name) as reader:
            stored = {key: torch.from_numpy(values) for key, values in reader.get_many(rows).items()}
        grid = teacher.spec.grid
        features = teacher.decode(stored, device=torch.device("cpu")).numpy().reshape(len(rows), *grid, -1)
        panels.append(
            Panel(
                title=name,
                subtitle=f"{grid[0]} x {grid[1]} tokens of {teacher.spec.dim}, {teacher.codec}",
                images=pca_rgb(features),
            )
        )
    sheet = contact_sheet(
        panels,
        captions=[f"view {store.describe(row)}" for row in rows.tolist()],
        title=f"{path.name}: {store.dataset.name}, {store.n_views:,} views",
        note="Colours: principal components 1-3 of each teacher's tokens over the views shown, 1-99 %.",
    )
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    try:
        write_whole(png, buffer.getvalue())
    except OSError as error:
        raise ConfigError(f"cannot write {png}: {error.strerror}") from error
    return f"picture    {png}: {len(rows)} views{note}"


def _pixels(store: FeatureStore, rows: np.ndarray, root: Path | None) -> tuple[np.ndarray | None, str]:
    """uint8 [views, crop, crop, 3], or None with the reason."""
    try:
        if "config" not in store.experiment:
            raise DatasetError("the store's record names no data set")
        source = source_from_record(store.experiment, overrides=(), where=str(store.path))
        where = data_root(source, root=root, recorded=store.data_root)
        dataset = Dataset(store.dataset, where)
        maker = view_maker(store, reader=dataset, tiles={t.id: t for t in dataset.tiles()})
        views = maker.mixed(rows.tolist())
    except DatasetError as error:
        return None, f"; features alone, because the images are not at hand: {error}"
    sums = crc_of(store.view_status()[rows]).tolist()
    changed = sum(view_crc(view) != crc for view, crc in zip(views, sums, strict=True))
    note = f"; {changed} of them have other pixels now than when they were cached" if changed else ""
    return np.stack([v.pixels for v in views]), note


def _seed_table(info: Mapping[str, Any]) -> list[str]:
    """Stream, seeds, views, and how far each teacher is."""
    names = list(info["teachers"])
    rows = [["stream", "seeds", "views", *names]]
    for run in info["seeds"][:SEEDS_SHOWN]:
        seeds = str(run["first"]) if run["first"] == run["last"] else f"{run['first']}-{run['last']}"
        rows.append([run["stream"], seeds, f"{run['views']:,}", *(_progress(run["teachers"][n]) for n in names)])
    if (more := len(info["seeds"]) - SEEDS_SHOWN) > 0:
        rows.append(["...", f"{more:,} more lines with --json", "", *("" for _ in names)])
    if names:
        rows.append(["on disk", "", "", *(_streams(info["teachers"][n]["bytes_by_stream"]) for n in names)])
    return _table(rows, right={2})


def _progress(progress: Mapping[str, int]) -> str:
    done, skipped, total = progress["done"], progress["skipped"], progress["total"]
    if not done and not skipped:
        return "none yet"
    tail = f", {skipped:,} skipped" if skipped else ""
    return f"complete{tail}" if done + skipped == total else f"{done:,} of {total:,}{tail}"


def _streams(sizes: Mapping[str, int]) -> str:
    return " + ".join(f"{_size(n)} {stream}" for stream, n in sizes.items()) or "nothing"


def _teacher_table(info: Mapping[str, Any]) -> list[str]:
    rows = [["teacher", "views", "tokens", "codec", "per view", "on disk", "usual error", "identity"]]
    for name, t in info["teachers"].items():
        spec = t["spec"]
        error = "?" if t["typical_error"] is None else f"{t['typical_error']:.2%}"
        rows.append(
            [
                name,
                f"{t['done']:,} of {info['views']:,} views",
                f"{spec['grid'][0]}x{spec['grid'][1]} of {spec['dim']}",
                t["codec"],
                f"{t['bytes_per_view'] / 1e6:.2f} MB",
                _size(t["bytes"]),
                error,
                t["identity"][:12],
            ]
        )
    return _table(rows) if len(rows) > 1 else ["no teacher yet"]


def _statistics_lines(name: str, teacher: Mapping[str, Any]) -> list[str]:
    """What the channel statistics showed, and what happened to the values."""
    statistics = teacher["statistics"]
    facts = []
    if "views" in statistics:
        facts.append(f"statistics of {statistics['views']:,} views")
    if massive := statistics.get("outlier_channels"):
        shown = ", ".join(map(str, massive[:5])) + (", ..." if len(massive) > 5 else "")
        facts.append(f"{len(massive)} massive channels ({shown})")
    if tokens := statistics.get("outlier_tokens"):
        facts.append(f"{tokens:,} outlier tokens")
    if constant := statistics.get("constant_channels"):
        facts.append(f"{len(constant)} constant channels")
    if came := statistics.get("recoded_from"):
        facts.append(f"recoded from {', then '.join(came)}")
    return [f"  {name}: {'; '.join(facts)}"] if facts else []


def _finish(info: Mapping[str, Any]) -> str:
    if not info["views"]:
        return f"rsmtdf cache-features, with --out {info['path']}"
    lacking = {n: info["views"] - t["done"] - t["skipped"] for n, t in info["teachers"].items() if not t["complete"]}
    what = ", ".join(f"{n:,} views of {name}" for name, n in lacking.items()) or "its teachers"
    return (
        f"rsmtdf cache-features, with the configuration (and options) it was made with and --out {info['path']}: "
        f"it computes {what}, and nothing else"
    )


def _table(rows: Sequence[Sequence[str]], *, right: set[int] | None = None) -> list[str]:
    """Rows of equally many cells as lines, columns aligned."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(w) if k in (right or ()) else cell.ljust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"
