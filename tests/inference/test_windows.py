"""Windows cover every pixel, and their shares add up to one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsmtdf.inference.windows import blocks, hann, mirrored, shares, starts, touching

sizes = st.integers(1, 200)
crops = st.integers(2, 60)


@given(sizes, crops)
def test_windows_hang_on_the_origin_and_cover_the_side(size: int, crop_px: int) -> None:
    first = list(starts(size, crop_px=crop_px))
    assert first == [i * (crop_px // 2) for i in range(len(first))]
    assert first[-1] + crop_px >= size
    # None is there in vain, and the last reaches beyond by less than half a window, so mirroring stays inside it.
    assert len(first) == 1 or first[-2] + crop_px < size
    assert len(first) == 1 or first[-1] + crop_px - size < crop_px // 2


@given(sizes, crops)
def test_shares_partition_every_pixel_and_are_positive_inside(size: int, crop_px: int) -> None:
    total = np.zeros(size + 2 * crop_px)
    for start, share in shares(size, crop_px=crop_px).items():
        assert share.dtype == np.float32
        inside = start + np.arange(crop_px) < size
        assert (share[inside] > 0).all()
        assert (share[~inside] == 0).all()
        total[start : start + crop_px] += share
    assert np.allclose(total[:size], 1, atol=1e-6)


@pytest.mark.parametrize("crop_px", [2, 14, 518])
def test_two_windows_that_overlap_by_half_add_up_to_one(crop_px: int) -> None:
    window = hann(crop_px)
    assert np.allclose(window[: crop_px // 2] + window[crop_px // 2 :], 1)
    assert window.min() > 0
    assert np.array_equal(np.argsort(window[: crop_px // 2]), np.arange(crop_px // 2))


@given(sizes, crops, st.integers(0, 199), st.integers(1, 80))
def test_touching_windows_are_those_that_share_a_pixel(size: int, crop_px: int, start: int, length: int) -> None:
    start %= size
    length = min(length, size - start)
    expected = [s for s in starts(size, crop_px=crop_px) if {*range(s, s + crop_px)} & {*range(start, start + length)}]
    assert touching(start, length, size=size, crop_px=crop_px) == expected
    assert expected


@given(st.integers(-300, 300), st.integers(1, 100), st.integers(1, 50))
def test_mirrored_positions_walk_to_and_fro(start: int, length: int, size: int) -> None:
    found = mirrored(start, length, size)
    if size == 1:
        assert (found == 0).all()
        return
    assert found.min() >= 0
    assert found.max() < size
    assert (np.abs(np.diff(found)) == 1).all()
    for position, at in zip(range(start, start + length), found, strict=True):
        if 0 <= position < size:
            assert at == position


def test_mirrored_is_numpys_reflection() -> None:
    assert np.array_equal(mirrored(-4, 15, 6), np.pad(np.arange(6), (4, 5), mode="reflect"))
    assert np.array_equal(mirrored(0, 11, 3), np.pad(np.arange(3), (0, 8), mode="reflect"))


@given(sizes, sizes, st.integers(1, 90))
def test_blocks_partition_the_raster(height: int, width: int, block_px: int) -> None:
    seen = np.zeros((height, width), int)
    for box in blocks(height, width, block_px=block_px):
        assert 0 < box.height <= block_px
        assert 0 < box.width <= block_px
        seen[box.y0 : box.y0 + box.height, box.x0 : box.x0 + box.width] += 1
    assert (seen == 1).all()
