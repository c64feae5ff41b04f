"""Work lists of the GEMM kernels: every computed pair once, in order, whatever the strides."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from conftest import random_symbols
from flashomni.kernels.common.live_tiles import (
    HEAD_BITS,
    MAX_HEADS,
    TileRows,
    head_words,
    live_tiles,
)
from flashomni.symbols import Grid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
CASES = [
    # batch, heads, row_offset, rows, tail, block_m, density, shared by the batch and the heads
    (1, 24, 0, 4608, 0, 128, 0.5, False),
    (2, 5, 77, 1000, 300, 128, 0.3, False),
    (1, 64, 512, 40000, 0, 128, 0.1, False),
    (2, 33, 100, 3000, 0, 256, 0.5, False),
    (3, 7, 0, 130, 0, 384, 0.5, True),
    (1, 3, 5, 1, 0, 128, 0.0, False),
    (2, 64, 0, 300, 0, 128, 1.0, False),
    (1, 24, 0, 9000, 0, 128, 1.0, False),
    (2, 33, 100, 4000, 300, 256, 0.9, False),
    (2, 33, 100, 4000, 300, 256, 0.7, False),
    (1, 256, 0, 33000, 0, 128, 1.0, True),
]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.triton,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs a CUDA device or TRITON_INTERPRET=1",
    ),
]


@pytest.fixture(params=CASES, ids=str)
def problem(request):
    """``(symbols, tiles, heads of each tile row)``"""
    batch, heads, offset, rows, tail, block_m, density, shared = request.param
    grid = Grid(offset + rows + tail, offset + rows + tail, block_m=block_m)
    symbols = random_symbols(grid, *((1, 1) if shared else (batch, heads)), density)
    symbols = symbols.expand(batch, heads)
    tiles = TileRows.of(symbols, rows, offset)
    mask = symbols.q_mask()
    of_row = []
    for index in range(tiles.count):
        item, place = divmod(index, tiles.per_item)
        block = tiles.first_block + place // tiles.split
        assert (tiles.first_row + place * 128 + offset) // block_m == block
        of_row.append([head for head in range(heads) if mask[item, head, block]])
    return symbols.to(DEVICE), tiles, of_row


def test_live_tiles(problem):
    """Pairs row by row; of long lists of nearly all pairs, those of half of the heads first."""
    symbols, tiles, of_row = problem
    heads = symbols.num_heads
    every = tiles.count * heads
    is_halved = heads >= 16 and every >= 1584 and 4 * sum(map(len, of_row)) >= 3 * every
    half = -(-heads // 2) if is_halved else heads
    pairs = [
        row << HEAD_BITS.value | head
        for part in (range(half), range(half, heads))
        for row, live in enumerate(of_row)
        for head in live
        if head in part
    ]
    work = live_tiles(symbols, tiles)
    expected = [len(pairs), *pairs]
    assert work[: len(expected)].tolist() == expected


@pytest.mark.parametrize("cached", [False, True])
def test_head_words(problem, cached):
    """Sets of heads, of every tile row once, the largest first."""
    symbols, tiles, of_row = problem
    if symbols.num_heads > MAX_HEADS:
        pytest.skip("more heads than a word has bits")
    rows, words = head_words(symbols, tiles, cached=cached)
    assert sorted(rows.tolist()) == list(range(tiles.count))
    every = (1 << symbols.num_heads) - 1
    sizes = []
    for row, listed, others in zip(rows.tolist(), *words.tolist(), strict=True):
        live = sum(1 << head for head in of_row[row])
        expected = (every ^ live, live) if cached else (live, every ^ live)
        assert (listed % 2**64, others % 2**64) == expected
        sizes.append(expected[0].bit_count())
    assert sizes == sorted(sizes, reverse=True)
