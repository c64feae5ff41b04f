"""GEMM-Q on Hopper: a persistent kernel over the computed (tile row, head) pairs.

A pair is an output tile of 128 tokens and one head: bias, RMSNorm over the head and RoPE are done
on the fp32 accumulators. Pairs are dealt out round by round, 132 at a time and row by row, so that
the CTAs share the rows of x and the weight in L2. A last, partly filled round leaves CTAs idle:
cutting its tiles along K was tried and cost more than it gained at every size.

Letters in shapes: B batch, R rows of x, K in_features, H num_heads, D head_dim.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from flashomni.dispatch import register
from flashomni.kernels.common import hopper_gemm as hopper
from flashomni.kernels.common.hopper import (
    hopper_refusals,
    num_multiprocessors,
    on_device,
    thread_barrier,
    tma_load,
    view_as,
)
from flashomni.kernels.common.hopper_gemm import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    accumulate,
    await_turn,
    column_index,
    finish,
    halves,
    load_step,
    make_barriers,
    new_accumulator,
    pass_turn,
    place_rows,
    row_index,
    store_half,
)
from flashomni.kernels.common.live_tiles import HEAD_BITS, TILE_M, TileRows, live_tiles
from flashomni.kernels.gemm_q.op import GemmQCall

HEAD_DIMS = (64, 128)


@gluon.jit
def _place(entry, tiles_per_item, first_row, rows):
    """Batch item, first row and head of a pair, and whether it begins before the stream."""
    item, row, is_cut = place_rows(entry >> HEAD_BITS, tiles_per_item, first_row, rows)
    return item, row, entry & ((1 << HEAD_BITS) - 1), is_cut


@gluon.jit
def _producer(
    x_desc, w_desc, a_ring, b_ring, full, empty, work_ptr, num_k, tiles_per_item, first_row, rows,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    num_tiles = gl.load(work_ptr)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    tile = gl.program_id(0)
    entry = gl.load(work_ptr + 1 + tile)
    while tile < num_tiles:
        item, row, head, _ = _place(entry, tiles_per_item, first_row, rows)
        tile += gl.num_programs(0)
        # The next entry is fetched while this tile's loads are issued.
        entry = gl.load(work_ptr + 1 + gl.minimum(tile, num_tiles - 1))
        for k in range(num_k):
            slot, phase = load_step(
                x_desc, w_desc, a_ring, b_ring, full, empty, item, 0, row, k * 64, head * D, k * 64,
                slot, phase, STAGES,
            )  # fmt: skip


@gluon.jit
def _pairs(x, APART: gl.constexpr):
    """``[rows, D]`` as ``[rows, D / 2, 2]``: both members of a pair lie within a thread."""
    if APART:
        return gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1))
    else:
        return gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2])


@gluon.jit
def _load_entries(a, row, cos_ptr, sin_ptr, rows, STRIDE_M: gl.constexpr, STRIDE_D: gl.constexpr):
    """cos and sin ``[rows, D / 2]`` of each pair, from anywhere."""
    token = row + row_index(a)
    mask = ((token >= 0) & (token < rows))[:, None]
    at = token.to(gl.int64)[:, None] * STRIDE_M + column_index(a)[None, :] * STRIDE_D
    cos = gl.load(cos_ptr + at, mask=mask, other=0.0)
    return cos, gl.load(sin_ptr + at, mask=mask, other=0.0)


@gluon.jit
def _fetch_table(rope_desc, buffers, bar, row):
    """Start the copy of 64 rows of packed tables into both output buffers."""
    mbarrier.expect(bar, rope_desc.block_type.nbytes)
    tma_load(rope_desc, [row, 0], bar, _table(rope_desc, buffers))


@gluon.jit
def _table(rope_desc, buffers):
    return view_as(buffers, rope_desc)


@gluon.jit
def _rotate(
    x, row, rope_desc, cos_ptr, sin_ptr, buffers, bar, rows,
    APART: gl.constexpr, STRIDE_M: gl.constexpr, STRIDE_D: gl.constexpr, PHASE: gl.constexpr,
):  # fmt: skip
    """RoPE: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = gl.split(_pairs(x, APART))
    if rope_desc is None:
        cos, sin = _load_entries(a, row, cos_ptr, sin_ptr, rows, STRIDE_M, STRIDE_D)
    else:
        # A row of the table has cos and sin of a pair where a row of x has its two members.
        mbarrier.wait(bar, PHASE)
        cos, sin = gl.split(_pairs(_table(rope_desc, buffers).load(x.type.layout), APART))
        thread_barrier()  # all have read: the buffers may be written
    turned = gl.join(a * cos - b * sin, b * cos + a * sin)
    if APART:
        turned = gl.permute(turned, (0, 2, 1))
    turned = gl.reshape(turned, [x.shape[0], x.shape[1]])
    return gl.convert_layout(turned, x.type.layout, assert_trivial=True)


