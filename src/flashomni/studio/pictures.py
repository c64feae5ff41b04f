"""Frames as pictures: one frame, how far two are apart, two videos side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from flashomni.lab import metrics, viz
from flashomni.lab.media import encode
from flashomni.lab.sheets import images
from flashomni.util.files import write_bytes

GAP = 4  # pixels between two videos
MAP = "magma"  # of FLIP, as its authors show it


def picture(frame: Tensor) -> Image.Image:
    """A frame ``[3, H, W]`` in [0, 1]; what is not finite is black."""
    return images(frame[None])[0]


def difference(dense: Tensor, accelerated: Tensor) -> tuple[Image.Image, float]:
    """The amplified difference of two frames, and the factor."""
    gap, factor = viz.difference(dense, accelerated)
    return picture(gap), factor


def flip(dense: Tensor, accelerated: Tensor) -> Image.Image | None:
    """The FLIP map of two frames, dark where nobody sees a difference; ``None`` without one."""
    if metrics.why_no_flip() is not None:
        return None
    try:
        values = metrics.flip_map(dense[None], accelerated[None])[0]
    except ValueError:  # what is not finite has no distance; the notes say so
        return None
    coloured = colormaps[MAP](values.numpy())[..., :3]
    return Image.fromarray((coloured * 255).round().astype(np.uint8))


def side_by_side(dense: Tensor | None, accelerated: Tensor, path: Path) -> Path:
    """A video as an animation, the dense one on its left if there is one; both always in step."""
    frames = accelerated
    if dense is not None:
        count, channels, height, _ = dense.shape
        bar = torch.ones(count, channels, height, GAP)
        frames = torch.cat([dense, bar, accelerated], dim=3)
    return write_bytes(path, encode(images(frames), "webp"))
