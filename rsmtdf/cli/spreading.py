"""Where stage 1 computes: options to a crew of workers, and a prepared store filled by them."""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError

from rsmtdf.cli.terminal import Bar
from rsmtdf.cli.worker import Order, TaskReport, fill_task, make_order
from rsmtdf.config import Experiment, Model, read_yaml
from rsmtdf.errors import ConfigError
from rsmtdf.signals import StopFlag
from rsmtdf.stages import cache as stage
from rsmtdf.stages.scaleout import Crew, SerialCrew, Tally, clusters, piece, process_crew, spread
from rsmtdf.store.status import DONE, SKIPPED, state_of
from rsmtdf.store.store import FeatureStore

log = logging.getLogger(__name__)


class Cluster(Model):
    """A file for `--scheduler FILE.yaml`: jobs of a batch system as workers, by dask-jobqueue."""

    kind: str
    """SLURMCluster, PBSCluster, LSFCluster, ... of dask_jobqueue."""
    jobs: int | tuple[int, int] = 1
    """So many, or [from, to] as there is work."""
    device: str = "cuda:0"
    """Of a worker, in its job."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Dask resources that each task takes."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the class: queue, cores, memory, walltime, ..."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How far a run of stage 1 is spread: the options of the command line, checked."""

    devices: tuple[str, ...] = ()
    """A process for each."""
    processes: int | None = None
    scheduler: str | None = None
    """tcp://..., local, cuda, or a file (`cluster`)."""
    cluster: Cluster | None = None
    shard_range: tuple[int, int] | None = None
    """(index from 0, pieces)."""
    init: bool = False

    @property
    def is_here(self) -> bool:
        """Whether this process computes itself."""
        return not (self.devices or self.processes or self.scheduler)


@dataclass
class Filled:
    """What came of filling a store."""

    report: stage.CacheReport
    facts: dict[str, Any] = field(default_factory=dict)
    """For the summary: executor, workers, retries, deaths, and whether the store is complete."""


def scale_of(
    *,
    devices: str | None,
    processes: int | None,
    scheduler: str | None,
    shard_range: str | None,
    init: bool,
) -> Scale | None:
    """The options as a `Scale`; None where there are none of them.

    Raises:
        ConfigError: they contradict each other, or one is not what it should be.
        WorkerError: no scheduler answers.
    """
    if not (devices or processes is not None or scheduler or shard_range or init):
        return None
    if devices and (processes is not None or scheduler):
        raise ConfigError("--devices is one process for each device; it goes with neither --processes nor --scheduler")
    if processes is not None and scheduler not in (None, "local"):
        raise ConfigError(f"--processes goes with --scheduler local only; {scheduler} has its own workers")
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes {processes}: at least 1 is needed")
    if init and (devices or processes is not None or scheduler or shard_range):
        raise ConfigError("--init prepares the store and computes nothing; give the other options to the runs after it")
    found = Scale(
        devices=_devices(devices) if devices else (),
        processes=processes,
        scheduler=scheduler,
        cluster=_cluster(scheduler) if scheduler else None,
        shard_range=_range(shard_range) if shard_range else None,
        init=init,
    )
    if found.cluster is not None or scheduler not in (None, "local"):
        # Now, and not after minutes of reading images and measuring statistics.
        clusters.require(found.cluster.kind if found.cluster is not None else str(scheduler))
    return found


def fill_over(
    store: FeatureStore,
    experiment: Experiment,
    *,
    data_root: Path,
    device: str,
    scale: Scale,
    stop: StopFlag,
    say: Callable[[str], None],
) -> Filled:
    """Fills a prepared `store`, or a piece of it, here or by a crew; seals it where that makes it complete.

    Raises:
        StoreBusy: another process has these shards.
        WorkerError: no workers, or they die; what they committed is kept.
        RsmtdfError: what a worker met that would come again; likewise.
        Interrupted: a signal came; likewise.
    """
    names = [t.name for t in experiment.teachers]
    shards, views = _shards(store, names, scale)
    order = make_order(store, experiment, data_root=data_root, threads=_threads(scale, device))
    begun = time.perf_counter()
    with Bar("caching views", unit="view", total=views) as bar:
        if scale.is_here:
            # As a crew of one: a shard that somebody else has is waited for, and only a task's shards are claimed.
            filled = _fill_by(SerialCrew(device=device, stop=stop), order, shards, stop=stop, bar=bar)
            filled.facts.clear()  # nothing was spread
        else:
            with _crew(scale, device=device) as crew:
                say(f"workers    {crew.name}; {len(shards):,} shards")
                filled = _fill_by(crew, order, shards, stop=stop, bar=bar)
    filled.report.seconds = time.perf_counter() - begun
    if scale.shard_range is None:
        store.seal()
    else:
        index, pieces = scale.shard_range
        filled.facts["shard_range"] = f"{index}/{pieces}"
        if is_complete := _others_are_done(store, names, scale.shard_range):
            store.clean_partials()
            store.seal()
        filled.facts["is_last_piece"] = is_complete
    return filled


def scale_text(result: dict[str, Any]) -> str:
    """Lines for the summary on how the work was spread; empty where it was not."""
    lines = []
    if spread_over := result.get("spread"):
        rates = spread_over["workers"]
        lines.append(
            f"spread     {spread_over['tasks']:,} tasks over {spread_over['executor']}; "
            f"{spread_over['retries']} retried, {spread_over['deaths']} workers died"
        )
        shown = list(rates.items())[:8]
        lines += [f"worker     {name}: {w['views']:,} views, {w['views_per_second']:.1f} views/s" for name, w in shown]
        if len(rates) > len(shown):
            lines.append(f"worker     and {len(rates) - len(shown)} more (--json lists them all)")
    if piece_of := result.get("shard_range"):
        done = "the last one: the store is complete" if result["is_last_piece"] else "other pieces are not finished"
        lines.append(f"piece      {piece_of}, {done}")
    return "\n".join(lines)


