"""The feature store against its peers and against the limits of the machine: reads, epochs, writes, sizes, opening.

    OMP_NUM_THREADS=1 python benchmarks/store.py [--quick] [--json FILE] [--markdown docs/benchmarks.md]

Every format holds the same views (the paper's size: DINOv2-B at 518 px, 2.10 MB in fp16), and every way to read them
is checked for equality before the clock runs. All ways take turns, read by read, so drift hits all alike, and ratios
are paired. The files lie in the page cache (unless said) and are larger than the processor's last cache. Needs the
peers: pip install 'rsmtdf[bench]'.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from store_peers import clock, disk, machine, opening, report
from store_peers.epochs import BATCH, open_epochs
from store_peers.integrity import notices_a_flipped_bit
from store_peers.views import Views, make_views, same, teacher_spec
from store_peers.ways import WAYS

from rsmtdf.store.codecs import CODECS, bytes_per_view

LIMIT, OURS = "memcpy (limit)", "rsmtdf, verified"
COMPARE_NOTHING = (LIMIT, report.VERIFYING)
"""Limits that have nothing to notice a flipped bit by."""
READ_BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=128, help="of each codec; 269 MB of fp16 by default")
    parser.add_argument("--codec", action="append", choices=[*CODECS], help="default: fp16 and int8")
    parser.add_argument("--rounds", type=int, default=200, help="random reads by each way")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--dir", type=Path, help="where the files go for the time being (default: the system's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure, as data")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="puts the tables into it: docs/benchmarks.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of the peers, on ways to use them that are their users'
    if arguments.quick:
        arguments.views, arguments.rounds = 2 * BATCH, 3
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        found = measure(Path(folder), arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.markdown:
        report.put_into(arguments.markdown, found)
    print(report.text(found))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, as JSON-ready data."""
    found: dict[str, Any] = {"machine": machine.facts(folder), "quick": arguments.quick}
    say("which readers notice a flipped bit")
    found["notices"] = {w.name: notices_a_flipped_bit(w) for w in WAYS.values() if w.name not in COMPARE_NOTHING}
    spec = teacher_spec(grid=(8, 8), dim=64) if arguments.quick else teacher_spec()
    found["codecs"] = {}
    for codec in arguments.codec or ("fp16", "int8"):
        with tempfile.TemporaryDirectory(dir=folder) as root:
            views = make_views(arguments.views, codec=codec, spec=spec)
            found["codecs"][codec] = measure_codec(Path(root), views, arguments)
    say("sizes")
    found["bytes_per_view"] = {
        codec: sum(bytes_per_view(codec, gh * gw, dim) for (gh, gw), dim in opening.TEACHERS.values())
        for codec in CODECS
    }
    say("a store of many views: making it")
    tiles, seeds, labelled = (100, 3, 4) if arguments.quick else (10_000, 98, 200)
    store = opening.make_large_store(folder / "large.zarr", tiles=tiles, seeds=seeds, labelled=labelled)
    repeats = 1 if arguments.quick else 5
    say("a store of many views: opening it")
    found["opening"] = {"unsealed": [opening.measure_opening(store.path) for _ in range(repeats)]}
    store.seal()
    found["opening"]["sealed"] = [opening.measure_opening(store.path) for _ in range(repeats)]
    found["load_after"] = machine.load()
    return found


def measure_codec(root: Path, views: Views, arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes, then reads, of views under one codec."""
    rounds = arguments.rounds
    found: dict[str, Any] = {"views": len(views), "view_bytes": views.view_bytes}
    say(f"{views.codec}: writing")
    found["writes"] = disk.write_rates(root, views, rounds=1 if arguments.quick else 5)
    with contextlib.ExitStack() as stack:
        reads = {w.name: stack.enter_context(w.open(root / w.format, views)) for w in WAYS.values()}
        check(reads, views)
        rows = np.random.default_rng(1).integers(len(views), size=(rounds, READ_BATCH))
        slot = {name: values[0] for name, values in views.buffers(1).items()}
        batch = views.buffers(READ_BATCH)
        say(f"{views.codec}: random views")
        ones = {n: _bind(r.one, rows[:, 0].tolist(), slot) for n, r in reads.items() if WAYS[n].single}
        found["views_one"] = table(clock.interleaved(ones, rounds=rounds), views.view_bytes)
        say(f"{views.codec}: batches of {READ_BATCH}")
        many = {n: _bind(r.many, rows, batch) for n, r in reads.items() if WAYS[n].batched}
        seconds = clock.interleaved(many, rounds=max(rounds // 8, 2))
        found["views_batch"] = table(seconds, READ_BATCH * views.view_bytes)
    say(f"{views.codec}: shuffled epochs")
    with open_epochs(root, views) as epochs:
        if short := [name for name, epoch in epochs.items() if epoch(0) != len(views)]:
            raise SystemExit(f"an epoch of {', '.join(short)} has not {len(views)} views")
        seconds = clock.interleaved(epochs, rounds=2 if arguments.quick else 7)
    found["epochs"] = table(seconds, len(views) * views.view_bytes)
    say(f"{views.codec}: cold reads")
    seconds = disk.cold_reads(root, views, rounds=2 if arguments.quick else 40)
    found["cold"] = table(seconds, views.view_bytes, limit="raw pread (limit)")
    return found


def check(reads: dict[str, Any], views: Views) -> None:
    """Every way gives the same bytes, one view at a time and in batches.

    Raises:
        SystemExit: one does not.
    """
    rows = np.array([len(views) - 1, 0, 3, 3])
    expected = {name: values[rows] for name, values in views.arrays.items()}
    slot = {name: values[0] for name, values in views.buffers(1).items()}
    for name, r in reads.items():
        if not (same(r.one(2, slot), views.view(2)) and same(r.many(rows, views.buffers(len(rows))), expected)):
            raise SystemExit(f"{name} gives other bytes than were written")


def table(seconds: dict[str, np.ndarray], n_bytes: int, *, limit: str = LIMIT) -> list[dict[str, Any]]:
    return [clock.row(name, seconds, n_bytes=n_bytes, limit=limit, ours=OURS) for name in seconds]


def _bind(read: Any, rows: Any, out: Any) -> Any:
    return lambda k: read(rows[k], out)


def say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
