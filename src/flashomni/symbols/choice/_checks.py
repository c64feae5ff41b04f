"""Argument checks of the choice of symbols, of metadata alone: an error names the argument."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashomni.symbols.grid import Grid
from flashomni.symbols.symbols import Symbols

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_choose(q: Any, k: Any, grid: Any, progress: Any) -> None:
    """``q [B, M, H, D]`` and ``k [B, N, Hkv, D]`` of the grid, ``progress`` an fp32 scalar.

    Raises:
        ValueError: one is not.
    """
    if not isinstance(grid, Grid):
        raise ValueError(f"grid must be a Grid, got {type(grid).__name__}")
    for name, x, tokens in (("q", q, grid.seqlen_q), ("k", k, grid.seqlen_kv)):
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor of float32, float16 or bfloat16, got {got}")
        if x.ndim != 4 or x.shape[1] != tokens:
            raise ValueError(f"{name} must be [B, {tokens}, H, D], got {list(x.shape)}")
    (batch, _, heads, head_dim), kv_heads = q.shape, k.shape[2]
    if (k.shape[0], k.shape[3]) != (batch, head_dim) or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"k must be [{batch}, N, Hkv, {head_dim}] with Hkv dividing {heads}, "
            f"got {list(k.shape)}"
        )
    _check_device("k", k, q.device)
    if grid.kv_len is not None and grid.kv_len.shape[0] != batch:
        raise ValueError(f"kv_len of grid must be [{batch}], got {list(grid.kv_len.shape)}")
    if progress is None:
        return
    if not isinstance(progress, Tensor) or progress.dtype != torch.float32 or progress.ndim:
        raise ValueError(f"progress must be an fp32 scalar tensor, got {progress!r}")
    _check_device("progress", progress, q.device)


def check_scale(softmax_scale: Any) -> None:
    number = isinstance(softmax_scale, (int, float)) and not isinstance(softmax_scale, bool)
    if softmax_scale is not None and not (number and math.isfinite(softmax_scale)):
        raise ValueError(f"softmax_scale must be a finite number or None, got {softmax_scale!r}")


def check_symbols(symbols: Any) -> None:
    if not isinstance(symbols, Symbols):
        raise ValueError(f"symbols must be Symbols, got {type(symbols).__name__}")


def check_min_skip(min_skip: Any) -> None:
    number = isinstance(min_skip, (int, float)) and not isinstance(min_skip, bool)
    if not number or not 0.0 <= min_skip <= 1.0:
        raise ValueError(f"min_skip must be a number from 0 to 1, got {min_skip!r}")


def check_rows(rows: int, row_offset: int, grid: Grid) -> None:
    if rows < 1 or row_offset < 0 or row_offset + rows > grid.seqlen_q:
        raise ValueError(
            f"rows={rows} from row_offset={row_offset} on must be tokens of the {grid.seqlen_q} "
            "query tokens"
        )


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
