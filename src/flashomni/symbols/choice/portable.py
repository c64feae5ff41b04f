"""Block means and threshold choices as Triton kernels: the ops of ``op.py`` on a GPU.

A choice on a row of masses needs no sort. Floats that are not negative order like their bits, so
the bits of the threshold are found one after the other, from the top, each by one masked sum over
the row in registers. The chosen entries leave as packed bits.

Ties at the threshold go by index, as a stable sort would have it: of equal masses the first count
as the lightest for ``light`` and as the heaviest for ``most``. Sums are in fp64, where the order of
addition does not matter to a choice, so that both ways of choosing agree.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashomni import triton_host
from flashomni.dispatch import register
from flashomni.symbols.choice.op import HeaviestCall, HeavyCall, MeansCall

MAX_COLUMNS = 16384  # of a row that a program holds in registers
MAX_TILE = 128  # tokens that a program of `block_means` loads at once


@triton.jit(do_not_specialize=["seqlen"])
def _means_kernel(
    x, length, means, stride_b, stride_s, stride_h, seqlen, BLOCK: tl.constexpr,
    TILE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, IS_UNIT: tl.constexpr,
):  # fmt: skip
    block, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    limit = seqlen
    if length is not None:
        limit = tl.minimum(tl.load(length + b), seqlen)
    dim = tl.arange(0, PADDED_DIM)
    x += b * stride_b + h.to(tl.int64) * stride_h + dim[None, :]
    total = tl.zeros([PADDED_DIM], tl.float32)
    for start in range(0, BLOCK, TILE):
        place = start + tl.arange(0, TILE)
        token = block * BLOCK + place
        inside = ((place < BLOCK) & (token < limit))[:, None] & (dim < HEAD_DIM)[None, :]
        tile = tl.load(x + token.to(tl.int64)[:, None] * stride_s, mask=inside, other=0.0)
        tile = tile.to(tl.float32)
        if IS_UNIT:
            norm = tl.sqrt(tl.sum(tile * tile, 1))
            tile = tile / tl.maximum(norm, 1e-12)[:, None]
        total += tl.sum(tile, 0)
    count = tl.maximum(tl.minimum(limit - block * BLOCK, BLOCK), 1)
    row = (b * tl.num_programs(1) + h) * tl.num_programs(0) + block
    tl.store(means + row * HEAD_DIM + dim, total / count, mask=dim < HEAD_DIM)


@triton.jit
def _load_row(mass, columns, COLUMNS: tl.constexpr):
    """``(values, their bits, which exist)`` of one row; 0 where there is no column."""
    column = tl.arange(0, COLUMNS)
    value = tl.load(
        mass + tl.program_id(0).to(tl.int64) * columns + column, mask=column < columns, other=0.0
    )
    return value, value.to(tl.int32, bitcast=True), column < columns


@triton.jit
def _store_bits(bits, chosen, num_bytes, COLUMNS: tl.constexpr):
    """Pack a row of choices, eight to a byte, little endian."""
    bit = tl.reshape(chosen.to(tl.int32), [COLUMNS // 8, 8]) << tl.arange(0, 8)[None, :]
    byte = tl.arange(0, COLUMNS // 8)
    at = tl.program_id(0).to(tl.int64) * num_bytes + byte
    tl.store(bits + at, tl.sum(bit, 1).to(tl.uint8), mask=byte < num_bytes)


@triton.jit(do_not_specialize=["columns", "num_bytes"])
def _heavy_kernel(mass, tau, bits, columns, num_bytes, COLUMNS: tl.constexpr):
    value, code, exists = _load_row(mass, columns, COLUMNS)
    wide = value.to(tl.float64)
    limit = tl.load(tau).to(tl.float64) * tl.sum(wide, 0)
    # The largest code below which the entries together hold at most the limit.
    edge = 0
    for step in range(31):
        trial = edge | (1 << (30 - step))
        below = tl.sum(tl.where(code < trial, wide, 0.0), 0)
        edge = tl.where(below <= limit, trial, edge)
    below = tl.sum(tl.where(code < edge, wide, 0.0), 0)
    tied = code == edge
    rank = tl.cumsum(tied.to(tl.int32), 0)
    light = (code < edge) | (tied & (below + rank.to(tl.float64) * wide <= limit))
    _store_bits(bits, exists & (light == 0), num_bytes, COLUMNS)


@triton.jit(do_not_specialize=["columns", "num_bytes", "count"])
def _most_kernel(mass, bits, columns, num_bytes, count, COLUMNS: tl.constexpr):
    _, code, exists = _load_row(mass, columns, COLUMNS)
    # The largest code that as many entries reach.
    edge = 0
    for step in range(31):
        trial = edge | (1 << (30 - step))
        reach = tl.sum((exists & (code >= trial)).to(tl.int32), 0)
        edge = tl.where(reach >= count, trial, edge)
    above = exists & (code > edge)
    tied = exists & (code == edge)
    room = count - tl.sum(above.to(tl.int32), 0)
    chosen = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    _store_bits(bits, chosen, num_bytes, COLUMNS)


def block_means(x: Tensor, block: int, length: Tensor | None, *, unit: bool) -> Tensor:
    """Like :func:`flashomni.symbols.pool`; with ``unit``, of the tokens scaled to length 1."""
    batch, seqlen, num_heads, head_dim = x.shape
    means = torch.empty(
        batch, num_heads, -(-seqlen // block), head_dim, dtype=torch.float32, device=x.device
    )
    _means(x, length, means, block, unit)
    return means


def heavy(mass: Tensor, tau: Tensor, num_bytes: int) -> Tensor:
    """``pack_bits(~low_mass(mass, tau), num_bytes)``."""
    bits = torch.empty(*mass.shape[:-1], num_bytes, dtype=torch.uint8, device=mass.device)
    _heavy(mass, tau, bits)
    return bits


def most(mass: Tensor, count: int, num_bytes: int) -> Tensor:
    """``pack_bits(heaviest(mass, count), num_bytes)``."""
    bits = torch.empty(*mass.shape[:-1], num_bytes, dtype=torch.uint8, device=mass.device)
    _most(mass, bits, count)
    return bits


def _means(x: Tensor, length: Tensor | None, means: Tensor, block: int, unit: bool) -> None:
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, num_heads, num_blocks, head_dim = means.shape
    with torch.cuda.device_of(x):
        _means_kernel[(num_blocks, num_heads, batch)](
            x, length, means, *x.stride()[:3], x.shape[1], BLOCK=block,
            TILE=min(triton.next_power_of_2(block), MAX_TILE), HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(head_dim), IS_UNIT=unit, num_warps=4,
        )  # fmt: skip


def _heavy(mass: Tensor, tau: Tensor, bits: Tensor) -> None:
    with torch.cuda.device_of(mass):
        _heavy_kernel[_rows(bits)](
            mass.contiguous(), tau, bits, mass.shape[-1], bits.shape[-1], **_width(bits)
        )


def _most(mass: Tensor, bits: Tensor, count: int) -> None:
    with torch.cuda.device_of(mass):
        _most_kernel[_rows(bits)](
            mass.contiguous(), bits, mass.shape[-1], bits.shape[-1], count, **_width(bits)
        )


def _rows(bits: Tensor) -> tuple[int]:
    return (bits.numel() // bits.shape[-1],)


def _width(bits: Tensor) -> dict[str, int]:
    columns = max(16, triton.next_power_of_2(8 * bits.shape[-1]))
    return {"COLUMNS": columns, "num_warps": min(max(columns // 1024, 1), 16)}


def _refuses(call: Any) -> list[str]:
    tensor = call.x if isinstance(call, MeansCall) else call.mass
    device, runs_on = tensor.device.type, "cpu" if triton_host.INTERPRETED else "cuda"
    reasons = (
        [] if device == runs_on else [f"tensors are on {device}, this backend is for {runs_on}"]
    )
    if not isinstance(call, MeansCall) and 8 * call.num_bytes > MAX_COLUMNS:
        reasons.append(f"rows must have at most {MAX_COLUMNS} columns, got {8 * call.num_bytes}")
    return reasons


def _register(op: str) -> Any:
    return register(
        op, "portable", rank=triton_host.RANK, refuses=_refuses, available=triton_host.available,
        serves=("sm90",), device=triton_host.DEVICE,
    )  # fmt: skip


@_register("block_means")
def _run_means(call: MeansCall) -> Tensor:
    return block_means(call.x, call.block, call.length, unit=call.unit)


@_register("heavy_bits")
def _run_heavy(call: HeavyCall) -> Tensor:
    return heavy(call.mass, call.tau, call.num_bytes)


@_register("heaviest_bits")
def _run_heaviest(call: HeaviestCall) -> Tensor:
    return most(call.mass, call.count, call.num_bytes)
