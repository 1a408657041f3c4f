"""Sibling stores: the same teachers with the same channel statistics, so that their features merge as they are."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import numpy as np

from rsmtdf.errors import StoreIncomplete, StoreMismatch
from rsmtdf.objects import StorePath
from rsmtdf.specs import FeatureSpec
from rsmtdf.store.carry import RECODED_FROM
from rsmtdf.store.manifest import differences
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import StoredTeacher

log = logging.getLogger(__name__)


def sibling_statistics(
    path: StorePath, specs: Mapping[str, FeatureSpec], store: FeatureStore | None
) -> dict[str, StoredTeacher]:
    """The teachers of the store at `path` that `specs` name, for `store` (None: not made yet) to take statistics from.

    Raises:
        StoreNotFound: there is no store at `path`.
        StoreIncomplete: it has none of these teachers.
        StoreMismatch: one is another teacher of that name, or `store` has measured statistics of its own.
    """
    other = FeatureStore.open(path)
    found: dict[str, StoredTeacher] = {}
    for name, spec in specs.items():
        if (theirs := other.teachers.get(name)) is None:
            log.info("%s: not in %s, so its channel statistics are measured", name, path)
            continue
        if lines := differences(spec.identity(), theirs.spec.identity()):
            raise StoreMismatch(
                f"channel statistics of teacher {name!r} cannot be taken from {path}, where it is another one:\n  "
                + "\n  ".join(lines)
                + "\nGive a store of the same teacher, or leave out --stats-from"
            )
        mine = store.teachers.get(name) if store else None
        if mine and not (np.array_equal(mine.mean, theirs.mean) and np.array_equal(mine.std, theirs.std)):
            raise StoreMismatch(
                f"feature store {store.path if store else ''} has other channel statistics of teacher {name!r} than "
                f"{path}, and they are fixed when a teacher is added; leave out --stats-from, or write another store"
            )
        # What was done to its values there does not concern the values here.
        own = {k: v for k, v in theirs.statistics.items() if k != RECODED_FROM}
        found[name] = dataclasses.replace(theirs, statistics=own)
    if not found:
        have = ", ".join(other.teachers) or "none"
        raise StoreIncomplete(
            f"{path} has none of the teachers {', '.join(specs)} to take statistics of; it has: {have}"
        )
    return found
