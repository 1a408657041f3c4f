"""What every codec of the store must do. Subclass `CodecContract`, name the codec and its error; pytest runs it.

The contract is about views one at a time: what a view becomes depends on nothing but its features and the channel
statistics, whatever batch or device it came in.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rsmtdf.errors import StoreError
from rsmtdf.store.codecs import CODECS, STD_FLOOR, Codec, bytes_per_view

TOKENS, DIM = 6, 32


class CodecContract:
    """Tests of one codec; `name` is its key in `CODECS`."""

    name: str
    max_error: float
    """Greatest relative L2 error on standard normal features, after standardising."""
    max_value: float
    """A magnitude that it can still store."""

    @property
    def codec(self) -> Codec:
        return CODECS[self.name]

    def test_encodes_into_the_arrays_it_names(self) -> None:
        encoded = self._encode(features(3))
        arrays = self.codec.arrays(TOKENS, DIM)
        assert list(encoded) == [a.name for a in arrays]
        for array in arrays:
            values = encoded[array.name].numpy()
            assert values.shape == (3, *array.shape)
            assert values.dtype == array.dtype
            assert len(array.dims) == values.ndim
        assert sum(v.numpy()[0].nbytes for v in encoded.values()) == bytes_per_view(self.name, TOKENS, DIM)

    def test_error_is_small(self) -> None:
        x = features(8)
        assert self._error(x) <= self.max_error

    def test_error_is_small_with_massive_channels_and_tokens(self) -> None:
        x = features(8)
        x[:, :, 3] = x[:, :, 3] * 90 + 400
        x[:, 2] *= 30
        assert self._error(x) <= 1.5 * self.max_error

    def test_decodes_to_float32_of_its_own(self) -> None:
        encoded = self._encode(features(2))
        decoded = self._decode(encoded)
        assert decoded.dtype == torch.float32
        assert decoded.shape == (2, TOKENS, DIM)
        assert all(decoded.data_ptr() != v.data_ptr() for v in encoded.values())

    def test_a_view_does_not_depend_on_its_batch(self) -> None:
        x = features(4)
        whole = self._encode(x, *moments(x))
        single = self._encode(x[2:3], *moments(x))
        for array, values in whole.items():
            assert torch.equal(values[2:3], single[array]), array

    def test_encoding_is_idempotent(self) -> None:
        mean, std = moments(features(2))
        once = self._decode(self._encode(features(2), mean, std), mean, std)
        twice = self._decode(self._encode(once, mean, std), mean, std)
        torch.testing.assert_close(twice, once, rtol=2e-3, atol=2e-3)

    def test_constant_channels_and_zero_tokens_survive(self) -> None:
        x = features(2)
        x[:, :, 5] = 2.5
        x[:, 1] = 0
        mean, std = moments(x)
        std[5] = 0
        decoded = self._decode(self._encode(x, mean, std), mean, std)
        assert torch.isfinite(decoded).all()
        assert (decoded[:, [0, 2, 3, 4, 5], 5] - 2.5).abs().max() < 0.1

    def test_values_outside_the_calibration_range_never_wrap(self) -> None:
        x = features(1)
        mean, std = moments(x)
        for value in (self.max_value, -self.max_value):
            x[0, 4, 7] = value
            decoded = float(self._decode(self._encode(x, mean, std), mean, std)[0, 4, 7])
            assert decoded == pytest.approx(value, rel=0.02)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
    def test_what_cannot_be_stored_is_named(self, bad: float) -> None:
        x = features(3)
        x[1, 4, 9] = bad
        mean, std = moments(features(3))
        with pytest.raises(StoreError, match=r"view 71: feature .* at token 4, channel 9 cannot be stored"):
            self.codec.encode(x, mean=mean, std=std, rows=[70, 71, 72])

    def test_fill_values_are_never_codes(self) -> None:
        x = features(8) * 100
        encoded = self._encode(x, *moments(features(8)))
        for array in self.codec.arrays(TOKENS, DIM):
            values = encoded[array.name].numpy()
            assert not (np.isnan(values).any() if np.isnan(array.fill) else (values == array.fill).any())

    def test_no_views_encode_to_no_views(self) -> None:
        encoded = self._encode(torch.empty(0, TOKENS, DIM), np.zeros(DIM, np.float32), np.ones(DIM, np.float32))
        assert {len(v) for v in encoded.values()} == {0}

    def _error(self, x: torch.Tensor) -> float:
        mean, std = moments(x)
        decoded = self._decode(self._encode(x, mean, std), mean, std)
        scale = torch.from_numpy(std).clamp(min=STD_FLOOR)
        return float(((decoded - x) / scale).norm() / ((x - torch.from_numpy(mean)) / scale).norm())

    def _encode(
        self, x: torch.Tensor, mean: np.ndarray | None = None, std: np.ndarray | None = None
    ) -> dict[str, torch.Tensor]:
        if mean is None or std is None:
            mean, std = moments(x)
        return self.codec.encode(x, mean=mean, std=std)

    def _decode(
        self, encoded: dict[str, torch.Tensor], mean: np.ndarray | None = None, std: np.ndarray | None = None
    ) -> torch.Tensor:
        if mean is None or std is None:
            mean, std = moments(features(2))
        return self.codec.decode(encoded, mean=mean, std=std, device=torch.device("cpu"))


def features(views: int) -> torch.Tensor:
    """Standard normal float32 [views, TOKENS, DIM], always the same (a smaller number of views: the first of them)."""
    return torch.randn(8, TOKENS, DIM, generator=torch.Generator().manual_seed(5))[:views].clone()


def moments(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std float32 [DIM] of features."""
    return x.mean(dim=(0, 1)).numpy(), x.std(dim=(0, 1), correction=0).numpy()
