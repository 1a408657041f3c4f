from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from rsmtdf.config import CacheConfig
from rsmtdf.errors import StoreError
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.checksum import crc32c
from rsmtdf.store.codecs import CODECS, bytes_per_view, find_codec
from rsmtdf.testing.codec_contract import CPU, DIM, TOKENS, CodecContract, features, moments

FORMAT = Path(__file__).parents[2] / "docs" / "store-format.md"


class TestFp16(CodecContract):
    name = "fp16"
    max_error = 3e-4
    max_step = 0.0
    max_relative = 2**-11
    max_value = 65000.0


class TestInt8(CodecContract):
    name = "int8"
    max_error = 9e-3
    # Half a step, and what a scale that was rounded down clips: at most 127 * 2**-11 steps.
    max_step = (0.5 + 0.07) / 127
    max_value = 1e5


class TestInt4(CodecContract):
    name = "int4"
    max_error = 0.11
    max_step = (0.5 + 0.01) / 7
    max_value = 1e5


def test_every_codec_has_a_contract():
    tested = {c.name for c in CodecContract.__subclasses__()}
    assert tested >= set(CODECS)


def test_a_configuration_may_name_every_codec():
    for name in CODECS:
        assert CacheConfig(codec=name).codec == name


def test_design_numbers_of_bytes():
    teachers = [(1369, 768), (256, 1024)]
    total = {name: sum(bytes_per_view(name, *t) for t in teachers) for name in CODECS}
    assert total == {"fp16": 2_627_072, "int8": 1_316_786, "int4": 738_864}


def test_fp16_overflow_is_an_error_not_an_infinity():
    x = features(1)
    x[0, 2, 1] = 65520.0
    with pytest.raises(StoreError, match=r"view 0: feature 65520 at token 2, channel 1 .*65504"):
        CODECS["fp16"].encode(x, mean=np.zeros(DIM), std=np.ones(DIM))
    # In double precision it is below the limit, in the float32 on the way to half precision no longer.
    with pytest.raises(StoreError, match="view 0: feature 65520"):
        CODECS["fp16"].encode(x.double() - (x.double() > 6e4) * 1e-7, mean=np.zeros(DIM), std=np.ones(DIM))


def test_fp16_keeps_half_precision_bits():
    x = features(2).to(torch.float16)
    encoded = CODECS["fp16"].encode(x.float(), mean=np.zeros(DIM), std=np.ones(DIM))
    assert torch.equal(encoded["features"], x)


@pytest.mark.parametrize("dim", [DIM, 33, 1])
@pytest.mark.parametrize("name", list(CODECS))
def test_a_view_decodes_by_the_documented_line_of_numpy(name, dim):
    x = features(4, dim) * 3 + 1
    mean, std = moments(x)
    encoded = CODECS[name].encode(x, mean=mean, std=std)
    ours = CODECS[name].decode(encoded, mean=mean, std=std, device=CPU).numpy()
    (line,) = re.findall(rf"^ +{name} = (.*)$", FORMAT.read_text(), re.MULTILINE)
    for i in range(4):
        known = {"np": np, "i": i, "t": TOKENS, "c": dim, "channel_mean": mean, "channel_std": std}
        known |= {array: values.numpy() for array, values in encoded.items()}
        found = eval(line, known)  # noqa: S307 (a line of our own documentation)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, ours[i])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_scale_is_never_subnormal(name):
    x = torch.full((1, TOKENS, DIM), 1e-9)
    encoded = CODECS[name].encode(x, mean=np.zeros(DIM), std=np.ones(DIM))
    assert float(encoded["token_scale"].min()) == pytest.approx(2**-14)
    decoded = CODECS[name].decode(encoded, mean=np.zeros(DIM), std=np.ones(DIM), device=CPU)
    assert int(decoded.count_nonzero()) == 0


@pytest.mark.parametrize(("name", "value"), [("int8", 2e4), ("int4", 2e3)])
def test_a_channel_that_was_constant_is_named_before_a_massive_one(name, value):
    x = features(2)
    x[:, :, 3] *= 1e5
    mean, std = moments(x)
    x[1, 2, 9], std[9] = value, 0
    with pytest.raises(StoreError, match=rf"view 1: feature {value:g} at token 2, channel 9 .*{name} holds"):
        CODECS[name].encode(x, mean=mean, std=std)


