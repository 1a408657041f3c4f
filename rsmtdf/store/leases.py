"""Ownership in a store on object storage: the mutex and the claims of locks.py, by conditional puts.

Nothing is released there when a process dies, so an owner holds leases: small objects that it rewrites every few
seconds. Whoever sees one unchanged for a whole lease, by its own clock, takes it over with a put that succeeds on
exactly that version only; clocks of different machines are never compared. An owner that could not renew for a lease
must take what it held for lost: `still_held` says so, and is to be asked before anything is committed.

The mutex is one object. Each claim is an object of its own; who looks at them and adds one holds a second mutex for
that moment, so a claim need not wait for a process that is changing the store. Lists must be consistent, as they are
on S3, Google Cloud Storage and Azure; a server that ignores conditions is found out and refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from rsmtdf.errors import StoreBusy, StoreError
from rsmtdf.objects import ObjectPath, StorePath, Version
from rsmtdf.store.locks import LOCK_FILE, Locks, StoreLocks, runs
from rsmtdf.store.renewal import LEASE_S, PATIENCE, RENEWALS, Lease, Watch, elapsed_s, parsed

T = TypeVar("T")
log = logging.getLogger(__name__)

CLAIMS_TIMEOUT_S = 300.0
"""How long to wait for others that are claiming shards; each takes a fraction of a second, or a lease if it died."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """Somebody's claim as it was read. `shards` are (first, last) of runs; None: all there are or will be."""

    path: ObjectPath
    version: Version
    owner: str
    shards: list[tuple[int, int]] | None

    def overlaps(self, run: tuple[int, int]) -> bool:
        return self.shards is None or any(first <= run[1] and run[0] <= last for first, last in self.shards)


