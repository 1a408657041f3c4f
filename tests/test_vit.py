"""The shared ViT: DINOv2's position rule against its formula, and where timm's own would differ."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from rsmtdf.errors import ConfigError
from rsmtdf.keyed import key_seed
from rsmtdf.vit import build_vit, patch_px, patch_tokens

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2}
NATIVE = (56, 56)  # a grid of 4x4 patches


def tiny(pos_embed="official", *, model="vit_small_patch14_dinov2", img_px=NATIVE, **overrides):
    """A two-block ViT whose position table, with random values, is large enough for its rule to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed("vit"))
        vit = build_vit(model, img_px=img_px, pos_embed=pos_embed, overrides={**TINY, **overrides}).eval()
        torch.nn.init.normal_(vit.pos_embed)
        return vit


def image(h: int, w: int, b: int = 1) -> torch.Tensor:
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(key_seed("image", h, w)))


def cubic(t: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.75, the one of torch's (and OpenCV's) bicubic."""
    a, t = -0.75, np.abs(t)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def axis_weights(old: int, new: int) -> np.ndarray:
    """[new, old]: DINOv2 samples at (i + 0.5) / scale - 0.5 with scale = (new + 0.1) / old, edges repeated."""
    scale = (new + 0.1) / old
    weights = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) / scale - 0.5
        base = math.floor(at)
        for j in range(base - 1, base + 3):
            weights[i, min(max(j, 0), old - 1)] += cubic(np.array(at - j))
    return weights


def positions(vit, h: int, w: int) -> torch.Tensor:
    """What the ViT adds to the patch tokens of an h x w image: its `_pos_embed` applied to zeros, prefix dropped."""
    grid = torch.zeros(1, h // 14, w // 14, vit.embed_dim)
    with torch.no_grad():
        return vit._pos_embed(grid)[0, vit.num_prefix_tokens :]


# --- the position rule ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(28, 28), (84, 84), (56, 84), (70, 42), (14, 140)])
def test_official_rule_is_the_formula(size):
    vit = tiny()
    table = vit.pos_embed[0, 1:].detach().double().numpy().reshape(4, 4, -1)
    rows, columns = axis_weights(4, size[0] // 14), axis_weights(4, size[1] // 14)
    expected = np.einsum("io,jp,opd->ijd", rows, columns, table).reshape(-1, vit.embed_dim)
    np.testing.assert_allclose(positions(vit, *size).numpy(), expected, rtol=0, atol=2e-5)


def test_official_rule_is_not_timms():
    """If they agreed, the rule would not be needed: the test that this file's other tests can fail."""
    official, plain = tiny("official"), tiny("timm")
    plain.load_state_dict(official.state_dict())
    for size in ((28, 28), (84, 84)):
        assert (positions(official, *size) - positions(plain, *size)).abs().max() > 0.05


def test_native_grid_is_untouched():
    official, plain = tiny("official"), tiny("timm")
    plain.load_state_dict(official.state_dict())
    assert torch.equal(positions(official, *NATIVE), official.pos_embed[0, 1:])
    x = image(*NATIVE)
    with torch.no_grad():
        a, b = (patch_tokens(v, x, layers=[1], norm=True)[0] for v in (official, plain))
    assert torch.equal(a, b)


def test_class_token_keeps_its_own_position():
    vit = tiny()
    with torch.no_grad():
        tokens = vit._pos_embed(torch.zeros(2, 2, 2, vit.embed_dim))
    torch.testing.assert_close(tokens[:, 0], (vit.cls_token + vit.pos_embed[:, :1])[0].expand(2, -1))


def test_register_tokens_get_no_position():
    vit = tiny(model="vit_small_patch14_reg4_dinov2")
    assert vit.num_prefix_tokens == 5
    with torch.no_grad():
        tokens = vit._pos_embed(torch.zeros(1, 6, 6, vit.embed_dim))
    assert tokens.shape == (1, 5 + 36, vit.embed_dim)
    assert torch.equal(tokens[0, 1:5], vit.reg_token[0])
    assert torch.equal(tokens[0, :1], vit.cls_token[0])
    table = vit.pos_embed[0].detach().double().numpy().reshape(4, 4, -1)
    w = axis_weights(4, 6)
    expected = np.einsum("io,jp,opd->ijd", w, w, table).reshape(36, -1)
    np.testing.assert_allclose(tokens[0, 5:].numpy(), expected, rtol=0, atol=2e-5)


