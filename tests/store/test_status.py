"""Status words: what a commit asks of them must not cost more the more there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rsmtdf.errors import StoreCorrupt
from rsmtdf.store.status import DONE, StatusArray, word


@pytest.fixture
def status(tmp_path: Path) -> StatusArray:
    """Shards of 4 views, of which 2 to 4 and 10 are sealed."""
    array = StatusArray(path=tmp_path, shard_views=4)
    for shard in (2, 3, 4, 10):
        array.write_shard(shard, np.full(4, word(DONE, shard), np.uint64))
    array.seal([(8, 20), (40, 44)], 48)
    return array


def test_which_shards_are_sealed(status: StatusArray, tmp_path: Path) -> None:
    assert [k for k in range(12) if status.is_sealed(k)] == [2, 3, 4, 10]
    status.unseal(3)
    assert [k for k in range(12) if status.is_sealed(k)] == [10]
    assert not StatusArray(path=tmp_path / "elsewhere", shard_views=4).is_sealed(2)


def test_that_a_shard_is_sealed_is_read_from_the_head(status: StatusArray) -> None:
    """The words behind it are eight bytes for each view of the store; whoever believes them checks them."""
    words = status.sealed_file.read_bytes()
    head = len(b"rsmtdf sealed status 1\n") + 8 + 2 * 16
    status.sealed_file.write_bytes(words[:head])
    assert [k for k in range(12) if status.is_sealed(k)] == [2, 3, 4, 10]
    with pytest.raises(StoreCorrupt):
        status.read(48)
    with pytest.raises(StoreCorrupt):
        status.unseal(3)