@gluon.jit
def _normalise(x, head, bias_ptr, norm_ptr, norm_eps, NORM: gl.constexpr):
    """Bias and RMSNorm."""
    D: gl.constexpr = x.shape[1]
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + head * D + column_index(x))
        x = x + bias.to(gl.float32)[None, :]
    if NORM:
        x = x * gl.rsqrt(gl.sum(x * x, axis=1) * (1.0 / D) + norm_eps)[:, None]
        if norm_ptr is not None:
            x = x * gl.load(norm_ptr + column_index(x)).to(gl.float32)[None, :]
    return x


@gluon.jit
def _consumer(
    out_desc, cut_desc, rope_desc, a_ring, b_ring, buffers, full, empty, order, ready, bias_ptr,
    norm_ptr, norm_eps, cos_ptr, sin_ptr, work_ptr, rows, num_k, tiles_per_item, first_row,
    D: gl.constexpr, NORM: gl.constexpr, ROPE: gl.constexpr, STAGES: gl.constexpr,
    WG: gl.constexpr,
):  # fmt: skip
    num_tiles = gl.load(work_ptr)
    turn = gl.to_tensor(WG)  # tiles of this CTA before this one
    tile = gl.program_id(0) + WG * gl.num_programs(0)
    entry = gl.load(work_ptr + 1 + gl.minimum(tile, gl.maximum(num_tiles - 1, 0)))
    while tile < num_tiles:
        item, row, head, is_cut = _place(entry, tiles_per_item, first_row, rows)
        tile += 2 * gl.num_programs(0)
        entry = gl.load(work_ptr + 1 + gl.minimum(tile, num_tiles - 1))  # of our next tile
        if rope_desc is not None:
            tma.store_wait(0)  # the buffers were read out
        await_turn(order, turn >> 1, WG)
        acc = new_accumulator(D)
        step = turn * num_k
        early = 0
        if rope_desc is not None:
            # Not before the loop: the CTAs go in step, and what they store would come on top.
            early = num_k // 2
            acc = accumulate(acc, a_ring, b_ring, full, empty, step, early, STAGES)
            _fetch_table(rope_desc, buffers, ready.index(WG), row)
        acc = accumulate(
            acc, a_ring, b_ring, full, empty, step + early, num_k - early, STAGES, early
        )
        pass_turn(order, WG)
        acc = finish(acc, empty, step, num_k, STAGES)
        x0, x1 = halves(acc)
        x0 = _normalise(x0, head, bias_ptr, norm_ptr, norm_eps, NORM)
        if ROPE is not None:
            x0 = _rotate(
                x0, row, rope_desc, cos_ptr, sin_ptr, buffers, ready.index(WG), rows, ROPE[0],
                ROPE[1], ROPE[2], 0,
            )  # fmt: skip
        if rope_desc is None:
            tma.store_wait(0)
        store_half(x0, out_desc, cut_desc, is_cut, buffers.index(0), item, head, row, 0)
        if rope_desc is not None:
            tma.store_wait(0)
            _fetch_table(rope_desc, buffers, ready.index(WG), row + 64)
        x1 = _normalise(x1, head, bias_ptr, norm_ptr, norm_eps, NORM)
        if ROPE is not None:
            x1 = _rotate(
                x1, row + 64, rope_desc, cos_ptr, sin_ptr, buffers, ready.index(WG), rows, ROPE[0],
                ROPE[1], ROPE[2], 1,
            )  # fmt: skip
        store_half(x1, out_desc, cut_desc, is_cut, buffers.index(1), item, head, row + 64, 0)
        turn += 2
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "norm_eps", "rows", "num_k", "tiles_per_item", "first_row",
    ]
)  # fmt: skip
def gemm_q_kernel(
    x_desc, w_desc, out_desc, cut_desc, rope_desc, bias_ptr, norm_ptr, cos_ptr, sin_ptr, work_ptr,
    norm_eps,
    rows, num_k, tiles_per_item, first_row,
    D: gl.constexpr, NORM: gl.constexpr, ROPE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x_desc.dtype
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, 64], x_desc.layout)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, D, 64], w_desc.layout)
    buffers0 = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], out_desc.layout)
    buffers1 = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], out_desc.layout)
    full = make_barriers(STAGES)
    empty = make_barriers(STAGES)
    order = make_barriers(2)
    ready = make_barriers(2)
    gdc_wait()  # the list is made by the launch before this one, which let it start early
    gl.warp_specialize(
        [
            (_consumer, (
                out_desc, cut_desc, rope_desc, a_ring, b_ring, buffers0, full, empty, order, ready,
                bias_ptr, norm_ptr, norm_eps, cos_ptr, sin_ptr, work_ptr, rows, num_k,
                tiles_per_item, first_row, D,
                NORM, ROPE, STAGES, 0,
            )),
            (_consumer, (
                out_desc, cut_desc, rope_desc, a_ring, b_ring, buffers1, full, empty, order, ready,
                bias_ptr, norm_ptr, norm_eps, cos_ptr, sin_ptr, work_ptr, rows, num_k,
                tiles_per_item, first_row, D,
                NORM, ROPE, STAGES, 1,
            )),
            (_producer, (
                x_desc, w_desc, a_ring, b_ring, full, empty, work_ptr, num_k, tiles_per_item,
                first_row, rows, D, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def _refuses(call: GemmQCall) -> list[str]:
    head_dim, grid = call.out.shape[-1], call.symbols.grid
    reasons = hopper.refuse_call(call.out, grid.block_m, head_dim, HEAD_DIMS)
    reasons += hopper.refuse_dtype("x", call.x)
    if reasons:
        return reasons
    if call.symbols.num_heads > 1 << HEAD_BITS.value:
        reasons.append(f"num_heads must be at most 256, got {call.symbols.num_heads}")
    for name, tensor in (("x", call.x), ("weight", call.weight), ("out", call.out)):
        reasons += hopper.refuse_strides(name, tensor)
    for name, vector in (("bias", call.bias), ("norm_weight", call.norm_weight)):
        reasons += hopper.refuse_contiguous(name, vector)
    if call.rope is not None and call.rope[0].stride() != call.rope[1].stride():
        reasons.append("rope: cos and sin must have the same strides")
    return reasons


def _tables(cos: Tensor, sin: Tensor, apart: bool) -> TensorDescriptor | None:
    """Tables that lie in memory as :func:`pack_rope` makes them are read by the copy engine."""
    (rows, pairs), (stride_m, stride_d) = cos.shape, cos.stride()
    step, distance = (1, 4 * pairs) if apart else (2, 4)
    packed = (
        stride_d == step
        and stride_m % 4 == 0
        and stride_m >= 2 * pairs
        and sin.data_ptr() - cos.data_ptr() == distance
        and cos.data_ptr() % 16 == 0
    )
    if not packed:
        return None
    return hopper.descriptor(cos.as_strided((rows, 2 * pairs), (stride_m, 1)), [64, 2 * pairs])


@register(
    "gemm_q", "sm90", rank=40, refuses=_refuses,
    available=hopper_refusals, device="cuda",
)  # fmt: skip
def run(call: GemmQCall) -> None:
    if call.out.numel():
        with on_device(call.out.device):
            _run(call)


def _run(call: GemmQCall) -> None:
    x, out, symbols = call.x, call.out, call.symbols
    head_dim = out.shape[-1]
    tiles = TileRows.of(symbols, x.shape[1], call.row_offset)
    work = live_tiles(symbols, tiles)
    half = [1, 1, hopper.HALF_M, head_dim]
    cos, sin, rope, tables = None, None, None, None
    if call.rope is not None:
        cos, sin = call.rope
        rope = (call.rope_layout == "half", *cos.stride())
        tables = _tables(cos, sin, call.rope_layout == "half")
    ctas = min(num_multiprocessors(x.device.index), tiles.count * symbols.num_heads)
    gemm_q_kernel[(ctas,)](
        hopper.descriptor(x[:, None], [1, 1, TILE_M, hopper.TILE_K]),
        hopper.descriptor(call.weight, [head_dim, hopper.TILE_K]),
        hopper.descriptor(out.transpose(1, 2), half),
        hopper.cut_descriptor(out.transpose(1, 2), 2, tiles.first_row, half),
        tables,
        call.bias,
        call.norm_weight,
        cos,
        sin,
        work,
        0.0 if call.norm_eps is None else call.norm_eps,
        x.shape[1],
        -(-x.shape[2] // hopper.TILE_K),
        tiles.per_item,
        tiles.first_row,
        D=head_dim,
        NORM=call.norm_eps is not None,
        ROPE=rope,
        STAGES=hopper.stages(head_dim),
        num_warps=4,
        launch_pdl=True,
    )
