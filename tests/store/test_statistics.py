from __future__ import annotations

import numpy as np
import pytest
import torch

from rsmtdf.errors import StoreError
from rsmtdf.store.statistics import ChannelStatistics


def sample(views: int = 7) -> torch.Tensor:
    x = torch.randn(views, 5, 4, generator=torch.Generator().manual_seed(1))
    return x * torch.tensor([1.0, 20.0, 1e-4, 0.0]) + torch.tensor([1000.0, -3.0, 0.0, 7.0])


def test_equals_the_two_pass_result():
    x = sample()
    found = ChannelStatistics(4)
    found.update(x)
    exact = x.double().reshape(-1, 4).numpy()
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-7)
    np.testing.assert_allclose(found.std, exact.std(0), rtol=1e-6)
    assert (found.views, found.count) == (7, 35)
    assert found.mean.dtype == found.std.dtype == np.float32


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_batch_size_changes_no_bit(batch):
    whole, parts = ChannelStatistics(4), ChannelStatistics(4)
    whole.update(sample())
    for chunk in sample().split(batch):
        parts.update(chunk)
    assert whole.mean.tobytes() == parts.mean.tobytes()
    assert whole.std.tobytes() == parts.std.tobytes()


def test_merging_equals_seeing_all():
    whole, left, right = ChannelStatistics(4), ChannelStatistics(4), ChannelStatistics(4)
    whole.update(sample())
    left.update(sample()[:2])
    right.update(sample()[2:])
    left.merge(right)
    left.merge(ChannelStatistics(4))
    np.testing.assert_allclose(left.mean, whole.mean, rtol=1e-7)
    np.testing.assert_allclose(left.std, whole.std, rtol=1e-6)
    assert left.count == whole.count
    np.testing.assert_array_equal(left.absmax, whole.absmax)


def test_summary_names_outliers_and_constants():
    found = ChannelStatistics(4)
    found.update(sample())
    summary = found.summary()
    assert summary["constant_channels"] == [2, 3]
    assert 0 in summary["outlier_channels"]
    assert summary["absmax"] == pytest.approx(1002, abs=3)


def test_bad_features_are_named():
    found = ChannelStatistics(4)
    with pytest.raises(StoreError, match="4 channels were given features"):
        found.update(torch.zeros(2, 3, 5))
    x = sample()
    x[2, 0, 1] = float("nan")
    with pytest.raises(StoreError, match=r"view 2 .* channel 1"):
        found.update(x)
    with pytest.raises(StoreError, match="cannot be merged"):
        found.merge(ChannelStatistics(3))
