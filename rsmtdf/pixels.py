"""From uint8 views to what models see: normalisation and the one resize of the method, on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rsmtdf.specs import IMAGENET_MEAN, IMAGENET_STD


def normalise(
    pixels: torch.Tensor,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[b, 3, h, w] in `dtype`: (x / 255 - mean) / std of uint8 pixels [b, h, w, 3]."""
    x = pixels.permute(0, 3, 1, 2).to(dtype).div_(255)
    shape = (1, 3, 1, 1)
    mean_t = torch.tensor(mean, dtype=dtype, device=x.device).view(shape)
    std_t = torch.tensor(std, dtype=dtype, device=x.device).view(shape)
    return x.sub_(mean_t).div_(std_t).contiguous()


def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear, align_corners=True, no antialias (the paper's only resize); `x` itself where the size already fits."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