def _shards(store: FeatureStore, names: Sequence[str], scale: Scale) -> tuple[list[int], int]:
    """The shards to look into, and the views that they may lack."""
    if scale.shard_range is None:
        store.clean_partials()
        # Read once: before shards are sealed, their status words are a file each.
        rows = store.pending_rows(names, retry_skipped=True)
        return np.unique(rows // store.shard_views).tolist(), len(rows)
    index, pieces = scale.shard_range
    # Of all shards, not of those missing: until the store grows, the pieces are the same whenever each of them starts.
    mine = piece(store.n_shards, index=index, pieces=pieces)
    left = {k: n for k in mine if (n := _pending(store, names, k))}
    return list(left), sum(left.values())


def _pending(store: FeatureStore, names: Sequence[str], shard: int) -> int:
    """Views of `shard` that are not finished, those skipped before included; reads the status of no other shard."""
    return int((_states(store, names, shard) != DONE).any(axis=0).sum())


def _states(store: FeatureStore, names: Sequence[str], shard: int) -> np.ndarray:
    """[1 + teachers, views]: of each view of `shard`, the states of its pixels and of each teacher's features."""
    places = store.rows_of_shard(shard) - shard * store.shard_views
    arrays = [store.view_status_array, *(store.teacher(name).status for name in names)]
    return np.stack([state_of(a.read_shard(shard))[places] for a in arrays])


def _fill_by(crew: Crew, order: Order, shards: Sequence[int], *, stop: StopFlag, bar: Bar) -> Filled:
    report = stage.CacheReport()
    workers: dict[str, list[float]] = {}

    def take(outcome: TaskReport) -> None:
        for row in outcome.report.ledger:
            log.debug("shard %d: %d views, %d bytes, by %s", row.shard, row.views, row.bytes_written, outcome.worker)
        outcome.report.ledger.clear()  # or this process would grow with the store
        report.add(outcome.report)
        done = workers.setdefault(outcome.worker, [0, 0.0])
        done[0] += outcome.report.views
        done[1] += outcome.seconds
        bar.advance(outcome.report.views, report.bytes_written)

    tally = spread(shards, work=functools.partial(fill_task, order), crew=crew, stop=stop, on_done=take)
    report.devices = max(min(len(workers), crew.most_workers), 1)  # not all that came after one that died
    return Filled(report, {"spread": _spread_facts(crew, tally, workers)})


def _spread_facts(crew: Crew, tally: Tally, workers: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "executor": crew.name,
        "tasks": tally.tasks,
        "retries": tally.retries,
        "deaths": tally.deaths,
        "workers": {
            name: {"views": int(views), "views_per_second": round(views / seconds, 3) if seconds else 0.0}
            for name, (views, seconds) in sorted(workers.items())
        },
    }


def _crew(scale: Scale, *, device: str) -> AbstractContextManager[Crew]:
    if scale.scheduler is None:
        return process_crew(scale.devices or (device,) * (scale.processes or 1))
    if scale.scheduler == "local":
        return clusters.local_cluster(scale.processes or max((os.cpu_count() or 2) // 2, 1), device=device)
    if scale.scheduler == "cuda":
        return clusters.cuda_cluster()
    if scale.cluster is None:
        return clusters.running_scheduler(scale.scheduler, device=device)
    file = scale.cluster
    return clusters.job_cluster(
        file.kind, options=file.options, jobs=file.jobs, device=file.device, resources=file.resources
    )


def _threads(scale: Scale, device: str) -> int | None:
    """For torch, where several processes share the cores of this machine."""
    count = len(scale.devices) or scale.processes
    if count is None or scale.scheduler not in (None, "local"):
        return None
    return max(1, torch.get_num_threads() // count)


def _others_are_done(store: FeatureStore, names: Sequence[str], shard_range: tuple[int, int]) -> bool:
    """Whether all pieces are finished, found out cheaply: pieces are filled in order, so each one's last shard tells
    most of the time, and only whoever comes last looks at everything.
    """
    _, pieces = shard_range
    lasts = [piece(store.n_shards, index=i, pieces=pieces)[-1] for i in range(pieces) if store.n_shards >= pieces]
    return all(
        np.isin(_states(store, names, shard), (DONE, SKIPPED)).all() for shard in reversed(lasts)
    ) and not store.missing_shards(names)


def _devices(text: str) -> tuple[str, ...]:
    if text == "all":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ConfigError("--devices all: this machine has no CUDA device; --processes N spreads over its cores")
        return tuple(f"cuda:{i}" for i in range(count))
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if found is None:
        raise ConfigError(
            f"--shard-range {text!r} should read i/n: piece i, counted from 0, of n (0/8 to 7/8), as a job array of "
            "0-7 counts"
        )
    index, pieces = int(found[1]), int(found[2])
    piece(pieces, index=index, pieces=pieces)
    return index, pieces


def _cluster(scheduler: str) -> Cluster | None:
    """The file that `--scheduler` names, if it names one.

    Raises:
        ConfigError: it is neither an address, nor a known word, nor a readable file.
    """
    if scheduler in ("local", "cuda") or "://" in scheduler:
        return None
    path = Path(scheduler)
    if not path.is_file():
        raise ConfigError(
            f"--scheduler {scheduler!r} is none of: an address (tcp://host:8786), local, cuda, or a YAML file that is "
            "there (docs/scaling.md has one for SLURM)"
        )
    try:
        return Cluster.model_validate(read_yaml(path.read_text(encoding="utf-8"), where=str(path)))
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{path}: {len(lines)} problem(s)\n" + "\n".join(lines)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
