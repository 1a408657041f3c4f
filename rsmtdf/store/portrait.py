"""Features made visible: the first three principal components of a teacher's tokens as red, green and blue.

Channels are standardised and clipped first, or the picture would show a few massive channels and artefact tokens
(reference/store_measurements, section 2). Signs are fixed, so the same features always give the same picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CLIP_STDS = 3.0
PERCENTILES = (1, 99)
CELL_PX, GAP_PX, HEAD_PX = 296, 12, 46
INK, FAINT, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One column of the picture."""

    title: str
    subtitle: str
    images: np.ndarray
    """uint8 [views, h, w, 3]."""


def pca_rgb(features: np.ndarray) -> np.ndarray:
    """uint8 [views, gh, gw, 3] of features [views, gh, gw, dim]: components 1 to 3 over all tokens of all views."""
    shape, dim = features.shape[:3], features.shape[3]
    x = features.reshape(-1, dim).astype(np.float64)
    # By percentiles: a single artefact token would inflate every channel's mean and deviation.
    low, middle, high = np.percentile(x, (16, 50, 84), axis=0)
    spread = (high - low) / 2
    x = np.clip((x - middle) / np.maximum(spread, max(1e-3 * np.median(spread), 1e-9)), -CLIP_STDS, CLIP_STDS)
    x -= x.mean(axis=0)
    _, vectors = np.linalg.eigh(x.T @ x)
    axes = vectors[:, ::-1][:, :3]
    # An eigenvector has no sign of its own: its largest entry is made positive.
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    shown = x @ axes
    low, high = np.percentile(shown, PERCENTILES, axis=0)
    scaled = np.clip((shown - low) / np.maximum(high - low, 1e-12), 0, 1)
    rgb = np.zeros((len(x), 3), np.uint8)
    rgb[:, : scaled.shape[1]] = np.rint(255 * scaled)
    return rgb.reshape(*shape, 3)


def contact_sheet(panels: Sequence[Panel], *, captions: Sequence[str], title: str, note: str) -> Image.Image:
    """The panels side by side, a view per row under its caption.

    Args:
        panels: of equally many images.
        captions: one per view.
        title: the first line.
        note: the last one.
    """
    head, body, small = (ImageFont.load_default(px) for px in (18, 14, 12))
    top, line = HEAD_PX + 40, 22
    width = GAP_PX + len(panels) * (CELL_PX + GAP_PX)
    height = top + len(captions) * (CELL_PX + line + GAP_PX) + 26
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP_PX, 12), _fitted(title, head, width - 2 * GAP_PX), fill=INK, font=head)
    for column, panel in enumerate(panels):
        x = GAP_PX + column * (CELL_PX + GAP_PX)
        draw.text((x, HEAD_PX - 2), _fitted(panel.title, body, CELL_PX), fill=INK, font=body)
        draw.text((x, HEAD_PX + 16), _fitted(panel.subtitle, small, CELL_PX), fill=FAINT, font=small)
        for row, pixels in enumerate(panel.images):
            y = top + row * (CELL_PX + line + GAP_PX)
            image = Image.fromarray(pixels)
            # Tokens stay squares; photographs are resampled.
            how = Image.Resampling.NEAREST if max(image.size) < CELL_PX else Image.Resampling.LANCZOS
            scale = CELL_PX / max(image.size)
            size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
            sheet.paste(image.resize(size, how), (x, y))
    for row, caption in enumerate(captions):
        y = top + row * (CELL_PX + line + GAP_PX) + CELL_PX + 4
        draw.text((GAP_PX, y), _fitted(caption, small, width - 2 * GAP_PX), fill=INK, font=small)
    draw.text((GAP_PX, height - 22), _fitted(note, small, width - 2 * GAP_PX), fill=FAINT, font=small)
    return sheet


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text`, cut where it is too long."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
