"""The density map as a picture: a row for each block, a column for each call of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni.engine.trace import Summary

LEFT_OUT, CACHED, COMPUTED = (0.13, 0.13, 0.16), (0.16, 0.33, 0.58), (0.99, 0.82, 0.35)
WIDTH, HEIGHT = 960, 640  # at least, as far as whole pixels go


def density(report: Summary) -> Tensor:
    """What was computed: ``[layers, calls]``, 1 for all of a block, 0 for none, -1 for a layer
    that the call did not come to because the whole model was left out.

    Of a block that ran, the mean of the share of query rows and of pairs of its attention.
    """
    names = {name: i for i, name in enumerate(report.layers)}
    found = torch.full((max(len(names), 1), max(len(report.steps), 1)), -1.0)
    for column, step in enumerate(report.steps):
        each = zip(step["layer_kinds"], step["q_density"], step["kv_density"], strict=True)
        for row, (kind, q, kv) in enumerate(each):
            found[row, column] = 0.0 if kind == "bypass" else (q + q * kv) / 2
    return found


def draw(report: Summary) -> Tensor:
    """The map as ComfyUI's IMAGE: fp32 ``[1, height, width, 3]`` in 0..1; bright is computed."""
    values = density(report)
    low, high = torch.tensor(CACHED), torch.tensor(COMPUTED)
    share = values.clamp(0, 1)[..., None]
    cells = torch.where(values[..., None] < 0, torch.tensor(LEFT_OUT), low + share * (high - low))
    tall, wide = (
        max(1, -(-size // n)) for size, n in zip((HEIGHT, WIDTH), values.shape, strict=True)
    )
    pixels = cells.repeat_interleave(tall, 0).repeat_interleave(wide, 1)
    if tall > 3:
        pixels[::tall] *= 0.6  # a line between blocks
    if wide > 3:
        pixels[:, ::wide] *= 0.6
    return pixels[None]


LEGEND = (
    "picture: a row for each block (top: first), a column for each call of the model (left: first);"
    " yellow computed, blue cached, between in part, black not come to because the whole model was"
    " left out"
)