def test_resampling_is_float32_in_a_float64_model_and_keeps_its_dtype():
    """The official behaviour, and the reference runs', which are float64."""
    single, double = tiny(), tiny().double()
    with torch.no_grad():
        tokens = double._pos_embed(torch.zeros(1, 6, 6, 32, dtype=torch.float64))
    assert tokens.dtype == torch.float64
    assert torch.equal(tokens[0, 1:].float(), positions(single, 84, 84))


def test_gradients_reach_the_table_through_the_resampling():
    vit = tiny()
    patch_tokens(vit, image(28, 28), layers=[1], norm=True)[0].square().sum().backward()
    assert float(vit.pos_embed.grad[0, 1:].abs().max()) > 0


def test_a_copy_uses_its_own_table():
    """EMA copies the student: a rule still bound to the original would read the original's position table."""
    vit = tiny()
    ema = copy.deepcopy(vit)
    with torch.no_grad():
        ema.pos_embed.zero_()
        ema.cls_token.zero_()
    assert float(positions(ema, 28, 28).abs().max()) == 0
    assert float(positions(vit, 28, 28).abs().max()) > 0
    assert ema._pos_embed.__self__ is ema


# --- tokens -----------------------------------------------------------------------------------------------------


def test_patch_tokens_are_row_major_without_prefix():
    vit = tiny(depth=1)
    tokens = patch_tokens(vit, image(28, 42, b=2), layers=[0], norm=True)
    assert [t.shape for t in tokens] == [(2, 6, 32)]
    with torch.no_grad():
        whole = vit.forward_features(image(28, 42, b=2))
    torch.testing.assert_close(tokens[0], whole[:, 1:])


def test_layers_come_in_order_and_norm_is_applied_to_each():
    vit = tiny(depth=3)
    x = image(*NATIVE)
    with torch.no_grad():
        raw = patch_tokens(vit, x, layers=[0, 2], norm=False)
        normed = patch_tokens(vit, x, layers=[0, 2], norm=True)
        middle = patch_tokens(vit, x, layers=[1], norm=False)[0]
        for r, n in zip(raw, normed, strict=True):
            torch.testing.assert_close(vit.norm(r), n)
    assert not torch.equal(raw[0], raw[1])
    assert not torch.equal(raw[1], middle)
    assert (raw[1] - normed[1]).abs().max() > 0.1


@pytest.mark.parametrize(("model", "px"), [("vit_small_patch14_dinov2", 14), ("vit_small_patch16_224", 16)])
def test_patch_px(model, px):
    assert patch_px(tiny(model=model, img_px=(4 * px, 4 * px))) == px


def test_building_is_the_same_for_the_same_seed():
    a, b = tiny(), tiny()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_tag_and_head():
    vit = tiny(model="vit_small_patch14_dinov2.lvd142m")
    assert not list(vit.head.parameters())


# --- errors -----------------------------------------------------------------------------------------------------


def test_unknown_model_names_near_ones():
    with pytest.raises(ConfigError, match=r"no model 'vit_small_patch41_dinov2'; near names: .*vit_small_pat"):
        tiny(model="vit_small_patch41_dinov2")


def test_a_model_that_is_no_vit_is_refused():
    with pytest.raises(ConfigError, match="resnet18"):
        build_vit("resnet18", img_px=(64, 64), pos_embed="timm")


def test_a_hierarchical_transformer_is_refused():
    with pytest.raises(ConfigError, match=r"not a plain vision transformer|cannot be built"):
        build_vit("swin_tiny_patch4_window7_224", img_px=(224, 224), pos_embed="official")


def test_an_override_that_does_not_fit_is_named():
    with pytest.raises(ConfigError, match="dept"):
        tiny(dept=2)
    with pytest.raises(ConfigError, match="num_heads"):
        tiny(embed_dim=30, num_heads=4)
