"""What the two Hopper GEMMs share: a ring of TMA loads and two warpgroups that take turns.

One CTA runs on each SM. A producer warp fills a ring of slots, each a step of 64 along K: 128 rows
of the left operand and up to 128 rows of the weight. Two consumer warpgroups own whole output
tiles: tile t of the CTA belongs to warpgroup t % 2, so that the epilogue of one runs under the
main loop of the other.

Steps are numbered over all tiles of the CTA: step s lies in slot s % STAGES, in its use number
s // STAGES. Every role walks the same list of tiles and so knows every number by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashomni.dispatch import not_on
from flashomni.kernels.common.hopper import (
    is_hopper,
    layout_refusals,
    tma_load,
    tma_store,
    view_as,
)
from flashomni.kernels.common.live_tiles import TILE_M

TILE_K = 64
HALF_M = TILE_M // 2  # rows of an output tile that leave together
PRODUCER_REGISTERS = gl.constexpr(24)
CONSUMER_REGISTERS = gl.constexpr(240)
DTYPES = (torch.bfloat16, torch.float16)


def refuse_dtype(name: str, tensor: Tensor) -> list[str]:
    got = str(tensor.dtype).removeprefix("torch.")
    return [] if tensor.dtype in DTYPES else [f"{name} must be bfloat16 or float16, got {got}"]


def refuse_strides(name: str, tensor: Tensor | None) -> list[str]:
    return [] if tensor is None else layout_refusals(name, tensor)


def refuse_contiguous(name: str, vector: Tensor | None) -> list[str]:
    contiguous = vector is None or vector.stride(-1) == 1 or vector.shape[-1] == 1
    return [] if contiguous else [f"{name} must have a contiguous last dim"]


def refuse_call(out: Tensor, block_m: int, head_dim: int, head_dims: Sequence[int]) -> list[str]:
    """What both GEMMs refuse: where the tensors are, the block, the head."""
    reasons = []
    if out.device.type != "cuda":
        return not_on("cuda", out)
    if not is_hopper(out.device.index):
        return [f"{out.device} is not of compute capability 9.0"]
    if block_m % TILE_M:
        reasons.append(f"block_m must be a multiple of {TILE_M}, got {block_m}")
    if head_dim not in head_dims:
        allowed = " or ".join(str(size) for size in head_dims)
        reasons.append(f"head_dim must be {allowed}, got {head_dim}")
    return reasons


def descriptor(tensor: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """A TMA descriptor; a dim of size 1 may have any stride."""
    bits = 8 * tensor.element_size()
    strides = [
        128 // bits if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    strides[-1] = 1
    layout = gl.NVMMASharedLayout(128, bits, len(block))
    return TensorDescriptor(tensor, list(tensor.shape), strides, list(block), layout)


def cut_descriptor(
    tensor: Tensor, rows_dim: int, first_row: int, block: Sequence[int]
) -> TensorDescriptor | None:
    """For the tile row that starts before the stream: the rows of ``tensor`` that it holds."""
    rows = first_row % TILE_M
    if rows == 0:
        return None
    return descriptor(tensor.narrow(rows_dim, 0, min(rows, tensor.shape[rows_dim])), block)


def stages(tile_n: int) -> int:
    """Slots that fit beside the output buffers in 227 KB of shared memory."""
    slot = (TILE_M + tile_n) * TILE_K * 2
    return (224 * 1024 - 2 * TILE_M * tile_n * 2) // slot


@gluon.jit
def make_barriers(COUNT: gl.constexpr):
    """``COUNT`` barriers of one arrival each."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    slot = slot + 1
    wrap = slot == STAGES
    return gl.where(wrap, 0, slot), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def load_step(
    a_desc, b_desc, a_ring, b_ring, full, empty, item, head, row, column, b_row, b_column,
    slot, phase, STAGES: gl.constexpr,
):  # fmt: skip
    """Producer: fill the next slot when its last use is over."""
    bar = full.index(slot)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(bar, a_desc.block_type.nbytes + b_desc.block_type.nbytes)
    tma_load(a_desc, [item, head, row, column], bar, a_ring.index(slot))
    tma_load(b_desc, [b_row, b_column], bar, b_ring.index(slot))
    return advance(slot, phase, STAGES)


