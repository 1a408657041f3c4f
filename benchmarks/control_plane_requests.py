"""How many requests a shard costs on object storage, counted at an S3 server of one's own on loopback.

    python benchmarks/control_plane_requests.py [--views 10000] [--task 20]

The store is that of `control_plane.py`, with one teacher of one array (fp16). Counted are the requests of opening it
as a worker does, and of one task; their number depends on no hardware. Needs rsmtdf[dev] (moto) and rsmtdf[cloud].
"""

from __future__ import annotations

import argparse
import collections
import http.client
import logging
import os
import re
import threading

import control_plane_parts as parts
from moto.server import ThreadedMotoServer

from rsmtdf.signals import StopFlag
from rsmtdf.store.store import FeatureStore


class Counter(logging.Handler):
    """Counts the lines in which the server tells of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._lock = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r'"(\w+) (/\S*) HTTP', re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage()))
        if found:
            with self._lock:
                self.counts[found[1], self._kind(found[2])] += 1

    @staticmethod
    def _kind(url: str) -> str:
        if "list-type" in url:
            return "list"
        for part in ("claims", "mutex", "status", "provenance", "views", "teachers"):
            if part in url:
                return {"mutex": "claims", "provenance": "notes", "teachers": "features and metadata"}.get(part, part)
        return "metadata"

    def taken(self) -> collections.Counter[tuple[str, str]]:
        with self._lock:
            found, self.counts = self.counts, collections.Counter()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, default=10_000)
    parser.add_argument("--task", type=int, default=20, help="Shards of the task.")
    options = parser.parse_args()
    counter = Counter()
    logger = logging.getLogger("werkzeug")
    logger.setLevel(logging.INFO)
    logger.addHandler(counter)
    logger.propagate = False
    server = ThreadedMotoServer(port=0, verbose=True)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
    }
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("PUT", "/bench", b"")
        connection.getresponse().read()
        url = "s3://bench/feats.zarr"
        parts.prepare(url, options.views)
        show("preparing the store", counter, 1)
        store = FeatureStore.open(url, writable=True)
        store.pending_views(["fake"])
        show("opening it and listing what is missing", counter, 1)
        parts.opened(url)
        show("opening it in a worker", counter, 1)
        parts.fill(url, tuple(range(options.task)), "cpu", StopFlag())
        show(f"a task of {options.task} shards, per shard", counter, options.task)
        parts.fill(url, tuple(range(options.task, options.task + 1)), "cpu", StopFlag())
        show("a task of 1 shard", counter, 1)
        store.seal()
        show("sealing, or finding that it is too early", counter, 1)
    finally:
        server.stop()
    del host


def show(what: str, counter: Counter, per: int) -> None:
    found = counter.taken()
    by_method = collections.Counter()
    for (method, _), n in found.items():
        by_method[method] += n
    print(f"{what}: " + ", ".join(f"{n / per:.2f} {m}" for m, n in sorted(by_method.items())))
    for (method, kind), n in sorted(found.items()):
        print(f"    {method:6} {kind:22} {n / per:.2f}")


if __name__ == "__main__":
    main()