def test_int4_packs_the_even_channel_into_the_lower_half():
    x = torch.tensor([[[7.0, -7.0, 0.0, 1.0, -3.0]]])
    encoded = CODECS["int4"].encode(x, mean=np.zeros(5), std=np.ones(5))
    assert encoded["token_scale"].tolist() == [[[1.0]]]
    # 7 and -7; 0 and 1; -3 and nothing, which is code 0.
    assert encoded["codes"].tolist() == [[[0x1F, 0x98, 0x85]]]


def test_a_massive_value_costs_int4_its_own_group_only():
    x = features(1, 64)
    x[0, 0, 3] = 1e4
    mean, std = np.zeros(64), np.ones(64)
    decoded = CODECS["int4"].decode(CODECS["int4"].encode(x, mean=mean, std=std), mean=mean, std=std, device=CPU)
    assert (decoded[0, 0, 32:] - x[0, 0, 32:]).abs().max() < 0.3


@pytest.mark.parametrize(
    ("name", "dim", "encoded_crc", "decoded_crc"),
    [
        ("fp16", 33, 0xEB88C963, 0xC4B8C62E),
        ("int8", 33, 0x82A8E1A7, 0xC13BE65B),
        ("int4", 33, 0x60D5CE92, 0x66B1E70E),
        ("fp16", 768, 0x866ED331, 0xB5B312E5),
        ("int8", 768, 0xD9865653, 0x9BD91767),
        ("int4", 768, 0x9B7EB64F, 0x147DC009),
    ],
)
def test_bits_are_those_that_stores_hold(name, dim, encoded_crc, decoded_crc):
    """Changing one of them makes repaired views differ from their neighbours: that needs another codec name."""
    x, mean, std = frozen_input(dim)
    encoded = CODECS[name].encode(x, mean=mean, std=std)
    total = 0
    for values in encoded.values():
        total = crc32c(values.numpy(), start=total)
    decoded = CODECS[name].decode(encoded, mean=mean, std=std, device=CPU)
    assert (f"{total:08x}", f"{crc32c(decoded.numpy()):08x}") == (f"{encoded_crc:08x}", f"{decoded_crc:08x}")


@pytest.mark.parametrize("force_zarr", [False, True])
@pytest.mark.parametrize("name", list(CODECS))
def test_a_store_gives_back_what_the_codec_makes_of_features(kit, path, name, force_zarr):
    store = kit.full(path, codec=name)
    rows = kit.rows(store)
    x = torch.stack([kit.feature("t", int(row)) for row in rows])
    with CachedFeatures(store, ["t"], device="cpu", force_zarr=force_zarr) as source:
        assert torch.equal(source.fetch(rows)["t"], store.teacher("t").roundtrip(x))
    for array in store.teacher("t").arrays:
        holes = np.delete(zarr.open_group(path, mode="r")[f"teachers/t/{array.name}"][:], rows, axis=0)
        assert len(holes)
        assert (np.isnan(holes) if np.isnan(array.fill) else holes == array.fill).all()


def test_unknown_codec_lists_the_known():
    with pytest.raises(StoreError, match="no codec 'zip'; there are int8, int4, fp16"):
        find_codec("zip")


def frozen_input(dim: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Features [3, 40, dim] and statistics from raw Philox words: the same bits in every NumPy."""
    words = np.random.Philox(key=7).random_raw(3 * 40 * dim)
    x = ((words >> np.uint64(40)).astype(np.float32) - 2**23) / np.float32(2**21)
    x = x.reshape(3, 40, dim) * np.float32(0.75) + np.float32(0.3)
    x[:, :, 3] *= 200
    x[:, 5] *= 50
    x[1, 7] = 0
    x[2, 9] = 1e-7
    x[:, :, 5] = 2.5
    mean = (np.arange(dim) % 7).astype(np.float32) / 10
    std = (1 + np.arange(dim) % 5).astype(np.float32) / 3
    std[5] = 0
    return torch.from_numpy(x), mean, std
