"""Crews of Dask workers: a running scheduler, workers of this machine, one per GPU, or a batch system's jobs.

The only module that imports dask, and only where a cluster is opened. Tasks go through `Client.submit`, unpinned and
impure: the scheduler moves a dead worker's tasks to another one by itself, and gives up after three deaths
(`distributed.scheduler.allowed-failures`); `spread` takes over there. What crosses the network is the order (a few
kilobytes of text), unit numbers, and outcomes. Workers need the same rsmtdf, and reach the store and the images under
the same paths.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from rsmtdf.errors import ConfigError, WorkerError
from rsmtdf.signals import StopFlag
from rsmtdf.stages.scaleout.crew import Units, Work, WorkerLost, run_here, told_to_stop

log = logging.getLogger(__name__)

THREADS = 2
"""Tasks at a time in a worker: one makes views while the other has the device."""
CONNECT_S = 5.0
_LOOK_S = 2.0
_PATIENT_S = 30.0
_STOP_S = 3.0


@contextlib.contextmanager
def running_scheduler(
    address: str, *, device: str, resources: Mapping[str, float] | None = None, timeout_s: float = CONNECT_S
) -> Iterator[DaskCrew]:
    """The workers of the scheduler at `address` (tcp://host:port), which goes on afterwards.

    Raises:
        WorkerError: nobody answers within `timeout_s`.
    """
    with _quiet():
        yield from _scheduler_crew(address, device=device, resources=resources, timeout_s=timeout_s)


def _scheduler_crew(
    address: str, *, device: str, resources: Mapping[str, float] | None, timeout_s: float
) -> Iterator[DaskCrew]:
    try:
        client = _client(address, timeout=timeout_s)
    except (OSError, ValueError, TypeError) as error:
        raise WorkerError(
            f"no Dask scheduler answers at {address} within {timeout_s:g} s ({error}); is it running (dask scheduler), "
            "and can this machine reach it?"
        ) from error
    with contextlib.closing(client):
        yield DaskCrew(client, name=f"Dask at {address}", device=device, resources=resources)


def require(scheduler: str) -> None:
    """Passes if `scheduler` (an address, `cuda` or a batch system's class) can be used from here.

    Raises:
        WorkerError: nobody answers at the address.
        ConfigError: a package is missing.
    """
    if "://" in scheduler:
        with running_scheduler(scheduler, device="cpu"):
            return
    elif scheduler == "cuda":
        _cuda()
    else:
        _jobs(scheduler)


@contextlib.contextmanager
def local_cluster(workers: int, *, device: str) -> Iterator[DaskCrew]:
    """`workers` Dask workers of this machine, each a process under a nanny that replaces it when it dies."""
    import distributed

    # Memory of pinned buffers and decoded scenes is not Dask's to count: it would pause and kill workers for it. What a
    # task raises comes back and is said once, so workers need not print it with a traceback.
    with _opened(
        distributed.LocalCluster,
        n_workers=workers,
        threads_per_worker=THREADS,
        processes=True,
        memory_limit=0,
        dashboard_address=":0",
        silence_logs=logging.CRITICAL,
    ) as cluster:
        yield from _crew_of(cluster, name=f"{workers} Dask workers on this machine", device=device, resources=None)


@contextlib.contextmanager
def cuda_cluster() -> Iterator[DaskCrew]:
    """One Dask worker per GPU of this machine, by dask-cuda, each with its own first device.

    Raises:
        ConfigError: dask-cuda is not installed.
    """
    with _opened(
        _cuda(), threads_per_worker=THREADS, memory_limit=None, device_memory_limit=None, dashboard_address=":0"
    ) as cluster:
        yield from _crew_of(cluster, name="Dask workers, one per GPU", device="cuda:0", resources=None)


@contextlib.contextmanager
def job_cluster(
    kind: str,
    *,
    options: Mapping[str, Any],
    jobs: int | tuple[int, int],
    device: str,
    resources: Mapping[str, float] | None = None,
) -> Iterator[DaskCrew]:
    """Jobs of a batch system as workers, by dask-jobqueue.

    Args:
        kind: its class (SLURMCluster, PBSCluster, ...).
        options: of that class.
        jobs: so many, or from so many to so many, as there is work.
        device: that a worker computes on.
        resources: Dask resources that every task takes.

    Raises:
        ConfigError: dask-jobqueue is not installed, or does not like the options.
    """
    with _opened(_jobs(kind), **options) as cluster:
        if isinstance(jobs, int):
            cluster.scale(jobs=jobs)
        else:
            cluster.adapt(minimum_jobs=jobs[0], maximum_jobs=jobs[1])
        yield from _crew_of(cluster, name=f"Dask workers in {kind} jobs", device=device, resources=resources)


class DaskCrew:
    """The workers of a Dask client; see the functions above."""

    def __init__(self, client: Any, *, name: str, device: str, resources: Mapping[str, float] | None) -> None:
        self.name = name
        self.deaths = 0
        self.moved = 0
        self.most_workers = 0
        self._client, self._device, self._resources = client, device, dict(resources or {}) or None
        self._run = uuid.uuid4().hex
        self._n = 0
        self._tasks: dict[Future[Any], Any] = {}
        self._threads: Mapping[str, int] = {}
        self._looked_at = self._seen_at = time.monotonic() - _LOOK_S
        self._is_ending = False
        client.subscribe_topic("all", self._hear)

    def slots(self) -> int:
        """A task for each thread, and one ahead for each worker; two where there is none yet, to call for some."""
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_S:
            try:
                self._threads = self._client.nthreads()
            except (OSError, RuntimeError) as error:
                raise WorkerError(
                    f"the Dask scheduler cannot be reached any more ({error}); what was committed is kept, run the "
                    "same command again"
                ) from error
            self._looked_at = time.monotonic()
            self.most_workers = max(self.most_workers, len(self._threads))
            if self._threads:
                self._seen_at = now
            elif now - self._seen_at > _PATIENT_S:
                self._seen_at = now
                log.warning("%s: still waiting for a first worker", self.name)
        return max(sum(self._threads.values()) + len(self._threads), 2)

    def submit(self, work: Work, units: Units) -> Future[Any]:
        self._n += 1
        outer: Future[Any] = Future()
        inner = self._client.submit(
            run_here,
            work,
            units,
            self._device,
            self._run,
            key=f"rsmtdf-{self._run}-{self._n}",
            pure=False,
            resources=self._resources,
        )
        self._tasks[outer] = inner  # Dask forgets a task whose future nobody holds
        inner.add_done_callback(functools.partial(self._hand_over, outer))
        return outer

    def stop(self) -> None:
        """Raises the flag in all workers at once; no worker polls anything."""
        self._is_ending = True
        told = threading.Thread(target=self._tell, daemon=True, name="stop")
        told.start()
        told.join(_STOP_S)

    def _tell(self) -> None:
        with contextlib.suppress(Exception):  # a scheduler that is gone has taken the tasks with it
            self._client.run(_raise_flag, self._run, on_error="ignore")

    def _hand_over(self, outer: Future[Any], inner: Any) -> None:
        """Called in a thread of the client when a task has ended."""
        from distributed.scheduler import KilledWorker

        error: BaseException | None = None
        result = None
        try:
            result = inner.result()
        except KilledWorker as killed:
            error = WorkerLost(str(killed).partition(" Inspecting")[0])
        except Exception as raised:  # noqa: BLE001 (raised by whoever asks for the result)
            is_lost = inner.status in ("cancelled", "lost")
            error = WorkerLost(f"the scheduler has lost the task: {raised}") if is_lost else raised
        self._tasks.pop(outer, None)
        if not outer.set_running_or_notify_cancel():
            return
        if error is not None:
            outer.set_exception(error)
        else:
            outer.set_result(result)

    def _hear(self, event: tuple[float, Any]) -> None:
        """What the scheduler tells of workers."""
        _, message = event
        if isinstance(message, Mapping) and message.get("action") == "remove-worker" and not self._is_ending:
            if message.get("expected"):
                return  # retired, or scaled down
            mine = [key for key in message.get("processing-tasks", ()) if self._run in str(key)]
            if not mine:
                return  # whoever else uses this scheduler will know
            self.deaths += 1
            self.moved += len(mine)
            log.warning("the worker %s was lost with %d tasks", message.get("worker", "?"), len(mine))


def _crew_of(cluster: Any, *, name: str, device: str, resources: Mapping[str, float] | None) -> Iterator[DaskCrew]:
    with contextlib.closing(_client(cluster)) as client:
        crew = DaskCrew(client, name=name, device=device, resources=resources)
        yield crew
        crew._is_ending = True


def _client(where: Any, **options: Any) -> Any:
    import distributed

    made: Any = distributed.Client
    return made(where, set_as_default=False, **options)


@contextlib.contextmanager
def _opened(kind: Any, **options: Any) -> Iterator[Any]:
    with _quiet():
        try:
            cluster = kind(**options)
        except (TypeError, ValueError, OSError, RuntimeError) as error:
            raise ConfigError(f"the cluster cannot be started ({error}); options given: {options}") from error
        try:
            yield cluster
        finally:
            cluster.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Dask's own lines of this process are not shown: it tells of each start and end of a worker, as a warning of each
    one that dies or is slow to end, and with a traceback of messages that a client which is closing has not fetched.
    What matters of it `DaskCrew` and the summary say in words of stage 1.
    """
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]  # those that Dask sets up
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _cuda() -> Any:
    return _optional("dask_cuda", "LocalCUDACluster", instead="--devices all needs nothing more than CUDA")


def _jobs(kind: str) -> Any:
    return _optional("dask_jobqueue", kind, instead="--shard-range i/n in a job array needs no scheduler")


def _optional(module: str, name: str, *, instead: str) -> Any:
    """A class of a package that only some need."""
    package = module.replace("_", "-")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"this needs {package}, which is not installed: pip install {package}; {instead}") from error
    if not hasattr(found, name):
        known = ", ".join(n for n in vars(found) if n.endswith("Cluster"))
        raise ConfigError(f"{package} has no {name!r}; it has: {known}")
    return getattr(found, name)


def _raise_flag(run: str) -> None:
    """Runs in a worker, beside its tasks."""
    flag: StopFlag = told_to_stop(run)
    flag.signum = 15
