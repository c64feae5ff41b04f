"""Where a stream lies among query blocks, and rectangles that cover its marked tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Rectangle(NamedTuple):
    """Rows ``[row, row_stop)`` of a stream and heads ``[head, head_stop)``: all marked."""

    row: int
    row_stop: int
    head: int
    head_stop: int


def rectangles(mask: Tensor, rows: int, row_offset: int, block_m: int) -> list[Rectangle]:
    """Disjoint rectangles that cover exactly the marked tiles.

    Args:
        mask: bool ``[H, Mb]`` on the CPU, about the whole sequence.
        rows: length of the stream.
        row_offset: where the stream starts in the sequence.
        block_m: tokens per query block.
    """
    first, count = stream_blocks(row_offset, rows, block_m)
    by_block = [tuple(column) for column in mask.T[first : first + count].tolist()]
    by_head = [tuple(row) for row in mask[:, first : first + count].tolist()]
    # Either merge equal rows of blocks first, or equal heads first: whichever needs fewer products.
    wide = [(i, i1, h, h1) for i, i1, p in _equal(by_block) for h, h1 in _marked(p)]
    tall = [(i, i1, h, h1) for h, h1, p in _equal(by_head) for i, i1 in _marked(p)]
    found = []
    for i, i1, h, h1 in min(wide, tall, key=len):
        start = max((first + i) * block_m - row_offset, 0)
        stop = min((first + i1) * block_m - row_offset, rows)
        found.append(Rectangle(start, stop, h, h1))
    return found


def _equal(patterns: list[tuple]) -> Iterator[tuple[int, int, tuple]]:
    """Maximal runs of equal neighbours, as ``(start, stop, pattern)``."""
    start = 0
    for stop in range(1, len(patterns) + 1):
        if stop == len(patterns) or patterns[stop] != patterns[start]:
            yield start, stop, patterns[start]
            start = stop


def _marked(pattern: tuple) -> Iterator[tuple[int, int]]:
    """Maximal runs of true, as ``(start, stop)``."""
    return ((start, stop) for start, stop, (bit,) in _equal([(bit,) for bit in pattern]) if bit)


def stream_blocks(row_offset: int, rows: int, block_m: int) -> tuple[int, int]:
    """First query block of a stream that starts at ``row_offset``, and how many it touches."""
    first = row_offset // block_m
    return first, -(-(row_offset + rows) // block_m) - first
