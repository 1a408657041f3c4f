"""`--precision` sets what all teachers compute in, which is part of what they are."""

from __future__ import annotations

import json
from typing import Any

from rsmtdf.store.store import FeatureStore


def test_precision_is_of_all_teachers_and_of_their_identity(cached_tiny: Any, command: Any, here: Any) -> None:
    arguments = ("cache-features", "--config", cached_tiny.config, "--out", "low.zarr", "--weak-views", "4")
    said = command(*arguments, "--precision", "bfloat16", "--set", "cache.compile=false")
    assert said.code == 0, said.err
    store = FeatureStore.open(here / "low.zarr")
    assert {t.spec.compute_dtype for t in store.teachers.values()} == {"bfloat16"}
    assert {t["compute_dtype"] for t in store.experiment["config"]["teachers"]} == {"bfloat16"}
    note = json.loads((here / "low.zarr" / "provenance" / "dense" / "0.json").read_text())
    assert (note["batch"], note["compiled"]) == (16, [])
    again = command(*arguments)
    assert again.code == 2
    assert "compute_dtype: expected 'float32', found 'bfloat16'" in again.err


def test_no_such_precision(cached_tiny: Any, command: Any, here: Any) -> None:
    said = command("plan", "--config", cached_tiny.config, "--precision", "half")
    assert said.code == 2
    assert "--precision half: expected one of float32, bfloat16, float16" in said.err
