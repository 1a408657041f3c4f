"""A stage 1 in miniature, in processes that the kill tests may kill.

Run as a script it imports everything once and then forks a process per line of standard input (importing torch takes
longer than all else in these tests). A line is JSON: {"do": "fill" | "extend", "store": path, "part": k, "of": n,
"limit": bytes a file may have, or null}.

Answers are lines "<word> <process id> <rest>"; the words are started, ready, finished and failed.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

import numpy as np

from rsmtdf.errors import StoreError
from rsmtdf.store.segments import NewSegment
from rsmtdf.store.store import FeatureStore


def content(row: int, tokens: int, dim: int) -> np.ndarray:
    """What the view of a row holds: checked by the tests."""
    x = np.random.default_rng(row).standard_normal((tokens, dim))
    return x.astype(np.float16).astype(np.float32)


def fill(path: str, part: int, of: int) -> None:
    """The missing ones of every of-th shard: by number, since two writers do not see the same shards missing."""
    store = FeatureStore.open(path, writable=True)
    store.clean_partials()
    spec = store.teacher("t").spec
    answer("ready")
    for shard in [k for k in store.missing_shards(["t"]) if k % of == part]:
        with store.claim([shard]):
            rows = store.rows_of_shard(shard).tolist()
            store.write_shard(
                shard,
                view_crcs={r: r + 1 for r in rows},
                skipped={},
                features={"t": np.stack([content(r, spec.tokens, spec.dim) for r in rows])},
                provenance={},
            )


def extend(path: str) -> None:
    store = FeatureStore.open(path, writable=True)
    answer("ready")
    n = 5000
    store.extend(
        [
            NewSegment(
                stream="plain",
                seed_start=0,
                seeds=1,
                generation=0,
                tile_ids=tuple(f"s/{k}" for k in range(n)),
                columns={"new": np.zeros(n)},
                partner=np.arange(n),
            )
        ]
    )


def answer(word: str, rest: str = "") -> None:
    os.write(1, f"{word} {os.getpid()} {rest}\n".encode())  # one write: lines of several processes do not mix


def run(job: dict[str, Any]) -> None:
    try:
        if job["limit"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
        if job["do"] == "fill":
            fill(job["store"], job["part"], job["of"])
        else:
            extend(job["store"])
        answer("finished")
    except StoreError as error:
        answer("failed", str(error))


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead need no wait()
    for line in sys.stdin:
        if os.fork() == 0:
            answer("started")
            run(json.loads(line))
            os._exit(0)


if __name__ == "__main__":
    main()
