"""Trains several methods from one store, with several seeds each, and writes the table of their test scores.

    python pipelines/compare_methods.py --cache feats.zarr --out out/compare --seeds 0 1 2

One cache serves every run. A cell is mean ± standard deviation (n-1) over the seeds, of the EMA student that was best
on val, scored on test; the table says how each number was obtained. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rsmtdf.cli.main import handled
from rsmtdf.cli.terminal import say
from rsmtdf.cli.training import TrainOptions, train_run
from rsmtdf.cli.using import score_run
from rsmtdf.errors import ConfigError
from rsmtdf.files import write_whole
from rsmtdf.learning.methods import METHODS
from rsmtdf.learning.run import RunFolder
from rsmtdf.signals import StopFlag, stop_flag


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="the feature store")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of table.md")
    parser.add_argument("--methods", nargs="+", default=["supervised", "fixmatch", "rs-mtdf"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", default="test", help="test, val, or a list file")
    parser.add_argument("--root", type=Path, help="folder of the images, if not as the store recorded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="A.B=VALUE", help="overrides, the same for every run")
    arguments = parser.parse_args()
    if unknown := [m for m in arguments.methods if m not in METHODS]:
        raise ConfigError(f"no method {', '.join(unknown)}; there are: {', '.join(METHODS)}")
    with stop_flag() as stop:
        rows = {
            method: [_run(arguments, method, seed, stop) for seed in arguments.seeds] for method in arguments.methods
        }
    table = _table(rows, arguments)
    write_whole(arguments.out / "table.md", table.encode())
    print(table)


def _run(arguments: argparse.Namespace, method: str, seed: int, stop: StopFlag) -> dict[str, Any]:
    """The scores of one run, trained first if it is not there yet."""
    path = arguments.out / f"{method}-seed{seed}"
    scores = path / f"scores-{Path(arguments.split).stem}.json"
    if scores.exists():
        return dict(json.loads(scores.read_text()))
    resume = (path / "config.json").exists()
    if not resume or RunFolder.open(path).state().get("state") != "finished":
        options = TrainOptions(
            cache=arguments.cache,
            out=path,
            root=arguments.root,
            train={} if resume else {"method": method, "seed": seed},
            overrides=[] if resume else arguments.set,
            device=arguments.device,
            resume=resume,
        )
        train_run(options, stop=stop, say=say)
    result = score_run(path, split=arguments.split, root=arguments.root, device=arguments.device, stop=stop)
    write_whole(scores, json.dumps(result).encode())
    return result


def _table(rows: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> str:
    classes = list(next(iter(rows.values()))[0]["per_class"])
    lines = [f"| method | {' | '.join(classes)} | mIoU |", f"|---{'|---' * (len(classes) + 1)}|"]
    for method, results in rows.items():
        cells = [_cell([r["per_class"][name]["iou"] for r in results]) for name in classes]
        lines.append(f"| {method} | {' | '.join(cells)} | **{_cell([r['miou'] for r in results])}** |")
    seeds = ", ".join(map(str, arguments.seeds))
    lines.append(
        f"\nIoU in %, on {arguments.split}; mean ± standard deviation over seeds {seeds}, each the EMA student that "
        f"was best on val; store {arguments.cache.name}."
    )
    return "\n".join(lines) + "\n"


def _cell(values: list[float | None]) -> str:
    known = [100 * v for v in values if v is not None]
    if not known:
        return "n/a"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


if __name__ == "__main__":
    sys.exit(handled(main))
