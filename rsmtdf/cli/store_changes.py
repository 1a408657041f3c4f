"""Behind `rsmtdf cache recode`, `merge` and `rm`: what a store holds is changed; results as data and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rsmtdf.cli.terminal import Bar
from rsmtdf.errors import ConfigError, StoreIncomplete
from rsmtdf.objects import StorePath
from rsmtdf.signals import StopFlag
from rsmtdf.specs import STREAMS, Stream
from rsmtdf.store.merge import MergeReport, merge
from rsmtdf.store.recode import RecodeReport, recode
from rsmtdf.store.remove import RemovalReport, has_remains, plan_removal, remove
from rsmtdf.store.store import FeatureStore

VIEWS_SHOWN = 20
"""Damaged views of a teacher that are printed."""


def recode_store(
    source: StorePath, dst: StorePath, *, codec: str, teachers: Sequence[str] | None, threads: int, stop: StopFlag
) -> tuple[dict[str, Any], str]:
    """A copy of a store under another codec."""
    record = _with_teachers(FeatureStore.open(source).experiment, only=teachers, codec=codec)
    with Bar("recoding", unit="view") as bar:
        report = recode(
            source,
            dst,
            codec=codec,
            teachers=teachers,
            experiment=record,
            threads=threads,
            stop=stop,
            progress=bar.update_to,
        )
    return report.as_dict(), _recode_text(report)


def merge_stores(
    path: StorePath, source: StorePath, *, recode: bool, dry_run: bool, threads: int, stop: StopFlag
) -> tuple[dict[str, Any], str]:
    """A store grown by what another has."""
    ours, theirs = (FeatureStore.open(p).experiment for p in (path, source))
    record = _with_teachers(ours, more=theirs)
    with Bar("merging", unit="view") as bar:
        report = merge(
            path,
            source,
            recode=recode,
            dry_run=dry_run,
            experiment=record,
            threads=threads,
            stop=stop,
            progress=bar.update_to,
        )
    return report.as_dict() | {"dry_run": dry_run}, _merge_text(report, dry_run=dry_run)


def removal_plan(
    path: StorePath,
    *,
    teacher: str | None,
    pixels: bool = False,
    seed: int | None,
    stream: str,
    generation: int | None,
    dry_run: bool,
) -> tuple[dict[str, Any], str] | None:
    """What a removal would take away; None where it is gone already, and perhaps only its disk is not free yet.

    Raises:
        StoreIncomplete: likewise, for a dry run; or nothing on disk is left of such a teacher or seed either.
        ConfigError: neither or both of a teacher and a seed are asked for, or no such stream.
    """
    if (teacher is not None) + (seed is not None) + pixels != 1:
        raise ConfigError("give what to remove: either --teacher NAME or --seed N, or --pixels")
    store, of = FeatureStore.open(path), _stream(stream)
    try:
        plan = plan_removal(store, teacher=teacher, pixels=pixels, seed=seed, stream=of, generation=generation)
    except StoreIncomplete:
        if dry_run or not has_remains(
            store, teacher=teacher, pixels=pixels, seed=seed, stream=of, generation=generation
        ):
            raise
        return None
    runs = "runs that used its features" if teacher is not None else "runs that used these views"
    after = "" if pixels else f"\n           {runs} cannot be resumed afterwards"
    text = (
        f"remove     {plan.what} from {path}: {plan.views:,} views, about {plan.bytes / 1e9:.2f} GB; {plan.remaining}"
        f"{after}"
    )
    return plan.as_dict(), text


def remove_from_store(
    path: StorePath,
    *,
    teacher: str | None,
    pixels: bool = False,
    seed: int | None,
    stream: str,
    generation: int | None,
    stop: StopFlag,
) -> tuple[dict[str, Any], str]:
    """A store without a teacher, without the views of a seed, or without the stored pixels."""
    record = None
    if teacher is not None:
        record = _with_teachers(FeatureStore.open(path).experiment, without=teacher)
    with Bar("freeing", unit="shard") as bar:
        report = remove(
            path,
            teacher=teacher,
            pixels=pixels,
            seed=seed,
            stream=_stream(stream),
            generation=generation,
            experiment=record,
            stop=stop,
            progress=bar.update_to,
        )
    return report.as_dict(), _removal_text(report)


def _stream(name: str) -> Stream:
    if name not in STREAMS:
        raise ConfigError(f"--stream {name}: there are {', '.join(STREAMS)}")
    return name


def _with_teachers(
    record: Mapping[str, Any],
    *,
    only: Sequence[str] | None = None,
    without: str | None = None,
    more: Mapping[str, Any] | None = None,
    codec: str | None = None,
) -> dict[str, Any]:
    """A store's record with other teachers (and codec) in its configuration."""
    if "config" not in record:
        return dict(record)  # a store that the command line has not made
    config = dict(record["config"])
    kept = [t for t in config["teachers"] if t["name"] != without and (only is None or t["name"] in only)]
    known = {t["name"] for t in kept}
    new = [t for t in (more or {}).get("config", {}).get("teachers", []) if t["name"] not in known]
    config["teachers"] = [*kept, *new]
    if codec is not None:
        config["cache"] = {**config["cache"], "codec": codec}
    return {**record, "config": config}


