"""Behind `rsmtdf evaluate` and `rsmtdf predict`: a run's student, put to use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsmtdf.cli.runs import begun
from rsmtdf.cli.terminal import Bar, choose_device
from rsmtdf.cli.workspace import data_root
from rsmtdf.signals import StopFlag
from rsmtdf.stages import evaluate as evaluation
from rsmtdf.stages import predict as prediction


def score_run(run: Path, *, split: str, root: Path | None, device: str, stop: StopFlag) -> dict[str, Any]:
    """The scores of a run's best student on a split of its own data set."""
    record = begun(run)
    where = data_root(record.source, root=root, recorded=record.root)
    with Bar("evaluating", unit="tile") as bar:
        return evaluation.evaluate_run(
            run, root=where, device=choose_device(device), split=split, progress=bar.update_to, stop=stop
        )


def map_image(
    run: Path, src: Path, dst: Path, *, overwrite: bool, device: str, batch: int, stop: StopFlag
) -> dict[str, Any]:
    """Draws the map of `src`."""
    with Bar("predicting", unit="window") as bar:
        return prediction.predict(
            run,
            src,
            dst,
            device=choose_device(device),
            batch=batch,
            overwrite=overwrite,
            progress=bar.update_to,
            stop=stop,
        )


def scores_text(result: Mapping[str, Any]) -> str:
    """A table per class, then the means."""
    lines = [f"{'class':<20} {'IoU':>6} {'F1':>6} {'precision':>9} {'recall':>6}"]
    for name, row in result["per_class"].items():
        cells = [_percent(row[key]) for key in ("iou", "f1", "precision", "recall")]
        note = "" if row.get("counted", True) else "   (not in the mean)"
        lines.append(f"{name:<20} {cells[0]:>6} {cells[1]:>6} {cells[2]:>9} {cells[3]:>6}{note}")
    lines.append(
        f"mIoU {_percent(result['miou'])}   mF1 {_percent(result['mf1'])}   OA {_percent(result['oa'])}   "
        f"kappa {_percent(result['kappa'])}   on {result['tiles']:,} tiles of {result['split']}"
    )
    return "\n".join(lines)


def map_text(result: Mapping[str, Any]) -> str:
    """What was drawn, where, how fast, and the share of each class."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["classes"].items() if share)
    lines = [
        f"map        {result['map']} ({result['width']:,} x {result['height']:,} px, {result['mpx_per_s']:.2f} Mpx/s)",
        f"classes    {shares or 'none: no valid pixel'}",
    ]
    if result["overlay"]:
        lines.append(f"overlay    {result['overlay']}")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.2f}"
