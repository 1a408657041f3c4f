"""A lease on one object: what an owner renews, and what others conclude from watching it. See leases.py."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from rsmtdf.objects import ObjectPath, Version

log = logging.getLogger(__name__)

LEASE_S = 30.0
"""An owner that is silent for this long has lost what it held."""
RENEWALS = 6
"""Per lease: a few of them may fail before the lease does."""
PATIENCE = 1.25
"""Leases that others wait before they take over: more than an owner's own, as clocks run at slightly other rates."""


def elapsed_s() -> float:
    """Seconds since some moment; they go on while the machine sleeps, where the system has such a clock."""
    boot: int | None = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


class Lease:
    """One object that this process owns from `take` to `release`, renewed by a thread."""

    def __init__(self, path: ObjectPath, *, lease_s: float, clock: Callable[[], float], facts: dict[str, Any]) -> None:
        """Args: `facts` are JSON data that others may read in the object."""
        self.path = path
        self._lease_s = lease_s
        self._clock = clock
        # No other lease has this key, and no two renewals this beat, so no two versions are equal.
        self._text = {"owner": f"process {os.getpid()} on {socket.gethostname()}", "key": uuid.uuid4().hex, **facts}
        self._beat = 0
        self._version: Version | None = None
        self._renewed_at = 0.0
        self._lost = False
        self._released = threading.Event()
        self._lock = threading.Lock()

    @property
    def key(self) -> str:
        return str(self._text["key"])

    @property
    def is_numbered(self) -> bool:
        """Whether this server tells versions by numbers."""
        return self._version is not None and self._version.number is not None

    def take(self, found: Version | None) -> bool:
        """Writes the object where there is none (None), or over the version that was found; whether it is ours now.

        Raises:
            OSError: the server cannot be reached.
        """
        if not self._write(found):
            return False
        threading.Thread(target=self._renew_till_released, name="rsmtdf-lease", daemon=True).start()
        return True

    def is_held(self) -> bool:
        """Whether nobody else can have it, by this process's clock."""
        return not self._lost and self._clock() - self._renewed_at < self._lease_s

    def renew(self) -> bool:
        """Renews it now; whether it is still held.

        Late is not lost: a put on its own version succeeds as long as nobody has taken over. A server that cannot be
        reached makes it lost when it runs out.
        """
        with self._lock:
            if not self._lost and not self._released.is_set():
                with contextlib.suppress(OSError):
                    self._lost = not self._write(self._version)
            self._lost = self._lost or not self.is_held()
            return not self._lost

    def release(self, text: bytes | None = None) -> None:
        """Lets go of it: removes the object, or puts `text` in its place."""
        self._released.set()
        with self._lock:
            try:
                if text is None:
                    self.path.unlink(missing_ok=True)  # nobody else's has this name
                elif self._version is not None and self.path.replace_if(text, self._version) is None:
                    # A renewal whose answer was lost has made another version of it.
                    version = self._own_version()
                    if version is not None:
                        self.path.replace_if(text, version)
            except OSError as error:
                log.warning("%s could not be released (%s); it ends in %g s", self.path, error.strerror, self._lease_s)

    def _write(self, found: Version | None) -> bool:
        start = self._clock()  # the time of the request, not of the answer: others may have seen it at once
        self._beat += 1
        text = json.dumps({**self._text, "beat": self._beat}).encode()
        version: Version | None = None
        with contextlib.suppress(ConnectionError, TimeoutError):  # it may have arrived: ask
            version = self.path.create(text) if found is None else self.path.replace_if(text, found)
        self._version = version or self._own_version()
        if self._version is None:
            return False
        self._renewed_at = start
        return self.is_held()

    def _own_version(self) -> Version | None:
        """The version that is there, if it is ours: a repeated put does not succeed on what the first has written."""
        try:
            data, version = self.path.read_tagged()
        except FileNotFoundError:
            return None
        return version if parsed(data).get("key") == self.key else None

    def _renew_till_released(self) -> None:
        while not self._released.wait(self._lease_s / RENEWALS):
            if not self.renew():
                log.warning("%s was lost: it could not be renewed for %g s", self.path, self._lease_s)
                return


class Watch:
    """What is known about other owners' leases: alive, dead or not known yet."""

    def __init__(self, *, lease_s: float, clock: Callable[[], float]) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._seen: dict[str, tuple[Version, float, bool]] = {}
        self._lock = threading.Lock()

    def is_alive(self, name: str, version: Version) -> bool | None:
        """Whether the owner of the object `name`, just read as `version`, lives; None: look again later."""
        now = self._clock()
        with self._lock:
            before, since, renewed = self._seen.get(name, (None, now, False))
            if before != version:
                self._seen[name] = (version, now, before is not None)
                return True if before is not None else None
            if now - since >= PATIENCE * self._lease_s:
                return False
            return True if renewed and now - since < self._lease_s else None


def parsed(data: bytes) -> dict[str, Any]:
    """The facts in a lock's object; none if it is no JSON object."""
    try:
        facts = json.loads(data)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}
