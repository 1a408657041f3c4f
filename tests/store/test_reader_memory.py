"""The reader's memory does not grow with what it has read: not within an epoch, not from epoch to epoch."""

from __future__ import annotations

import json
import sys

import pytest

# In an interpreter of its own: the peak of this one says nothing about a reader.
_EPOCHS = """
import json, sys
import numpy as np
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.store import FeatureStore

def rss():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024

store = FeatureStore.open(sys.argv[1])
rows = np.flatnonzero(store.usable(["t"]))
with CachedFeatures(store, ["t"], device="cpu", threads=2, rows=rows) as source:
    def epoch(seed):
        order = np.random.default_rng(seed).permutation(rows)
        return [source.fetch(part) is None or rss() for part in np.array_split(order, len(rows) // 4)]
    source.fetch(rows[:4])
    before = rss()
    print(json.dumps({"before": before, "epochs": [epoch(seed) for seed in range(4)]}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_a_shuffled_epoch_takes_no_memory(kit, path, run_python, monkeypatch, codec):
    # Has glibc give back at once what batches leave behind; else its arenas keep tens of megabytes, now more, now less.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    store = kit.create(path)
    store.extend([kit.weak(128, seeds=1)])
    kit.add_teacher(store, codec=codec, grid=(16, 32), dim=256)  # 32 MiB of fp16, 64 MiB decoded
    kit.fill(store)
    found = json.loads(run_python(_EPOCHS, str(path)))
    first, *others = found["epochs"]
    # A batch is 2 MiB, decoded, beside its encoded buffer.
    assert max(first) - found["before"] < 16
    assert max(max(epoch) for epoch in others) - max(first) < 8
