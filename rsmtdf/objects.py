"""Stores on object storage: `ObjectPath` is the part of pathlib's interface that means something there.

An object is replaced whole or not at all, by one put or by a multipart upload; folders are nothing but prefixes, so
none is ever made and none is left empty. The library underneath is obstore (`pip install rsmtdf[cloud]`).

What can stand where a store's path is asked for, and what is read from the environment for it:

- `s3://bucket/path` (or `s3a://`): AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION; for another
  server AWS_ENDPOINT_URL, and AWS_ALLOW_HTTP=true where it has no TLS; AWS_SKIP_SIGNATURE=true for public buckets;
  AWS_ROLE_ARN with AWS_WEB_IDENTITY_TOKEN_FILE; otherwise the container's or the instance's role. Profiles in ~/.aws
  are not read: `eval "$(aws configure export-credentials --format env)"` exports one.
- `gs://bucket/path`: GOOGLE_SERVICE_ACCOUNT, GOOGLE_APPLICATION_CREDENTIALS, gcloud's application default credentials
  or the instance's account; GOOGLE_SKIP_SIGNATURE=true for public buckets.
- `az://container/path`, `abfs://container@account.dfs.core.windows.net/path`: AZURE_STORAGE_ACCOUNT_NAME, and
  AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, or AZURE_CLIENT_ID, AZURE_CLIENT_SECRET, AZURE_TENANT_ID.
- `https://host/path`: for reading only, and without lists: `names` and `walk` fail.

A request that meets a 5xx answer, a refused or cut connection or a stall is tried again, after 0.1 s at first and 5 s
at most, until a minute has passed; a connection that is silent for 30 s has stalled. In the worst case, answers cut in
the middle after a minute of errors, a call takes two and a half minutes. A short read is always an error. Uploads ended
by kill -9 can leave invisible parts, which are charged for: give the bucket a lifecycle rule that aborts incomplete
multipart uploads.
"""

from __future__ import annotations

import contextlib
import errno
import re
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rsmtdf.buckets import RETRY_S, Bucket
from rsmtdf.errors import StoreError

if TYPE_CHECKING:
    import zarr.storage
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

T = TypeVar("T")
Data = bytes | bytearray | memoryview

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "https", "http")
GAP_BYTES = 1 << 20
"""Ranges closer than this are read by one request: a round trip costs more than the bytes between them."""
REQUEST_BYTES = 16 << 20
"""Ranges are not joined beyond this; several requests run side by side."""
PART_BYTES = 8 << 20
"""Of an upload; four at a time, so that a line of 1 MB/s still gets each through before it counts as stalled."""
PARALLEL_PARTS = 4


class Version(NamedTuple):
    """Which version of an object it is: equal if and only if nobody has written it in between."""

    e_tag: str | None
    number: str | None


