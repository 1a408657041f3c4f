"""The dense prediction decoder: four token maps in, class scores at 8 x the patch grid out.

The design of DPT (Ranftl et al. 2021) in the size the paper uses: no batch norm, ReLU, every interpolation bilinear
with align_corners=True. The deepest fusion stage has one residual unit only: the published code builds a second one
that no gradient ever reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from rsmtdf.pixels import resize


def as_maps(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[b, d, rows, columns] of row-major tokens [b, rows*columns, d]."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))), 3x3 kernels, width unchanged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", x + self.conv2(F.relu(self.conv1(F.relu(x)))))


class RefineStage(nn.Module):
    """Adds a finer level to the path from below (where `has_skip`), refines, enlarges, mixes channels."""

    def __init__(self, width: int, *, has_skip: bool) -> None:
        super().__init__()
        self.skip_unit = ResidualUnit(width) if has_skip else None
        self.unit = ResidualUnit(width)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, path: torch.Tensor, skip: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
        if self.skip_unit is not None:
            path = path + self.skip_unit(skip)
        return cast("torch.Tensor", self.mix(resize(self.unit(path), size)))


class DptDecoder(nn.Module):
    """Class scores [b, classes, 8 gh, 8 gw] from four token maps [b, gh*gw, dim]."""

    def __init__(self, *, dim: int, channels: tuple[int, int, int, int], features: int, classes: int) -> None:
        super().__init__()
        c1, c2, _, c4 = channels
        self.project = nn.ModuleList(nn.Conv2d(dim, c, 1) for c in channels)
        self.rescale = nn.ModuleList(
            [
                nn.ConvTranspose2d(c1, c1, 4, stride=4),
                nn.ConvTranspose2d(c2, c2, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(c4, c4, 3, stride=2, padding=1),
            ]
        )
        self.reduce = nn.ModuleList(nn.Conv2d(c, features, 3, padding=1, bias=False) for c in channels)
        self.refine = nn.ModuleList(RefineStage(features, has_skip=level < 3) for level in range(4))
        self.predict = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1), nn.ReLU(), nn.Conv2d(features, classes, 1)
        )

    def forward(self, tokens: Sequence[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        """`tokens`: four maps, shallow to deep, row-major over `grid` (rows, columns)."""
        levels = []
        for level, x in enumerate(tokens):
            maps = as_maps(x, grid)
            levels.append(self.reduce[level](self.rescale[level](self.project[level](maps))))
        sizes = [(int(x.shape[-2]), int(x.shape[-1])) for x in levels]
        path = self.refine[3](levels[3], None, sizes[2])
        path = self.refine[2](path, levels[2], sizes[1])
        path = self.refine[1](path, levels[1], sizes[0])
        path = self.refine[0](path, levels[0], (2 * sizes[0][0], 2 * sizes[0][1]))
        return cast("torch.Tensor", self.predict(path))
