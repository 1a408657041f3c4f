"""What a worker of stage 1 runs: an order says what to open, a task which shards to fill.

An order is text and numbers, so it crosses any network and can be compared: a worker opens store, images and teachers
once, and keeps them as long as orders are equal. Threads make the views, never processes: a Dask worker may not fork.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import rsmtdf
from rsmtdf.cli.planning import student_grid, teacher_sources
from rsmtdf.cli.terminal import choose_device
from rsmtdf.config import Experiment, parse_experiment
from rsmtdf.data.dataset import Dataset
from rsmtdf.errors import ConfigError, StoreBusy
from rsmtdf.objects import store_path
from rsmtdf.signals import StopFlag
from rsmtdf.specs import Teacher, digest, to_dict
from rsmtdf.stages import cache as stage
from rsmtdf.store.store import FeatureStore
from rsmtdf.teachers.registry import build_teacher
from rsmtdf.teachers.source import TeacherSource
from rsmtdf.views.maker import ViewMaker


@dataclass(frozen=True, kw_only=True)
class Order:
    """What workers are to fill, and with what. JSON-ready."""

    store: str
    """Its place, as they see it."""
    contents: str
    """Digest of the rows and teachers that the store had: when it has grown, it is opened anew."""
    run: str
    """Of the command that gave it. A worker that lives longer opens everything anew for the next one: images and
    weights may have changed under the same paths.
    """
    data_root: str
    experiment: str
    """JSON."""
    threads: int | None = None
    """Of torch on a CPU; None: as many as it takes by itself."""
    version: str = rsmtdf.__version__


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """The `Outcome` of a task: a report with its ledger, and no features."""

    worker: str
    seconds: float
    report: stage.CacheReport
    refused: str | None = None


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What a worker has open."""

    experiment: Experiment
    store: FeatureStore
    maker: ViewMaker
    teachers: Mapping[str, Teacher]
    batch: int
    """Views that they see at a time, chosen once."""
    turn: threading.Lock
    """Of two tasks in one worker, one has the device, and the other makes its first views meanwhile."""


def make_order(store: FeatureStore, experiment: Experiment, *, data_root: Path, threads: int | None = None) -> Order:
    """The order to fill `store` with the teachers of `experiment`."""
    record = experiment.as_dict()
    for teacher in record["teachers"]:
        # A worker may have another working directory.
        if teacher.get("weights") and Path(teacher["weights"]).is_file():
            teacher["weights"] = str(Path(teacher["weights"]).resolve())
    return Order(
        store=str(store.path.resolve()) if isinstance(store.path, Path) else str(store.path),
        contents=_contents(store),
        run=uuid.uuid4().hex,
        data_root=str(data_root.resolve()),
        experiment=json.dumps(record, sort_keys=True),
        threads=threads,
    )


def fill_task(order: Order, shards: tuple[int, ...], device: str, stop: StopFlag) -> TaskReport:
    """Fills `shards`; a `rsmtdf.stages.scaleout.Work` once it is given its order.

    Raises:
        RsmtdfError: the order cannot be opened here, or a shard cannot be filled, wherever it is tried.
        Interrupted: `stop` was raised.
    """
    desk = open_desk(order, device)
    begun = time.perf_counter()  # opening is no waiting for somebody else's shards
    cache = desk.experiment.cache
    report, refused = stage.CacheReport(), None
    try:
        report = stage.fill_shards(
            desk.store,
            teachers=desk.teachers,
            maker=desk.maker,
            batch=desk.batch,
            workers=cache.workers,
            stop=stop,
            shards=shards,
            turn=desk.turn,
        )
    except StoreBusy as busy:
        refused = str(busy)
    seconds = report.seconds if refused is None else time.perf_counter() - begun
    return TaskReport(worker=worker_name(device), seconds=seconds, report=report, refused=refused)


def open_desk(order: Order, device: str) -> Desk:
    """Everything that `order` names, opened once in this process, however many threads ask.

    Raises:
        ConfigError: this is another rsmtdf than the order's.
        DatasetError, StoreError, TeacherError: something cannot be opened here, or is another one than the store's.
    """
    if order.version != rsmtdf.__version__:
        raise ConfigError(
            f"{worker_name(device)} has rsmtdf {rsmtdf.__version__}, and the order comes from {order.version}; "
            "install the same version on all machines"
        )
    with _OPENING:
        if (order, device) not in _OPEN:
            _clear_away()
            _OPEN[order, device] = _opened(order, device)
        return _OPEN[order, device]


def worker_name(device: str) -> str:
    return f"{socket.gethostname()}:{os.getpid()} on {device}"


_OPENING = threading.Lock()
_OPEN: dict[tuple[Order, str], Desk] = {}
"""At most one."""


def _clear_away() -> None:
    """Gives up what is open before the next is opened, or the device would have to hold the teachers of both."""
    import torch

    if not _OPEN:
        return
    _OPEN.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _opened(order: Order, device: str) -> Desk:
    import torch

    if order.threads is not None:
        torch.set_num_threads(order.threads)
    experiment = parse_experiment(json.loads(order.experiment), overrides=(), where="the order")
    store = FeatureStore.open(store_path(order.store), writable=True)
    if (found := _contents(store)) != order.contents:
        raise ConfigError(
            f"the feature store {order.store} as this worker sees it ({worker_name(device)}) is not the one that the "
            f"order is for, or has changed since (digest {found[:8]}, expected {order.contents[:8]}); is the path the "
            "same place on all machines?"
        )
    dataset = Dataset(experiment.dataset, Path(order.data_root))
    maker = stage.view_maker(store, reader=dataset, tiles={t.id: t for t in dataset.tiles()})
    teachers = _built(teacher_sources(experiment), student_grid(experiment), device)
    for teacher in teachers.values():
        store.expect_teacher(teacher.spec, experiment.cache.codec)
    return Desk(
        experiment=experiment,
        store=store,
        maker=maker,
        teachers=teachers,
        batch=stage.choose_batch(experiment.cache.batch, teachers, crop_px=store.recipe.crop_px),
        turn=threading.Lock(),
    )


def _built(sources: Mapping[str, TeacherSource], grid: tuple[int, int], device: str) -> dict[str, Teacher]:
    place = choose_device(device)
    return {name: build_teacher(source, student_grid=grid, device=place) for name, source in sources.items()}


def _contents(store: FeatureStore) -> str:
    teachers = {
        name: [to_dict(t.spec), t.codec, *(hashlib.sha256(a.tobytes()).hexdigest() for a in (t.mean, t.std))]
        for name, t in store.teachers.items()
    }
    rows = [store.identity, store.n_rows, [repr(s) for s in store.segments]]
    return digest({"rows": rows, "teachers": teachers, "has_pixels": store.pixels is not None})