class ObjectLocks:
    """The locks of one store on object storage, with the interface of `StoreLocks`.

    What blocks is refused as soon as its owner is seen alive, which takes a sixth of a lease at most; what a dead
    process has left takes a lease and a quarter to be sure of.
    """

    def __init__(
        self,
        *,
        store: ObjectPath,
        folder: ObjectPath,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = elapsed_s,
    ) -> None:
        """Args: `folder` is where the locks' objects are; `clock` counts seconds from any moment on."""
        self._store = store
        # A request must not outlast the lease, so each gives up early and is made again here.
        bucket = dataclasses.replace(store.bucket, retry_s=min(store.bucket.retry_s, lease_s / 4))
        self._folder = ObjectPath(bucket, folder.key)
        self._lease_s = lease_s
        self._clock = clock
        self._watch = Watch(lease_s=lease_s, clock=clock)
        self._held: dict[str, Lease] = {}
        self._tested = False

    @contextlib.contextmanager
    def mutex(self, *, timeout_s: float) -> Iterator[None]:
        """Holds the store's mutex, waiting for it at most `timeout_s`.

        Raises:
            StoreError: another process kept it for longer; or, on leaving, it was lost.
        """
        lease = self._take_mutex("mutex", timeout_s)
        with self._holding(lease, free=b"{}"):
            yield

    @contextlib.contextmanager
    def claim(self, shards: Sequence[int]) -> Iterator[None]:
        """Owns `shards` alone, all or none.

        Raises:
            StoreBusy: one of them has another owner.
            StoreError: on leaving, they were lost.
        """

        def refusal(run: tuple[int, int] | None, owner: str) -> str:
            first, last = run or (0, 0)
            span = f"shard {first}" if first == last else f"shards {first} to {last}"
            return (
                f"{span} of feature store {self._store} are already claimed by {owner}; let it finish, "
                "fill another store and merge the two, or stop that process (its claim ends with it)"
            )

        wanted = runs(shards)
        with self._claimed(wanted, refusal) if wanted else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def all_shards(self, *, purpose: str) -> Iterator[None]:
        """Owns every shard there is or will be, which is refused while any writer holds a claim."""

        def refusal(run: tuple[int, int] | None, owner: str) -> str:
            del run
            return (
                f"cannot {purpose} feature store {self._store} while {owner} is writing to it; "
                "wait until it has finished, or stop that process"
            )

        with self._claimed(None, refusal):
            yield

    def still_held(self) -> None:
        """Renews everything that is held here, at once. To be called before a change that others shall believe.

        Raises:
            StoreError: some of it was lost, as this process could not renew it in time.
        """
        for lease in list(self._held.values()):
            if not lease.renew():
                raise self._lost()

    # Inside

    @contextlib.contextmanager
    def _claimed(
        self, wanted: list[tuple[int, int]] | None, refusal: Callable[[tuple[int, int] | None, str], str]
    ) -> Iterator[None]:
        self._require_writable()
        told = False
        while True:
            blocking = self._blocking(wanted)
            alive = [self._is_alive(claim) for _, claim in blocking]
            if True in alive:
                run, claim = blocking[alive.index(True)]
                raise StoreBusy(refusal(run, claim.owner))
            if None in alive:
                if not told:
                    told = True
                    owner = blocking[alive.index(None)][1].owner
                    log.info("%s has claimed shards of %s: seeing whether it is still alive", owner, self._store)
                time.sleep(self._lease_s / 4 / RENEWALS)
            elif (lease := self._add_claim(wanted)) is not None:
                break
        with self._holding(lease, free=None):
            yield

    def _add_claim(self, wanted: list[tuple[int, int]] | None) -> Lease | None:
        """Adds a claim if only dead ones are in its way, which are removed; None: look again."""
        moment = self._take_mutex("claims-mutex", CLAIMS_TIMEOUT_S)
        try:
            for _, claim in self._blocking(wanted):
                if self._is_alive(claim) is not False or not self._patiently(partial(self._bury, claim)):
                    return None
            lease = self._lease(self._folder / "claims" / f"{uuid.uuid4().hex}.json", shards=wanted)
            if not self._patiently(partial(lease.take, None)):
                return None
            if moment.is_held():
                return lease
            lease.release()  # somebody else may have looked and claimed meanwhile
            return None
        finally:
            moment.release(b"{}")

    def _bury(self, claim: Claim) -> bool:
        """Removes a dead claim, after making sure by a last put that its owner cannot wake up and renew it."""
        if claim.path.replace_if(b"{}", claim.version) is None:
            return False
        claim.path.unlink(missing_ok=True)
        return True

    def _blocking(self, wanted: list[tuple[int, int]] | None) -> list[tuple[tuple[int, int] | None, Claim]]:
        """(the wanted run, a claim that overlaps it) for every claim that does."""
        claims = self._patiently(self._claims)
        if wanted is None:
            return [(None, claim) for claim in claims]
        found = [(next((run for run in wanted if claim.overlaps(run)), None), claim) for claim in claims]
        return [(run, claim) for run, claim in found if run is not None]

    def _claims(self) -> list[Claim]:
        folder = self._folder / "claims"
        found = folder.bucket.parallel(self._read_claim, [folder / name for name in folder.names()])
        return [claim for claim in found if claim is not None]

    def _read_claim(self, path: ObjectPath) -> Claim | None:
        try:
            data, version = path.read_tagged()
        except FileNotFoundError:
            return None  # released since it was listed
        facts = parsed(data)
        shards = facts.get("shards")
        return Claim(path, version, str(facts.get("owner") or "another process"), shards)

    def _is_alive(self, claim: Claim) -> bool | None:
        return True if claim.path.key in self._held else self._watch.is_alive(claim.path.key, claim.version)

    def _take_mutex(self, name: str, timeout_s: float) -> Lease:
        self._require_writable()
        lease = self._lease(self._folder / name)
        start, pause = self._clock(), self._lease_s / 500
        told = name != "mutex"  # the other one is never held for long
        while True:
            owner, free, version = self._patiently(partial(self._look, lease))
            if free and self._patiently(partial(lease.take, version)):
                self._require_conditions(lease)
                return lease
            if not told and owner is not None:
                log.info(
                    "waiting for %s, which is changing the feature store %s (if it has died, for about 40 s)",
                    owner,
                    self._store,
                )
                told = True
            if self._clock() - start > timeout_s:
                raise StoreError(
                    f"feature store {self._store} is being changed by {owner or 'another process'} for more than "
                    f"{timeout_s:g} s; wait until it has finished, or stop that process (its lock ends with it, "
                    f"{PATIENCE * self._lease_s:g} s later)"
                )
            time.sleep(pause)
            pause = min(2 * pause, self._lease_s / 20)

    def _look(self, lease: Lease) -> tuple[str | None, bool, Version | None]:
        """(owner, whether it may be taken, version) of the mutex that `lease` is to hold."""
        try:
            data, version = lease.path.read_tagged()
        except FileNotFoundError:
            return None, True, None
        facts = parsed(data)
        owner = facts.get("owner")
        # It is ours where a put arrived after all.
        free = owner is None or facts.get("key") == lease.key or self._watch.is_alive(lease.path.key, version) is False
        return owner, free, version

    def _lease(self, path: ObjectPath, **facts: Any) -> Lease:
        return Lease(path, lease_s=self._lease_s, clock=self._clock, facts=facts)

    @contextlib.contextmanager
    def _holding(self, lease: Lease, *, free: bytes | None) -> Iterator[None]:
        self._held[lease.path.key] = lease
        try:
            yield
            if not (lease.is_held() or lease.renew()):
                raise self._lost()
        finally:
            del self._held[lease.path.key]
            lease.release(free)

    def _lost(self) -> StoreError:
        return StoreError(
            f"this process could not renew its locks on feature store {self._store} for {self._lease_s:g} s (it was "
            "stopped, or cut off from the server), and another may have them now; what it had not committed is void. "
            "Run the same command again"
        )

    def _patiently(self, work: Callable[[], T]) -> T:
        """`work`, again while the server cannot be reached, for as long as any request to this store may take."""
        start = self._clock()
        while True:
            try:
                return work()
            except OSError as error:
                passing = isinstance(error, (ConnectionError, TimeoutError)) or error.errno == errno.EIO
                if passing and self._clock() - start < self._store.bucket.retry_s:
                    time.sleep(self._lease_s / 50)
                    continue
                raise StoreError(
                    f"cannot lock feature store {self._store}: {error.strerror} ({error.filename}); check the "
                    "address, the credentials and their rights to write and to list, and run the same command again"
                ) from error

    def _require_writable(self) -> None:
        if self._store.bucket.is_web:
            raise StoreError(
                f"feature store {self._store} is behind a web server, which is for reading only; "
                "change it where it lies, by its s3://, gs:// or az:// address"
            )

    def _require_conditions(self, lease: Lease) -> None:
        """Makes sure, once, that the server honours conditions: one that ignores them would let everybody in."""
        if self._tested:
            return

        def ignored() -> bool:
            never = Version('"0"', "1" if lease.is_numbered else None)
            return lease.path.create(b"{}") is not None or lease.path.replace_if(b"{}", never) is not None

        if self._patiently(ignored):
            lease.release(b"{}")
            raise StoreError(
                f"the server of feature store {self._store} ignores the conditions If-None-Match and If-Match of a "
                "put, so its writers could not exclude each other; write the store on a disk and copy it there"
            )
        self._tested = True


def locks_of(path: StorePath) -> Locks:
    """The locks of the store at `path`, which need nothing of it to be sound."""
    if isinstance(path, ObjectPath):
        return ObjectLocks(store=path, folder=path / "provenance")
    return StoreLocks(store=path, file=path / LOCK_FILE)


def for_writing(path: StorePath) -> StorePath:
    """`path`, where a put on an object store is given up well before the lease of its owner can be taken over."""
    if not isinstance(path, ObjectPath):
        return path
    bucket = dataclasses.replace(path.bucket, retry_s=min(path.bucket.retry_s, LEASE_S / 2))
    return dataclasses.replace(path, bucket=bucket)
