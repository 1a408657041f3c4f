"""`rsmtdf plan` and `rsmtdf cache-features`. Bodies only, as in `main`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rsmtdf.cli.options import (
    Calibrate,
    Codec,
    ConfigFile,
    DatasetName,
    Device,
    Devices,
    Init,
    Json,
    Labels,
    MaxGb,
    PoolTiles,
    Precision,
    Processes,
    Root,
    Scheduler,
    Seeds,
    Set,
    ShardRange,
    StoreOut,
    StorePixels,
    TeacherNames,
    WeakViews,
    Workers,
)
from rsmtdf.cli.terminal import say, show
from rsmtdf.errors import StoreNotFound
from rsmtdf.objects import store_path


def plan(
    dataset: DatasetName = None,
    config: ConfigFile = None,
    root: Root = None,
    labels: Labels = None,
    out: StoreOut = "feats.zarr",
    seeds: Seeds = None,
    weak_views: WeakViews = None,
    teacher: TeacherNames = None,
    codec: Codec = None,
    precision: Precision = None,
    max_gb: MaxGb = None,
    pool: PoolTiles = None,
    device: Device = "auto",
    workers: Workers = None,
    calibrate: Calibrate = True,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """What cache-features would make and cost: views, gigabytes, files, hours, break-even. Leaves nothing behind.

    Times come from a few seconds of work on real tiles; teachers get random weights for it, so nothing is downloaded.
    """
    from rsmtdf.cli.pacing import calibrated
    from rsmtdf.cli.planning import plan_cache, require_runnable

    more = _settings(set_, **{"cache.pool_tiles": pool, "cache.workers": workers})
    source, where = _source(dataset, config, root, labels, seeds, weak_views, teacher, codec, precision, max_gb, more)
    job = plan_cache(source, root=where, out=out)
    require_runnable(job)
    if calibrate:
        job = calibrated(job, device=device, say=say)
    show(job.plan.as_dict(), as_json=as_json, text=job.text())


def cache_features(
    dataset: DatasetName = None,
    config: ConfigFile = None,
    root: Root = None,
    labels: Labels = None,
    out: StoreOut = "feats.zarr",
    seeds: Seeds = None,
    weak_views: WeakViews = None,
    teacher: TeacherNames = None,
    codec: Codec = None,
    precision: Precision = None,
    max_gb: MaxGb = None,
    pool: PoolTiles = None,
    store_pixels: StorePixels = False,
    device: Device = "auto",
    devices: Devices = None,
    processes: Processes = None,
    scheduler: Scheduler = None,
    shard_range: ShardRange = None,
    init: Init = False,
    workers: Workers = None,
    max_failures: Annotated[
        int | None,
        typer.Option("--max-failures", help="Unreadable tiles that are no failure (exit code 1); default 0."),
    ] = None,
    stats_from: Annotated[
        Any,
        typer.Option(
            "--stats-from",
            metavar="STORE",
            parser=store_path,
            help="Take channel statistics from this store: the two can be merged then.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, as rsmtdf plan does, and stop.")] = False,
    calibrate: Calibrate = True,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 1: run the teachers once over every (tile, augmentation seed) and store their patch features.

    Run it again to go on after an interruption, or with more seeds, labels, teachers or images: only what is
    missing is computed. Example: rsmtdf cache-features --config mydata/rsmtdf.yaml --out feats.zarr
    """
    from rsmtdf.cli.caching import fill_piece, run_cache
    from rsmtdf.cli.pacing import calibrated
    from rsmtdf.cli.planning import plan_cache, require_runnable
    from rsmtdf.cli.spreading import scale_of
    from rsmtdf.signals import stop_flag

    given = {"cache.pool_tiles": pool, "cache.workers": workers, "cache.max_failures": max_failures}
    more = [*_settings(set_, **given), *(["cache.store_pixels=true"] if store_pixels else [])]
    scale = scale_of(devices=devices, processes=processes, scheduler=scheduler, shard_range=shard_range, init=init)
    source, where = _source(dataset, config, root, labels, seeds, weak_views, teacher, codec, precision, max_gb, more)
    if scale and scale.shard_range and not dry_run and (store := _prepared(out, source)):
        with stop_flag() as stop:
            _conclude(
                fill_piece(store, source, root=where, device=device, stop=stop, say=say, scale=scale), as_json=as_json
            )
        return
    job = plan_cache(source, root=where, out=out)
    if dry_run:
        require_runnable(job)
        job = calibrated(job, device=device, say=say) if calibrate else job
    say(job.text())
    if dry_run:
        show(job.plan.as_dict(), as_json=as_json, text=f"nothing written; without --dry-run this fills {out}")
        return
    with stop_flag() as stop:
        result = run_cache(job, device=device, stop=stop, say=say, stats_from=stats_from, scale=scale)
    _conclude(result, as_json=as_json)


def _source(
    dataset: str | None,
    config: Path | None,
    root: Path | None,
    labels: str | None,
    seeds: str | None,
    weak_views: str | None,
    teacher: list[str] | None,
    codec: str | None,
    precision: str | None,
    max_gb: float | None,
    set_: list[str] | None,
) -> tuple[Any, Path]:
    """The experiment that the options describe, and its data root."""
    from rsmtdf.cli.planning import select_teachers
    from rsmtdf.cli.workspace import Source, data_root, load_source, with_labels, with_precision

    named = {"seeds": seeds, "weak_views": weak_views, "codec": codec, "max_gb": max_gb}
    overrides = [*(set_ or []), *(f"cache.{k}={v}" for k, v in named.items() if v is not None)]
    source = with_labels(load_source(dataset=dataset, config=config, overrides=overrides), labels)
    source = with_precision(Source(select_teachers(source.experiment, teacher), source.base), precision)
    return source, data_root(source, root=root)


def _settings(set_: list[str] | None, **named: object) -> list[str]:
    """The overrides of --set, and after them those of options that were given."""
    return [*(set_ or []), *(f"{key}={value}" for key, value in named.items() if value is not None)]


def _prepared(out: Any, source: Any) -> Any:
    """The store at `out`, if it is there and has all it needs."""
    from rsmtdf.cli.caching import is_prepared
    from rsmtdf.store.store import FeatureStore

    try:
        store = FeatureStore.open(out, writable=True)
    except StoreNotFound:
        return None
    store.expect(recipe=source.experiment.views, dataset=source.experiment.dataset)
    return store if is_prepared(store, source.experiment) else None


def _conclude(result: dict[str, Any], *, as_json: bool) -> None:
    """Shows the summary; exit code 1 where tiles failed."""
    from rsmtdf.cli.cache_summary import summary_text
    from rsmtdf.cli.spreading import scale_text

    if result.get("prepared"):
        show(result, as_json=as_json, text=_next_commands(result))
        return
    show(result, as_json=as_json, text="\n".join(filter(None, [summary_text(result), scale_text(result)])))
    if result["failed"]:
        raise typer.Exit(1)


def _next_commands(result: dict[str, Any]) -> str:
    """What to run on a store that `--init` has prepared."""
    given = ["rsmtdf", *(a for a in sys.argv[1:] if a not in ("--init", "--json"))]
    command = shlex.join(given)
    return "\n".join(
        [
            f"prepared   {result['store']}: {result['pending_views']:,} views to compute, {result['shards']:,} shards",
            "next       one of",
            f"  {command} --devices all",
            f"  {command} --scheduler tcp://HOST:8786",
            f"  sbatch --array=0-7 ... {command} --shard-range $SLURM_ARRAY_TASK_ID/8",
        ]
    )
