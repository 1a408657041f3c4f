"""What every codec of the store must do. Subclass `CodecContract`, name the codec and its error; pytest runs it.

The contract is about views one at a time: what a view becomes depends on nothing but its features and the channel
statistics, whatever batch or device it came in. It runs on every device that this machine has.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsmtdf.errors import StoreError
from rsmtdf.store.codecs import CODECS, STD_FLOOR, Codec, bytes_per_view

TOKENS, DIM = 6, 32
DIMS = (1, 31, 32, 33, 1024)
CPU = torch.device("cpu")
ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
DEVICES = (CPU,) if ACCELERATOR is None else (CPU, ACCELERATOR)


class CodecContract:
    """Tests of one codec; `name` is its key in `CODECS`."""

    name: str
    max_error: float
    """Greatest relative L2 error on standard normal features, after standardising."""
    max_step: float
    """Greatest error of a value, as a share of its token's largest magnitude after standardising."""
    max_relative: float = 1e-6
    """Greatest error of a value that comes on top, as a share of itself and of its channel's mean."""
    max_value: float
    """A magnitude that it can still store."""

    @pytest.fixture(params=DEVICES, ids=str)
    def device(self, request: pytest.FixtureRequest) -> torch.device:
        device: torch.device = request.param
        return device

    @property
    def codec(self) -> Codec:
        return CODECS[self.name]

    @pytest.mark.parametrize("dim", DIMS)
    def test_encodes_into_the_arrays_it_names(self, device: torch.device, dim: int) -> None:
        encoded = self.encode(features(3, dim), device=device)
        arrays = self.codec.arrays(TOKENS, dim)
        assert list(encoded) == [a.name for a in arrays]
        for array in arrays:
            assert encoded[array.name].device.type == device.type
            values = encoded[array.name].cpu().numpy()
            assert values.shape == (3, *array.shape)
            assert values.dtype == array.dtype
            assert values.flags.c_contiguous
            assert len(array.dims) == values.ndim
        assert sum(v.cpu().numpy()[0].nbytes for v in encoded.values()) == bytes_per_view(self.name, TOKENS, dim)

    @pytest.mark.parametrize("dim", DIMS)
    def test_error_is_small(self, device: torch.device, dim: int) -> None:
        assert self._error(features(8, dim), device) <= self.max_error

    def test_error_is_small_with_massive_channels_and_tokens(self, device: torch.device) -> None:
        x = features(8)
        x[:, 2] *= 100
        x[:, :, 3] = features(8)[:, :, 3] * 1000 + 400
        assert self._error(x, device) <= 1.5 * self.max_error

    def test_decodes_to_float32_of_its_own(self, device: torch.device) -> None:
        encoded = self.encode(features(2), device=device)
        before = {name: values.clone() for name, values in encoded.items()}
        decoded = self.codec.decode(encoded, **named(moments(features(2))), device=device)
        assert decoded.dtype == torch.float32
        assert decoded.shape == (2, TOKENS, DIM)
        assert all(decoded.data_ptr() != v.data_ptr() for v in encoded.values())
        for name, values in encoded.items():
            assert torch.equal(values, before[name]), "decoding wrote into its input"

    def test_encoding_leaves_its_input_alone(self, device: torch.device) -> None:
        x = features(2).to(device)
        mean, std = moments(features(2))
        before = x.clone(), mean.copy(), std.copy()
        self.codec.encode(x, mean=mean, std=std)
        assert torch.equal(x, before[0])
        assert mean.tobytes() == before[1].tobytes()
        assert std.tobytes() == before[2].tobytes()

    @pytest.mark.parametrize(("tokens", "dim"), [*((TOKENS, d) for d in DIMS), (700, 1024)])
    def test_a_view_does_not_depend_on_its_batch(self, device: torch.device, tokens: int, dim: int) -> None:
        x = features(4, dim, tokens)
        whole, decoded = self.encode(x, device=device), self._roundtrip(x, device)
        single = self.encode(x[2:3], *moments(x), device=device)
        for array, values in whole.items():
            assert torch.equal(values[2:3], single[array]), array
        assert torch.equal(self._roundtrip(x[2:3], device, *moments(x)), decoded[2:3])

    def test_every_device_gives_the_same_bits(self) -> None:
        if ACCELERATOR is None:
            pytest.skip("this machine has no accelerator to compare the CPU with")
        for dim in DIMS:
            x = features(8, dim, 300) * 3
            x[:, 2] *= 100
            mean, std = moments(features(8, dim, 300))
            there, here = (self.encode(x, mean, std, device=device) for device in (ACCELERATOR, CPU))
            for array, values in here.items():
                assert torch.equal(there[array].cpu(), values), array
            decoded = self.decode(there, mean, std, device=ACCELERATOR)
            assert torch.equal(decoded, self.decode(here, mean, std))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_float_types_are_encoded_as_float32(self, device: torch.device, dtype: torch.dtype) -> None:
        if device.type == "mps" and dtype == torch.float64:
            pytest.skip("MPS has no float64")
        x = features(3).to(dtype)
        mean, std = moments(features(3))
        expected = self.encode(x.to(torch.float32), mean, std, device=device)
        for array, values in self.encode(x, mean, std, device=device).items():
            assert torch.equal(values, expected[array]), array

    def test_strides_do_not_matter(self, device: torch.device) -> None:
        x = features(4, 33)
        views = [x.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([x, x], -1)[..., 1], x[::2]]
        assert not any(v.is_contiguous() for v in views)
        for view in views:
            encoded = self.encode(view, *moments(x), device=device)
            expected = self.encode(view.contiguous(), *moments(x), device=device)
            for array, values in encoded.items():
                assert torch.equal(values, expected[array]), array

    def test_encoding_is_idempotent(self, device: torch.device) -> None:
        x = features(2)
        once = self._roundtrip(x, device)
        twice = self._roundtrip(once, device, *moments(x))
        torch.testing.assert_close(twice, once, rtol=2e-3, atol=2e-3)

    def test_constant_channels_and_zero_tokens_survive(self, device: torch.device) -> None:
        x = features(2)
        x[:, :, 5] = 2.5
        x[:, 1] = 0
        mean, std = moments(x)
        std[5] = 0
        decoded = self._roundtrip(x, device, mean, std)
        assert torch.isfinite(decoded).all()
        assert (decoded[:, [0, 2, 3, 4, 5], 5] - 2.5).abs().max() < 0.1

    @pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e-8, 1e-5])
    def test_tokens_near_zero_survive(self, device: torch.device, size: float) -> None:
        x = features(2) * size
        decoded = self._roundtrip(x, device, np.zeros(DIM, np.float32), np.ones(DIM, np.float32))
        assert (decoded - x).abs().max() <= max(2**-14, self.max_step * float(x.abs().max()))

    def test_values_outside_the_calibration_range_never_wrap(self, device: torch.device) -> None:
        x = features(1)
        mean, std = moments(x)
        for value in (self.max_value, -self.max_value):
            x[0, 4, 7] = value
            decoded = float(self._roundtrip(x, device, mean, std)[0, 4, 7])
            assert decoded == pytest.approx(value, rel=0.02)

    # Subclasses share this method, and all examples one device: both are meant.
    @settings(
        max_examples=100,
        deadline=None,
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture],
    )
    @given(
        seed=st.integers(0, 2**32 - 1),
        dim=st.sampled_from([1, 2, 31, 32, 33, 65]),
        spread=st.floats(1e-4, 1e2),
        offset=st.floats(-1e2, 1e2),
        massive=st.floats(1, 100),
    )
    def test_errors_are_bounded(
        self, device: torch.device, seed: int, dim: int, spread: float, offset: float, massive: float
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 5, dim, generator=generator).numpy()
        large, zero = torch.randint(5, (2,), generator=generator).tolist()
        x[:, large] *= massive  # outside what the statistics have seen
        x[:, zero] = 0
        x = x * np.float32(spread) + np.float32(offset)
        mean, std = np.full(dim, offset, np.float32), np.full(dim, spread, np.float32)
        decoded = self._roundtrip(torch.from_numpy(x), device, mean, std).numpy()
        unit = max(spread, STD_FLOOR)
        largest = np.abs((x - mean) / unit).max(axis=-1, keepdims=True)
        bound = self.max_step * np.maximum(largest, 127 * 2**-14) * unit
        assert (np.abs(decoded - x) <= bound + self.max_relative * (np.abs(x) + abs(offset)) + 2**-24).all()

    @pytest.mark.parametrize("dim", [DIM, 33])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
    def test_what_cannot_be_stored_is_named(self, device: torch.device, bad: float, dim: int) -> None:
        x = features(3, dim)
        x[1, 4, dim - 1] = bad
        mean, std = moments(features(3, dim))
        with pytest.raises(StoreError, match=rf"view 71: feature .* at token 4, channel {dim - 1} cannot be stored"):
            self.codec.encode(x.to(device), mean=mean, std=std, rows=[70, 71, 72])

    @pytest.mark.parametrize("dim", DIMS)
    def test_fill_values_are_never_codes(self, device: torch.device, dim: int) -> None:
        encoded = self.encode(features(8, dim) * 100, *moments(features(8, dim)), device=device)
        for array in self.codec.arrays(TOKENS, dim):
            values = encoded[array.name].cpu().numpy()
            assert not (np.isnan(values).any() if np.isnan(array.fill) else (values == array.fill).any())

    def test_no_views_encode_to_no_views(self, device: torch.device) -> None:
        mean, std = np.zeros(DIM, np.float32), np.ones(DIM, np.float32)
        encoded = self.encode(torch.empty(0, TOKENS, DIM), mean, std, device=device)
        for array in self.codec.arrays(TOKENS, DIM):
            assert encoded[array.name].shape == (0, *array.shape)
        assert self.decode(encoded, mean, std, device=device).shape == (0, TOKENS, DIM)

    def encode(
        self,
        x: torch.Tensor,
        mean: np.ndarray | None = None,
        std: np.ndarray | None = None,
        *,
        device: torch.device = CPU,
    ) -> dict[str, torch.Tensor]:
        """`x` encoded on `device`; without statistics, under its own."""
        if mean is None or std is None:
            mean, std = moments(x)
        return self.codec.encode(x.to(device), mean=mean, std=std)

    def decode(
        self, encoded: Mapping[str, torch.Tensor], mean: np.ndarray, std: np.ndarray, *, device: torch.device = CPU
    ) -> torch.Tensor:
        """Decoded on `device`, float32 on the CPU."""
        return self.codec.decode(encoded, mean=mean, std=std, device=device).cpu()

    def _roundtrip(
        self, x: torch.Tensor, device: torch.device, mean: np.ndarray | None = None, std: np.ndarray | None = None
    ) -> torch.Tensor:
        if mean is None or std is None:
            mean, std = moments(x)
        return self.decode(self.encode(x, mean, std, device=device), mean, std, device=device)

    def _error(self, x: torch.Tensor, device: torch.device) -> float:
        mean, std = moments(x)
        decoded = self._roundtrip(x, device, mean, std)
        scale = torch.from_numpy(std).clamp(min=STD_FLOOR)
        return float(((decoded - x) / scale).norm() / ((x - torch.from_numpy(mean)) / scale).norm())


def features(views: int, dim: int = DIM, tokens: int = TOKENS) -> torch.Tensor:
    """Standard normal float32 [views, tokens, dim], always the same (a smaller number of views: the first of them)."""
    return torch.randn(8, tokens, dim, generator=torch.Generator().manual_seed(5))[:views].clone()


def moments(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std float32 [dim] of features."""
    return x.mean(dim=(0, 1)).numpy(), x.std(dim=(0, 1), correction=0).numpy()


def named(statistics: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """Mean and std as the keyword arguments of a codec."""
    return {"mean": statistics[0], "std": statistics[1]}
