"""Launches of the kernels that make the masses of :func:`fine_map`, in chunks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from flashomni.symbols.choice._fine_kernels import map_kernel, means_kernel
from flashomni.symbols.choice._pool import is_text_last
from flashomni.symbols.grid import Grid

MAX_BYTES = 2**27  # of masses that are held at a time, those of parts among them
MAX_TILE = 16  # tokens that the one warp of `means_kernel` loads at once, if a part has no more
TILE = 128  # query and key parts of a product
WIDTH = 64  # key blocks whose masses it reads at once
REGISTERS = 128  # of a thread: two programs of `map_kernel` share a multiprocessor


class FineMap:
    """Means of q and k, and masses of block pairs made from them.

    Args:
        q: ``[B, M, H, D]``, last dim contiguous.
        k: ``[B, N, Hkv, D]`` likewise.
        grid: of both.
        resolution: tokens of a mean.
        scale: of the scores.
        gated: whether similarities of blocks are stored too.
        scratch: where: ``q_similarity`` and ``k_similarity``.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        grid: Grid,
        resolution: int,
        scale: float,
        gated: bool,
        scratch: dict[str, Tensor | None],
    ) -> None:
        self._grid, self._size = grid, resolution
        (batch, seqlen_q, self._num_heads, head_dim), kv_heads = q.shape, k.shape[2]
        self._batch, self._group = batch, self._num_heads // kv_heads
        counts = [triton.cdiv(n, resolution) for n in (seqlen_q, grid.seqlen_kv)]
        half: dict[str, Any] = {"dtype": torch.float16, "device": q.device}
        self._q_means = torch.empty(batch, self._num_heads, counts[0], head_dim, **half)
        self._k_means = torch.empty(batch, kv_heads, counts[1], head_dim, **half)
        rows, columns = grid.num_q_blocks, grid.num_kv_blocks
        self._shared: dict[str, Any] = {
            "SIZE": resolution, "HEAD_DIM": head_dim,
            "PADDED_DIM": max(16, triton.next_power_of_2(head_dim)),
            "PADDED_Q": grid.kv_len is not None and is_text_last(grid),
        }  # fmt: skip
        means_kernel[(rows + columns, self._num_heads, batch)](
            q, k, grid.kv_len, self._q_means, self._k_means, scratch["q_similarity"],
            scratch["k_similarity"], *q.stride()[:3], *k.stride()[:3], scale, seqlen_q,
            grid.seqlen_kv, rows, columns, *counts, kv_heads, BLOCK_M=grid.block_m,
            BLOCK_N=grid.block_n, PARTS=max(1, MAX_TILE // resolution), GATED=gated, num_warps=1,
            **self._shared,
        )  # fmt: skip

    def chunks(self, tile: int) -> Iterator[tuple[int, int, Tensor]]:
        """First query block, number of them, and their masses, fp32 ``[B, H, number, Nb]``.

        The memory of one chunk is used again by the next.

        Args:
            tile: chunks begin at multiples of so many query blocks.
        """
        grid, size = self._grid, self._size
        rows, columns = grid.num_q_blocks, grid.num_kv_blocks
        parts = grid.block_m // size, grid.block_n // size
        padded = [triton.next_power_of_2(count) for count in parts]
        tiles = max(_row_tile(self._q_means.device), padded[0]), max(TILE, padded[1])
        blocks = tiles[0] // padded[0]  # of a program
        fit = MAX_BYTES // (4 * self._batch * self._num_heads * columns * (padded[0] + 1))
        step = min(rows, max(tile, fit // tile * tile))
        heads = self._batch, self._num_heads
        new = self._q_means.new_empty
        memory = new(math.prod(heads) * step * columns, dtype=torch.float32)
        held = math.prod(heads) * triton.cdiv(step, blocks) * tiles[0]  # rows
        sums = new(held * columns, dtype=torch.float32)
        maxima = new(held * triton.cdiv(columns * padded[1], tiles[1]), dtype=torch.float32)
        limit = {"maxnreg": REGISTERS} if memory.is_cuda and tiles[0] == TILE else {}
        for start in range(0, rows, step):
            count = min(step, rows - start)
            masses = memory[: math.prod(heads) * count * columns].view(*heads, count, columns)
            map_kernel[(triton.cdiv(count, blocks), self._num_heads, self._batch)](
                self._q_means, self._k_means, grid.kv_len, sums, maxima, masses, grid.seqlen_q,
                grid.seqlen_kv, rows, columns, self._q_means.shape[2], self._k_means.shape[2],
                self._group, start, count, Q_PARTS=parts[0], Q_PADDED=padded[0], K_PARTS=parts[1],
                K_PADDED=padded[1], ROWS=tiles[0], COLUMNS=tiles[1], WIDTH=WIDTH, num_warps=8,
                num_stages=2, **limit, **self._shared,
            )  # fmt: skip
            yield start, count, masses


def _row_tile(device: torch.device) -> int:
    """Query parts of a program; half as many where products need more registers."""
    if device.type != "cuda":
        return TILE
    nvidia = torch.version.hip is None
    roomy = nvidia and torch.cuda.get_device_capability(device) >= (9, 0)
    return TILE if roomy else TILE // 2