@dataclass(frozen=True)
class ObjectPath:
    """An object, or the prefix of many. Hashable, picklable, shared between threads; use `store_path` to make one.

    Everything that talks to the server raises OSErrors as files do: FileNotFoundError, PermissionError,
    ConnectionError, TimeoutError, otherwise EIO, with the URL as `filename`; and StoreError where obstore is missing.

    Attributes:
        bucket: where it is.
        key: below the bucket, without slashes at its ends; '' for the bucket itself.
    """

    bucket: Bucket
    key: str

    def __post_init__(self) -> None:
        if any(part in ("", ".", "..") or not part.isprintable() for part in self.key.split("/") if self.key):
            raise StoreError(f"{self.bucket.url}/{self.key!r} is no name of an object: '', '.' or '..' between slashes")

    def __str__(self) -> str:
        key = urllib.parse.quote(self.key) if self.bucket.is_web else self.key
        return f"{self.bucket.url}/{key}".rstrip("/")

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.bucket, self.key.rpartition("/")[0])

    @property
    def parents(self) -> tuple[ObjectPath, ...]:
        """From the nearest to the bucket."""
        return () if not self.key else (self.parent, *self.parent.parents)

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def relative_to(self, other: ObjectPath) -> str:
        """The key below `other`.

        Raises:
            ValueError: it is not below it.
        """
        prefix = other.key + "/" if other.key else ""
        if self.bucket != other.bucket or not self.key.startswith(prefix):
            raise ValueError(f"{self} is not below {other}")
        return self.key[len(prefix) :]

    # Reading

    def read_bytes(self) -> bytes:
        """The whole object."""
        return self.read_tagged()[0]

    def read_tagged(self) -> tuple[bytes, Version]:
        """The whole object and its version, for `replace_if`."""

        def work(client: ObjectStore) -> tuple[bytes, ObjectMeta]:
            result = client.get(self.key)
            return bytes(result.bytes()), result.meta

        data, meta = self._ask(work)
        self._check_length(data, meta["size"])
        return data, Version(meta["e_tag"], meta["version"])

    def read_tail(self, length: int) -> tuple[bytes, int]:
        """The last `length` bytes, or all of a shorter object, and the size of the object."""

        def work(client: ObjectStore) -> tuple[bytes, int]:
            result = client.get(self.key, options={"range": {"suffix": length}})
            return bytes(result.bytes()), result.meta["size"]

        try:
            data, size = self._ask(work)
        except OSError as error:
            # Nothing is no range of an empty object, and Azure has no ranges from the end.
            if error.errno not in (errno.EIO, errno.ENOTSUP):
                raise
            size = self.size()
            if size and error.errno == errno.EIO:
                raise
            start = max(0, size - length)
            data = bytes(self.read_ranges([start], [size - start])[0])
        self._check_length(data, min(length, size))
        return data, size

    def read_ranges(self, starts: Sequence[int], lengths: Sequence[int]) -> list[memoryview]:
        """The bytes of each range, in order. Ranges near each other are read by one request, others side by side.

        Raises:
            OSError: one of them ends after the end of the object (EIO), and what every method raises.
        """
        groups = _requests(starts, lengths)
        out = [memoryview(b"")] * len(starts)
        for (start, _, members), data in zip(groups, self.bucket.parallel(self._read_request, groups), strict=True):
            for k in members:
                out[k] = data[starts[k] - start : starts[k] - start + lengths[k]]
        return out

    def _read_request(self, request: tuple[int, int, list[int]]) -> memoryview:
        start, stop, _ = request
        data = memoryview(self._ask(lambda client: client.get_range(self.key, start=start, end=stop)))
        self._check_length(data, stop - start)
        return data

    def size(self) -> int:
        """Bytes of the object."""
        return self._ask(lambda client: client.head(self.key)["size"])

    def is_file(self) -> bool:
        if not self.key:
            return False
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there is an object below it; never on web servers, which do not tell."""
        return not self.bucket.is_web and self._list(lambda client: next(self._below(client), None)) is not None

    def exists(self) -> bool:
        """Whether there is an object, or one below it."""
        return self.is_file() or self.is_dir()

    def names(self) -> list[str]:
        """Names of the objects and prefixes right below it, sorted; none if there is nothing."""
        found = self._list(lambda client: client.list_with_delimiter(self.key or None))
        keys = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        return sorted({key.rpartition("/")[2] for key in keys if key != self.key})

    def walk(self) -> list[tuple[str, int]]:
        """(key relative to this one, bytes) of every object below it."""
        return self._list(lambda client: list(self._below(client)))

    def _below(self, client: ObjectStore) -> Iterator[tuple[str, int]]:
        prefix = f"{self.key}/" if self.key else ""
        for batch in client.list(self.key or None, chunk_size=1000):
            for meta in batch:
                # Its own name with a slash at the end is what web consoles make of a new folder.
                if meta["path"].startswith(prefix):
                    yield meta["path"][len(prefix) :], meta["size"]

    # Writing

    def write_bytes(self, data: Data) -> None:
        """Makes or replaces the object, whole or not at all."""
        self._write(lambda c: c.put(self.key, _bytes(data), chunk_size=PART_BYTES, max_concurrency=PARALLEL_PARTS))

    def create(self, data: Data) -> Version | None:
        """Makes the object if there is none; None if there is one, whoever has made it.

        After a ConnectionError it may be there or not. After a lost answer the repeated request finds the object of
        the first and returns None: who needs to know that it was them puts something into it that nobody else would.
        """
        return self._put_if(data, "create")

    def replace_if(self, data: Data, version: Version) -> Version | None:
        """Replaces the object if it still is of `version`; None if it is another or gone. See `create` for doubts."""
        tags = {"e_tag": version.e_tag, "version": version.number}
        try:
            return self._put_if(data, {k: v for k, v in tags.items() if v is not None})
        except FileNotFoundError:
            self.parent.names()  # which raises it again if it is the bucket that is missing
            return None

    def _put_if(self, data: Data, mode: Any) -> Version | None:
        def work(client: ObjectStore) -> Version | None:
            from obstore.exceptions import AlreadyExistsError, PreconditionError

            try:
                made = client.put(self.key, _bytes(data), mode=mode)
            except (AlreadyExistsError, PreconditionError):
                return None
            return Version(made["e_tag"], made["version"])

        return self._write(work, repeat=False)

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Removes the object.

        Raises:
            FileNotFoundError: there is none, without `missing_ok`.
        """
        if not missing_ok:
            self.size()
        with contextlib.suppress(FileNotFoundError):
            self._write(lambda client: client.delete(self.key))

    def remove_tree(self) -> None:
        """Removes every object below it, a thousand by one request where the server can."""
        keys = [f"{self.key}/{key}".lstrip("/") for key, _ in self.walk()]
        for k in range(0, len(keys), 1000):
            self._remove(keys[k : k + 1000])

    def _remove(self, keys: list[str]) -> None:
        try:
            self._write(lambda client: client.delete(keys))
        except FileNotFoundError:  # somebody else has removed one, and the rest may be there
            for key in keys:
                ObjectPath(self.bucket, key).unlink(missing_ok=True)

    # For others

    def zarr_store(self, *, read_only: bool = True) -> zarr.storage.ObjectStore[ObjectStore]:
        """What zarr-python opens."""
        import zarr.storage

        return zarr.storage.ObjectStore(self.bucket.client(self.key), read_only=read_only)

    def _ask(self, work: Callable[[ObjectStore], T], *, repeat: bool = True) -> T:
        return self.bucket.ask(str(self), work, repeat=repeat)

    def _list(self, work: Callable[[ObjectStore], T]) -> T:
        if self.bucket.is_web:
            raise OSError(errno.ENOTSUP, "a web server does not list its files", str(self))
        return self._ask(work)

    def _write(self, work: Callable[[ObjectStore], T], *, repeat: bool = True) -> T:
        if self.bucket.is_web:
            raise OSError(errno.EROFS, "web servers are for reading only; write to s3://, gs:// or az://", str(self))
        return self._ask(work, repeat=repeat)

    def _check_length(self, data: bytes | memoryview, expected: int) -> None:
        if len(data) != expected:
            raise OSError(errno.EIO, f"expected {expected} bytes, found {len(data)}", str(self))


