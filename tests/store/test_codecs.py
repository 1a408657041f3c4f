from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsmtdf.errors import StoreError
from rsmtdf.store.codecs import CODECS, bytes_per_view, find_codec
from rsmtdf.testing.codec_contract import DIM, TOKENS, CodecContract, features, moments

CPU = torch.device("cpu")


class TestFp16(CodecContract):
    name = "fp16"
    max_error = 3e-4
    max_value = 65000.0


class TestInt8(CodecContract):
    name = "int8"
    max_error = 9e-3
    max_value = 1e5


def test_every_codec_has_a_contract():
    tested = {c.name for c in CodecContract.__subclasses__()}
    assert tested >= set(CODECS)


def test_design_numbers_of_bytes():
    teachers = [(1369, 768), (256, 1024)]
    assert sum(bytes_per_view("fp16", *t) for t in teachers) == 2_627_072
    assert sum(bytes_per_view("int8", *t) for t in teachers) <= 1_330_000


def test_fp16_overflow_is_an_error_not_an_infinity():
    x = features(1)
    x[0, 2, 1] = 65520.0
    with pytest.raises(StoreError, match=r"view 0: feature 65520 at token 2, channel 1 .*65504"):
        CODECS["fp16"].encode(x, mean=np.zeros(DIM), std=np.ones(DIM))


def test_fp16_keeps_half_precision_bits():
    x = features(2).to(torch.float16)
    encoded = CODECS["fp16"].encode(x.float(), mean=np.zeros(DIM), std=np.ones(DIM))
    assert torch.equal(encoded["features"], x)


def test_int8_decodes_by_one_line_of_numpy():
    x = features(4) * 3 + 1
    mean, std = moments(x)
    encoded = CODECS["int8"].encode(x, mean=mean, std=std)
    ours = CODECS["int8"].decode(encoded, mean=mean, std=std, device=CPU)
    codes, token_scale = encoded["codes"].numpy(), encoded["token_scale"].numpy()
    line = codes * token_scale[..., None].astype(np.float32) * np.maximum(std, 1e-3) + mean
    np.testing.assert_array_equal(ours.numpy(), line)


def test_int8_scale_is_never_denormal():
    x = torch.full((1, TOKENS, DIM), 1e-9)
    encoded = CODECS["int8"].encode(x, mean=np.zeros(DIM), std=np.ones(DIM))
    assert float(encoded["token_scale"].min()) == pytest.approx(2**-14)
    assert int(encoded["codes"].abs().max()) == 0


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e3), st.floats(-1e3, 1e3))
def test_int8_error_stays_within_half_a_step(seed, spread, offset):
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 3, 8)).astype(np.float32)) * spread + offset
    mean, std = np.full(8, offset, np.float32), np.full(8, spread, np.float32)
    encoded = CODECS["int8"].encode(x, mean=mean, std=std)
    decoded = CODECS["int8"].decode(encoded, mean=mean, std=std, device=CPU)
    step = encoded["token_scale"].float().unsqueeze(-1) * max(spread, 1e-3)
    # A rounded-down scale clips the token's largest value by at most 127 * 2**-11 steps.
    assert ((decoded - x).abs() <= 0.57 * step + 1e-4 * abs(offset) + 1e-7).all()


def test_unknown_codec_lists_the_known():
    with pytest.raises(StoreError, match="no codec 'zip'; there are fp16, int8"):
        find_codec("zip")