def _recode_text(report: RecodeReport) -> str:
    lines = []
    if views := sum(report.views.values()):
        rate = report.bytes_read / 1e6 / max(report.seconds, 1e-9)
        lines.append(f"recoded    {views:,} views in {report.seconds:.1f} s ({rate:.0f} MB/s read)")
    else:
        lines.append("recoded    nothing to do: every view that the source has is there")
    share = report.bytes_after / report.bytes_before if report.bytes_before else 0.0
    lines.append(f"size       {_gb(report.bytes_before)} -> {_gb(report.bytes_after)} ({share:.2f} of it)")
    for name, error in report.error.items():
        lines.append(f"error      {name}: {error:.2%} added, after standardising")
    for name, codec in report.rounded_before.items():
        lines.append(f"note       {name}: its values were {codec} before, so they carry the rounding of both codecs")
    for name, n in report.skipped.items():
        lines.append(f"skipped    {name}: {n:,} views, as in the source")
    lines += _lacking(report.lacking, "the source lacks them too; rsmtdf cache-features finishes them in either store")
    lines += _damaged(report.damaged)
    return "\n".join([*lines, f"next       rsmtdf train --cache {report.store}"])


def _merge_text(report: MergeReport, *, dry_run: bool) -> str:
    grown = " + ".join(f"{n:,} {stream}" for stream, n in report.new_views.items()) or "no"
    lines = [f"{'would add' if dry_run else 'added':<10} {grown} views to {report.store}"]
    for name in report.new_teachers:
        lines.append(f"teacher    {name} is new")
    for name, n in report.views.items():
        how = ", encoded anew" if name in report.recoded else ""
        lines.append(f"features   {name}: {n:,} views{how}")
    took = "" if dry_run else f" in {report.seconds:.1f} s"
    lines.append(f"size       {_gb(report.bytes)} of features{took}")
    for segment, n in report.left.items():
        lines.append(f"left       {segment}: {n:,} views are paired otherwise than in {report.store}, and stay behind")
    lines += _lacking(report.lacking, f"finish them with rsmtdf cache-features and --out {report.store}")
    return "\n".join([*lines, *_damaged(report.damaged)])


def _removal_text(report: RemovalReport) -> str:
    lines = [
        f"removed    {report.what}: {report.views:,} views; {report.remaining}",
        f"freed      {_gb(report.bytes)}"
        + (f"; {report.shards_deleted:,} shards deleted" if report.shards_deleted else "")
        + (f"; {report.shards_rewritten:,} shards rewritten" if report.shards_rewritten else ""),
    ]
    return "\n".join([*lines, *(f"NOT FREED  {line}" for line in report.left)])


def _lacking(lacking: Mapping[str, int], what: str) -> list[str]:
    return [f"lacking    {name}: {n:,} views; {what}" for name, n in lacking.items()]


def _damaged(damaged: Mapping[str, Mapping[str, str]]) -> list[str]:
    lines = []
    for name, views in damaged.items():
        lines.append(f"DAMAGED    {name}: {len(views):,} views, which stay to be done")
        lines += [f"  view {view}: {why}" for view, why in list(views.items())[:VIEWS_SHOWN]]
        if (more := len(views) - VIEWS_SHOWN) > 0:
            lines.append(f"  and {more:,} more (--json lists all)")
    return lines


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 5e6 else f"{n / 1e6:.2f} MB"
