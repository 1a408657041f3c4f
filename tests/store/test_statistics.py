from __future__ import annotations

import json
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsmtdf.errors import StoreError
from rsmtdf.store.statistics import ChannelStatistics, TokenNorms


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


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(1e-3, 1e4), st.floats(-1e3, 1e3))
@settings(deadline=None)
def test_merging_in_any_order_gives_the_same(seed, parts, spread, offset):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((8, 5, 3)) * np.exp(rng.standard_normal((8, 5, 1))) * spread + offset
    x = torch.from_numpy(x.astype(np.float32))
    whole = of(x)
    cuts = np.sort(rng.integers(0, 9, parts - 1))
    pieces = [of(part) for part in torch.tensor_split(x, cuts.tolist())]
    orders = [reduce(merged, [pieces[k] for k in rng.permutation(parts)], ChannelStatistics(3)) for _ in range(2)]
    counts = [found.norms.counts for found in (whole, *orders)]
    assert all(np.array_equal(c, counts[0]) for c in counts)
    exact = x.double().reshape(-1, 3).numpy()
    for found in (whole, *orders):
        assert (found.views, found.count, found.norms.max) == (8, 40, whole.norms.max)
        np.testing.assert_array_equal(found.absmax, whole.absmax)
        np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-6, atol=1e-7 * spread)
        np.testing.assert_allclose(found.std, exact.std(0), rtol=1e-6)
        tokens = ("outlier_tokens", "token_norm_median", "token_norm_max")
        assert [found.summary()[k] for k in tokens] == [whole.summary()[k] for k in tokens]


class TestOutlierTokens:
    def test_tokens_beyond_three_times_the_median_norm_are_counted(self):
        x = torch.randn(50, 100, 64, generator=torch.Generator().manual_seed(2))
        x = x / x.norm(dim=-1, keepdim=True) * 8
        x[:5, 3] *= 3.3
        x[7, 4] *= 100
        x[8, 4] = 0
        x[9, 4] *= 2.7  # within
        summary = of(x).summary()
        assert summary["outlier_tokens"] == 6
        assert summary["token_norm_median"] == pytest.approx(8, rel=0.045)
        assert summary["token_norm_max"] == pytest.approx(800, rel=1e-6)

    @given(st.integers(0, 2**32 - 1), st.floats(1e-30, 1e30))
    def test_the_count_is_right_to_a_bins_width(self, seed, size):
        norms = np.random.default_rng(seed).lognormal(sigma=0.8, size=501) * size
        found = TokenNorms()
        found.add(norms)
        median, width = np.median(norms), 2 ** (1 / 16)
        assert median / width <= found.median <= median * width
        assert (norms > 3 * median * width).sum() <= found.outliers <= (norms > 3 * median / width).sum()

    @pytest.mark.parametrize("value", [0.0, 1e-45, 3e38])
    def test_norms_at_the_ends_of_float32_are_counted(self, value):
        found = of(torch.full((1, 4, 1024), value))
        assert found.norms.counts.sum() == 4
        assert found.summary()["outlier_tokens"] == 0
        assert found.summary()["token_norm_max"] == pytest.approx(32 * float(np.float32(value)))

    def test_zero_tokens_have_no_outliers_to_compare_with(self):
        x = torch.zeros(1, 10, 4)
        x[0, :3] = 1
        assert of(x).summary()["token_norm_median"] == 0
        assert of(x).summary()["outlier_tokens"] == 0

    def test_without_a_token_there_is_a_summary(self):
        summary = ChannelStatistics(4).summary()
        assert (summary["outlier_tokens"], summary["token_norm_median"], summary["token_norm_max"]) == (0, 0.0, 0.0)
        assert json.loads(json.dumps(summary)) == summary


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


def of(features: torch.Tensor) -> ChannelStatistics:
    found = ChannelStatistics(features.shape[-1])
    found.update(features)
    return found


def merged(left: ChannelStatistics, right: ChannelStatistics) -> ChannelStatistics:
    left.merge(right)
    return left
