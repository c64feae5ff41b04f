"""Orders of tokens: how those of a picture or a video run through the sequence.

A block of 128 tokens in raster order is a few rows of one frame. In a compact order it is a patch,
in a video one that lasts, and what its tokens attend to is alike: blocks can be skipped for less.
An order is a permutation, applied once where tokens enter a model and undone where they leave it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, int, int]
ORDERS = ("raster", "tile", "hilbert")
PICTURE_TILE = (8, 16)  # rows and columns: a block of 128
VIDEO_TILE = (4, 4)  # of all frames: 8 frames are a block of 128


def permutation(shape: Shape, order: str) -> Tensor:
    """Where the tokens of a shape lie, in the order in which they run.

    Args:
        shape: ``(T, H, W)``: frames, rows and columns.
        order: ``raster``: frame by frame, row by row. ``tile``: tiles of 8 x 16 tokens of a
            picture, of 4 x 4 in all frames of a video, in raster order inside; tile rows run to and
            fro, and those at the edges are smaller where sides are no multiples. ``hilbert``: along
            a Hilbert curve, through frames, rows and columns alike.

    Returns:
        int64 ``[T * H * W]`` on the CPU: the i-th token is number ``permutation[i]`` in raster
        order. It may be shared: do not write to it.

    Raises:
        ValueError: the order is none of these.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if order == "raster":
        return torch.arange(math.prod(shape))
    return _tiles(shape) if order == "tile" else _hilbert(shape)


def coordinates(shape: Shape, order: str) -> Tensor:
    """Frame, row and column of the tokens, in the order in which they run: int64 ``[3, N]``."""
    _, height, width = shape
    place = permutation(shape, order)
    row = place // width
    return torch.stack([row // height, row % height, place % width])


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A table on the device, without waiting for it."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


def _tiles(shape: Shape) -> Tensor:
    frames, height, width = shape
    high, wide = PICTURE_TILE if frames == 1 else VIDEO_TILE
    row, column = torch.arange(height)[:, None] // high, torch.arange(width)[None] // wide
    across = -(-width // wide)
    column = torch.where(row % 2 == 0, column, across - 1 - column)  # the next tile is a neighbour
    tile = (row * across + column).expand(frames, height, width)
    return tile.flatten().argsort(stable=True)


class Edge(NamedTuple):
    """A side of a box, from its origin.

    Args:
        step: from a token to the next, in tokens of the raster; negative backwards.
        size: tokens.
    """

    step: int
    size: int

    @property
    def end(self) -> int:
        """From the first token to the last."""
        return self.step * (self.size - 1)

    @property
    def back(self) -> Edge:
        """The same tokens from the last one on."""
        return Edge(-self.step, self.size)

    def halves(self) -> tuple[Edge, Edge]:
        """Two parts; the first of even size where it can be, so that few steps are no neighbours'.

        A curve through an even number of rows can end beside where it began.
        """
        first = self.size // 2
        first += first % 2 if self.size > 2 else 0
        return Edge(self.step, first), Edge(self.step, self.size - first)


@functools.lru_cache(maxsize=32)
def _hilbert(shape: Shape) -> Tensor:
    """A Hilbert curve generalised to boxes of any size: consecutive tokens are (nearly all)
    neighbours, and any stretch of it is compact.

    A box is run through from its origin to the far end of its longest edge. It is halved along the
    edges that are long for the others, and the parts are run through in turn, each from where the
    one before ended (the construction of J. Cerveny's generalised Hilbert curves, 2018).
    """
    steps = (shape[1] * shape[2], shape[2], 1)
    edges = [Edge(*each) for each in zip(steps, shape, strict=True)]
    edges.sort(key=lambda edge: -edge.size)
    tokens = (
        token
        for start, edge in _lines(0, *edges)
        for token in range(start, start + edge.step * edge.size, edge.step)
    )
    return torch.tensor(list(tokens))


def _lines(origin: int, a: Edge, b: Edge, c: Edge) -> Iterator[tuple[int, Edge]]:
    """The curve through a box from its origin to the end of ``a``, as straight lines."""
    sides = [edge for edge in (a, b, c) if edge.size > 1]
    if len(sides) <= 1:
        yield origin, sides[0] if sides else a
    elif a.size == 1:
        yield from _lines(origin, b, c, a)
    else:
        for part in _parts(origin, a, b, c):
            yield from _lines(*part)


def _parts(origin: int, a: Edge, b: Edge, c: Edge) -> list[tuple[int, Edge, Edge, Edge]]:
    """Smaller boxes in the order in which the curve runs through them."""
    (a1, a2), (b1, b2), (c1, c2) = (edge.halves() for edge in (a, b, c))
    past_a, past_b, past_c = (
        origin + half.step * half.size for half in (a1, b1, c1)
    )  # where the second halves begin
    if 2 * a.size > 3 * max(b.size, c.size):
        return [(origin, a1, b, c), (past_a, a2, b, c)]
    if 3 * b.size > 4 * c.size:  # up along b, over, and down again
        return [
            (origin, b1, c, a1),
            (past_b, a, b2, c),
            (origin + a.end + b1.end, b1.back, c, a2.back),
        ]
    if 3 * c.size > 4 * b.size:
        return [
            (origin, c1, a1, b),
            (past_c, a, b, c2),
            (origin + a.end + c1.end, c1.back, a2.back, b),
        ]
    return [
        (origin, b1, c1, a1),
        (past_b, c, a1, b2),
        (origin + b1.end + c.end, a, b1.back, c2.back),
        (past_b + a.end + c.end, c.back, a2.back, b2),
        (origin + a.end + b1.end, b1.back, c1, a2.back),
    ]