StorePath = Path | ObjectPath
"""Where a store can be."""


def store_path(text: str | StorePath, *, retry_s: float = RETRY_S) -> StorePath:
    """An `ObjectPath` for a URL of one of `SCHEMES`, otherwise a `Path`; a path is returned as it is.

    A `Path` that was made of a URL, and has lost one of its slashes, is understood too.

    Raises:
        StoreError: a URL of another scheme, without a bucket or host, or with credentials in it.
    """
    if isinstance(text, ObjectPath):
        return text
    found = re.fullmatch(
        r"([a-z][a-z0-9+]+):(//|/)([^/]*)/*(.*)", text.as_posix() if isinstance(text, Path) else text, re.DOTALL
    )
    if found is None or (found[2] == "/" and found[1] not in SCHEMES):
        return Path(text)
    scheme, authority, key = found[1], found[3], found[4].rstrip("/")
    if scheme not in SCHEMES:
        raise StoreError(f"{scheme}:// is no place for a feature store; use a path on a disk or {_schemes()}")
    if not authority:
        raise StoreError(
            f"{found[0]!r} lacks the {'host' if scheme.startswith('http') else 'bucket'} after {scheme}://"
        )
    if ("@" in authority and not scheme.startswith("abfs")) or (scheme.startswith("http") and "?" in key):
        raise StoreError(
            f"the address of a store at {scheme}://{authority.rpartition('@')[2]} must not hold credentials or a "
            "query: it is kept in results and logs; give credentials in the environment"
        )
    if scheme.startswith("http"):
        key = urllib.parse.unquote(key)
    return ObjectPath(Bucket("s3" if scheme == "s3a" else scheme, authority, retry_s), key)


def _schemes() -> str:
    return ", ".join(f"{scheme}://" for scheme in SCHEMES)


def _bytes(data: Data) -> memoryview:
    return memoryview(data).cast("B")


def _requests(starts: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int, list[int]]]:
    """(start, stop, numbers of the ranges inside) of each request; empty ranges need none."""
    requests: list[tuple[int, int, list[int]]] = []
    for k in sorted((k for k in range(len(starts)) if lengths[k]), key=lambda k: starts[k]):
        start, stop = starts[k], starts[k] + lengths[k]
        if requests:
            first, last, members = requests[-1]
            joined = max(last, stop)
            if start - last <= GAP_BYTES and joined - first <= REQUEST_BYTES:
                requests[-1] = (first, joined, [*members, k])
                continue
        requests.append((start, stop, [k]))
    return requests