@gluon.jit
def new_accumulator(TILE_N: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    return gl.zeros([128, TILE_N], gl.float32, layout=layout)


@gluon.jit
def await_turn(order, turn, WG: gl.constexpr):
    """Wait until the other warpgroup has seen every step before ours.

    Not for speed alone: a barrier of the ring has one phase bit, so a warpgroup that waited for a
    slot before its previous use was seen would take that one for its own.
    """
    mbarrier.wait(order.index(WG), (turn & 1) ^ (1 - WG))


@gluon.jit
def accumulate(acc, a_ring, b_ring, full, empty, first, count, STAGES: gl.constexpr, running=0):
    """Add steps ``first .. first + count`` onto ``acc``; the last product may still be running.

    ``running`` is not zero where the product of the step before ``first`` may be: a tile whose
    steps are added in several calls, with one :func:`finish` after the last.
    """
    slot = first % STAGES
    phase = (first // STAGES) & 1
    for k in range(count):
        mbarrier.wait(full.index(slot), phase)
        a = a_ring.index(slot).reshape([128, 64])
        acc = warpgroup_mma(a, b_ring.index(slot).permute((1, 0)), acc, is_async=True)
        # One product stays in flight; the one before it is over, and with it the use of its slot.
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        mbarrier.arrive(
            empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)), pred=k + running > 0
        )
        slot, phase = advance(slot, phase, STAGES)
    return acc


@gluon.jit
def finish(acc, empty, first, count, STAGES: gl.constexpr):
    """Wait for the last product of :func:`accumulate` and give its slot back."""
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(empty.index((first + count + STAGES - 1) % STAGES), pred=count > 0)
    return acc


@gluon.jit
def pass_turn(order, WG: gl.constexpr):
    mbarrier.arrive(order.index(1 - WG))


@gluon.jit
def halves(acc):
    """The two runs of 64 rows of a tile; each thread has the same columns of both."""
    columns: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = acc.type.layout
    top, bottom = gl.split(gl.permute(gl.reshape(acc, [2, 64, columns]), (1, 2, 0)))
    top = gl.convert_layout(top, layout, assert_trivial=True)
    return top, gl.convert_layout(bottom, layout, assert_trivial=True)


@gluon.jit
def row_index(x):
    return gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, x.type.layout))


@gluon.jit
def column_index(x):
    return gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))


@gluon.jit
def place_rows(tile_row, tiles_per_item, first_row, rows):
    """Batch item and first row of a tile row, and whether it is cut off by the stream's start.

    The copy engine stores nothing at a negative row (an illegal instruction), so a tile row that
    starts before the stream is computed from row 0 on, and stored through a descriptor that ends
    where the tile row does. One that also ends before the stream is put behind it, where nothing
    is stored.
    """
    item = tile_row // tiles_per_item
    row = first_row + (tile_row - item * tiles_per_item) * 128
    is_cut = (row < 0) & (row > -128)
    row = gl.where(row <= -128, rows, gl.maximum(row, 0))
    return item, row, is_cut


@gluon.jit
def store_half(x, desc, cut_desc, is_cut, buffer, c0, c1, c2, c3):
    """Send 64 rows of fp32 to memory through shared memory; the copy goes on afterwards.

    ``cut_desc`` is for tile rows that are cut off; there are none where it is ``None``.
    """
    staged = view_as(buffer, desc)
    staged.reshape([x.shape[0], x.shape[1]]).store(x.to(desc.dtype))
    fence_async_shared()
    if cut_desc is None:
        tma_store(desc, [c0, c1, c2, c3], staged)
    elif is_cut:
        tma_store(cut_desc, [c0, c1, c2, c3], staged)
    else:
        tma_store(desc, [c0, c1, c2, c3], staged)
