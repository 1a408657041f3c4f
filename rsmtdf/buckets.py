"""The connection to a bucket, a container or a web server: obstore's client, its retries, and its errors as OSErrors.

obstore is imported when the first client is made, so nothing else needs it installed. Its threads do not survive a
fork: a child that used them would wait for ever, so it is refused instead.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rsmtdf.errors import StoreError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S = 60.0
"""After this long no request is tried again."""
SILENCE_S = 30.0
"""A connection without a byte for this long has stalled. A part of an upload must get through in that time."""
LONGEST_BACKOFF_S = 5.0
SAID_AFTER_S = 15.0
"""A request that takes longer is told of: retries are the client's own affair, and silent."""
PARALLEL_READS = 8
"""Requests of one read at a time: enough to hide the round trips, few enough for many reading threads."""


@dataclass(frozen=True)
class Bucket:
    """A bucket, container or web server. Its clients are made when first used, once per process; they keep sockets.

    Attributes:
        scheme: s3, gs, az, abfs, abfss, https or http.
        authority: what stands between `//` and the next slash.
        retry_s: no request is tried again after this long.
        said_after_s: a request that takes longer is logged.
    """

    scheme: str
    authority: str
    retry_s: float = RETRY_S
    said_after_s: float = SAID_AFTER_S
    _clients: dict[str, ObjectStore] = field(default_factory=dict, init=False, repr=False, compare=False)
    _pools: list[ThreadPoolExecutor] = field(default_factory=list, init=False, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __deepcopy__(self, memo: object) -> Bucket:
        return self  # clients cannot be copied, and need not be

    def __reduce__(self) -> tuple[type[Bucket], tuple[str, str, float, float]]:
        return Bucket, (self.scheme, self.authority, self.retry_s, self.said_after_s)

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def is_web(self) -> bool:
        """A plain web server: read-only, and mostly without lists of its files."""
        return self.scheme in ("https", "http")

    def client(self, prefix: str = "") -> ObjectStore:
        """obstore's client for what is below `prefix`; shared between threads.

        Raises:
            StoreError: obstore is missing, or this is a fork of a process that used it.
            OSError: the settings in the environment are wrong or incomplete.
        """
        if _first_process() != os.getpid():
            raise StoreError(
                f"{self.url} cannot be used in a forked process after its parent has used object storage: "
                "the connections' threads are lost; start processes by 'forkserver' or 'spawn'"
            )
        with self._lock:
            if prefix not in self._clients:
                self._clients[prefix] = self._connect(prefix)
            return self._clients[prefix]

    def ask(self, url: str, work: Callable[[ObjectStore], T], *, repeat: bool = True) -> T:
        """`work` with the client, its errors as OSErrors about `url`.

        With `repeat` it is done again when the connection was cut: the client repeats requests, but not always what
        had begun to answer. A call then takes 2 `retry_s` at most, plus one `SILENCE_S`.
        """
        start, pause = time.monotonic(), 0.1
        client = self.client()
        with self._told_if_slow(url):
            while True:
                try:
                    with as_os_errors(url):
                        return work(client)
                except (ConnectionError, TimeoutError):
                    if not repeat or time.monotonic() - start > self.retry_s:
                        raise
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_BACKOFF_S)

    def parallel(self, work: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
        """`work` of each item, several at a time, in order."""
        if len(items) < 2:
            return [work(item) for item in items]
        with self._lock:
            if not self._pools:
                self._pools.append(ThreadPoolExecutor(PARALLEL_READS, thread_name_prefix="rsmtdf-objects"))
        return list(self._pools[0].map(work, items))

    @contextlib.contextmanager
    def _told_if_slow(self, url: str) -> Iterator[None]:
        """Says once that a request is slow; nobody should have to guess whether a program hangs."""

        def tell() -> None:
            log.warning(
                "%s: not finished after %g s; the connection is slow, or cut. Trying for %g s more at most",
                url,
                self.said_after_s,
                2 * self.retry_s + SILENCE_S - self.said_after_s,
            )

        timer = threading.Timer(self.said_after_s, tell)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _connect(self, prefix: str) -> ObjectStore:
        try:
            import obstore.store
        except ImportError as error:
            raise StoreError(
                f"{self.url} is on object storage, which needs one more package: pip install 'rsmtdf[cloud]'"
            ) from error
        retry: RetryConfig = {
            "backoff": {
                "init_backoff": timedelta(seconds=0.1),
                "max_backoff": timedelta(seconds=LONGEST_BACKOFF_S),
                "base": 2,
            },
            "max_retries": 1000,  # time is the limit
            "retry_timeout": timedelta(seconds=self.retry_s),
        }
        # As configuration and not as client options, which would discard the environment's AWS_ALLOW_HTTP and proxies.
        limits: dict[str, Any] = {
            "connect_timeout": "5 seconds",
            "read_timeout": f"{round(1000 * min(SILENCE_S, max(self.retry_s / 2, 1)))} ms",
            "timeout": "10 minutes",
        }
        given: dict[str, Any] = {"config": limits, "retry_config": retry, **({"prefix": prefix} if prefix else {})}
        with as_os_errors(self.url):
            match self.scheme:
                case "https" | "http":
                    url = f"{self.url}/{urllib.parse.quote(prefix)}"
                    options: ClientConfig = {**limits, "allow_http": self.scheme == "http"}  # type: ignore[typeddict-item]
                    return obstore.store.HTTPStore(url, retry_config=retry, client_options=options)
                case "s3":
                    return obstore.store.S3Store(self.authority, **given)
                case "gs":
                    return obstore.store.GCSStore(self.authority, **given)
                case _:
                    container, _, host = self.authority.partition("@")
                    if host:
                        limits["account_name"] = host.partition(".")[0]
                    return obstore.store.AzureStore(container, **given)


@functools.cache
def _first_process() -> int:
    """The process that first used object storage: a fork inherits the answer, but not obstore's threads."""
    return os.getpid()


@contextlib.contextmanager
def as_os_errors(url: str) -> Iterator[None]:
    """Turns obstore's errors into OSErrors with errno, a reason of one line, and `url` as the file name."""
    import obstore.exceptions as theirs

    try:
        yield
    except FileNotFoundError as error:
        # An upload in parts whose end was not heard of, and is no more: the object is to be sent again.
        number = errno.ECONNABORTED if "NoSuchUpload" in str(error) else errno.ENOENT
        raise OSError(number, _reason(error), url) from None
    except (theirs.PermissionDeniedError, theirs.UnauthenticatedError) as error:
        raise OSError(errno.EACCES, _reason(error), url) from None
    except theirs.NotSupportedError as error:
        raise OSError(errno.ENOTSUP, _reason(error), url) from None
    except theirs.BaseError as error:
        raise OSError(_number(str(error)), _reason(error), url) from None


def _number(text: str) -> int:
    """The errno of an error that obstore has no class for; `text` tells its causes in Rust's notation."""
    status = re.search(r"status code: (\d+)", text)
    if status is not None and status[1] == "404":
        return errno.ENOENT
    if (status is not None and status[1] in ("401", "403")) or "TokenRequest" in text or "redential" in text:
        return errno.EACCES
    if "kind: Timeout" in text or "TimedOut" in text:
        return errno.ETIMEDOUT
    if "HttpError" in text or "reqwest::Error" in text:
        return errno.ECONNABORTED
    return errno.EIO


def _reason(error: Exception) -> str:
    """One line without the answer's body, and without what follows the `?` of an address: it can hold a signature."""
    text, _, causes = str(error).partition("\n\nDebug source")
    line = " ".join(re.sub(r":?\s*<[?!]?\w.*", "", text, flags=re.DOTALL).split()).rstrip(": ")
    if isinstance(error, FileNotFoundError):
        line = "no such object"
    code = re.search(r"<Code>(\w+)</Code>", text) or re.search(r'message: "([^"]*)"', causes)
    return re.sub(r"\?\S+", "?…", line)[:500] + (f" ({code[1]})" if code else "")
