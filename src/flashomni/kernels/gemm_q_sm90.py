"""GEMM-Q on Hopper: a persistent kernel over the computed (tile row, head) pairs.

A pair is an output tile of 128 tokens and one head: bias, RMSNorm over the head and RoPE are done
on the fp32 accumulators. Pairs are dealt out round by round, 132 at a time and row by row, so that
the CTAs share the rows of x and the weight in L2. What a last, partly filled round would leave idle
is made up for by cutting the last pairs along K ("stream-K"): each CTA gets an equal run of steps,
and whoever has the first part of a pair adds the parts of the others.

Letters in shapes: B batch, R rows of x, K in_features, H num_heads, D head_dim.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.extra.cuda import gdc_wait

from flashomni.kernels import _gemm_sm90 as hopper
from flashomni.kernels._gemm_sm90 import (
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
    row_index,
    store_half,
)
from flashomni.kernels._live_tiles import HEAD_BITS, TILE_M, TileRows, live_tiles
from flashomni.kernels.dispatch import register
from flashomni.kernels.gemm_q import GemmQCall

HEAD_DIMS = (64, 128)
# Estimates of what an exchange of parts is worth, in steps of 64 along K: less idle time is left
# idle, and no CTA gets a shorter share.
WORTH_CUTTING = gl.constexpr(8)
SHORTEST_PART = gl.constexpr(12)


@gluon.jit
def _plan(num_tiles, num_k):
    """How the tiles are dealt out: whole tiles of this CTA, whole rounds, steps to cut, parts."""
    ctas = gl.num_programs(0)
    rounds = num_tiles // ctas
    rest = num_tiles - rounds * ctas
    cut = (rest > 0) & ((ctas - rest) * num_k >= WORTH_CUTTING * ctas)
    whole_rounds = gl.where(cut, gl.maximum(rounds - 1, 0), rounds)
    extra = gl.where(gl.program_id(0) < rest, 1, 0)
    whole = gl.where(cut, whole_rounds, rounds + extra)
    cut_steps = gl.where(cut, (num_tiles - whole_rounds * ctas) * num_k, 0)
    parts = gl.minimum(ctas, gl.maximum(cut_steps // SHORTEST_PART, 1))
    return whole, whole_rounds, cut_steps, parts


@gluon.jit
def _share(cta, cut_steps, parts):
    """Where the share of a CTA begins among the steps to cut."""
    return gl.minimum(cta, parts) * cut_steps // parts


@gluon.jit
def _own_steps(whole, cut_steps, parts, num_k):
    cta = gl.program_id(0)
    return whole * num_k + _share(cta + 1, cut_steps, parts) - _share(cta, cut_steps, parts)


@gluon.jit
def _segment(step, steps, whole, whole_rounds, cut_steps, parts, num_k):
    """The tile that this CTA works on at a step, and the range along K."""
    cta = gl.program_id(0)
    ctas = gl.num_programs(0)
    at = _share(cta, cut_steps, parts) + step - whole * num_k
    is_cut = step >= whole * num_k
    tile = gl.where(is_cut, whole_rounds * ctas + at // num_k, cta + step // num_k * ctas)
    start = gl.where(is_cut, at % num_k, 0)
    return tile, start, gl.minimum(num_k, start + steps - step)


@gluon.jit
def _place(entry, tiles_per_item, first_row):
    """Batch item, first row and head of a pair."""
    tile_row = entry >> HEAD_BITS
    item = tile_row // tiles_per_item
    row = first_row + (tile_row - item * tiles_per_item) * 128
    return item, row, entry & ((1 << HEAD_BITS) - 1)


@gluon.jit
def _producer(
    x_desc, w_desc, a_ring, b_ring, full, empty, work_ptr, list_ptr, num_k, tiles_per_item,
    first_row, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    num_tiles = gl.load(work_ptr)
    whole, whole_rounds, cut_steps, parts = _plan(num_tiles, num_k)
    steps = _own_steps(whole, cut_steps, parts, num_k)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    step = gl.to_tensor(0)
    tile, start, stop = _segment(step, steps, whole, whole_rounds, cut_steps, parts, num_k)
    entry = gl.load(list_ptr + gl.minimum(tile, gl.maximum(num_tiles - 1, 0)))
    while step < steps:
        item, row, head = _place(entry, tiles_per_item, first_row)
        k_start = start
        k_stop = stop
        step += k_stop - k_start
        # The next entry is fetched while this tile's loads are issued.
        tile, start, stop = _segment(step, steps, whole, whole_rounds, cut_steps, parts, num_k)
        entry = gl.load(list_ptr + gl.minimum(tile, num_tiles - 1))
        for k in range(k_start, k_stop):
            slot, phase = load_step(
                x_desc, w_desc, a_ring, b_ring, full, empty, item, 0, row, k * 64, head * D, k * 64,
                slot, phase, STAGES,
            )  # fmt: skip


@gluon.jit
def _part_at(part_ptr, x, cta, HALF: gl.constexpr):
    columns: gl.constexpr = x.shape[1]
    base = part_ptr + (cta * 128 + HALF * 64) * columns
    return base + row_index(x)[:, None] * columns + column_index(x)[None, :]


@gluon.jit
def _leave_part(x0, x1, part_ptr, flag_ptr):
    """Hand the sums over a later part of K to the CTA that has the first part."""
    cta = gl.program_id(0)
    gl.store(_part_at(part_ptr, x0, cta, 0), x0)
    gl.store(_part_at(part_ptr, x1, cta, 1), x1)
    gl.thread_barrier()
    gl.atomic_xchg(flag_ptr + cta, 1, sem="release", scope="gpu")


@gluon.jit
def _add_parts(
    x, part_ptr, flag_ptr, tile, whole_rounds, cut_steps, parts, num_k, HALF: gl.constexpr
):
    """Add the parts of a tile that later CTAs have, in their order.

    A CTA hands its part over before it waits for anything, so the wait ends.
    """
    cta = gl.program_id(0) + 1
    end = (tile - whole_rounds * gl.num_programs(0) + 1) * num_k
    while _share(cta, cut_steps, parts) < end:
        if HALF == 0:  # the second half has arrived with the first
            while gl.atomic_add(flag_ptr + cta, 0, sem="acquire", scope="gpu") == 0:
                pass
            gl.thread_barrier()
        x = x + gl.load(_part_at(part_ptr, x, cta, HALF), cache_modifier=".cg")
        cta += 1
    return x


@gluon.jit
def _rotate(x, row, cos_ptr, sin_ptr, stride_cos, stride_sin, rows):
    """RoPE on neighbouring pairs. Both members of a pair have one angle: it is read once."""
    even, odd = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    token = row + row_index(even)
    mask = ((token >= 0) & (token < rows))[:, None]
    column = 2 * column_index(even)[None, :]
    at = token.to(gl.int64)[:, None]
    cos = gl.load(cos_ptr + at * stride_cos + column, mask=mask, other=0.0)
    sin = gl.load(sin_ptr + at * stride_sin + column, mask=mask, other=0.0)
    turned = gl.join(even * cos - odd * sin, odd * cos + even * sin)
    turned = gl.reshape(turned, [x.shape[0], x.shape[1]])
    return gl.convert_layout(turned, x.type.layout, assert_trivial=True)


@gluon.jit
def _epilogue(
    x, row, head, bias_ptr, norm_ptr, norm_eps, cos_ptr, sin_ptr, stride_cos, stride_sin, rows,
    NORM: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = x.shape[1]
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + head * D + column_index(x))
        x = x + bias.to(gl.float32)[None, :]
    if NORM:
        x = x * gl.rsqrt(gl.sum(x * x, axis=1) * (1.0 / D) + norm_eps)[:, None]
        if norm_ptr is not None:
            x = x * gl.load(norm_ptr + column_index(x)).to(gl.float32)[None, :]
    if cos_ptr is not None:
        x = _rotate(x, row, cos_ptr, sin_ptr, stride_cos, stride_sin, rows)
    return x


@gluon.jit
def _consumer(
    out_desc, a_ring, b_ring, buffers, full, empty, order, bias_ptr, norm_ptr, norm_eps, cos_ptr,
    sin_ptr, stride_cos, stride_sin, work_ptr, list_ptr, part_ptr, rows, num_k, tiles_per_item,
    first_row, D: gl.constexpr, NORM: gl.constexpr, STAGES: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    whole, whole_rounds, cut_steps, parts = _plan(gl.load(work_ptr), num_k)
    steps = _own_steps(whole, cut_steps, parts, num_k)
    step = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    while step < steps:
        tile, start, stop = _segment(step, steps, whole, whole_rounds, cut_steps, parts, num_k)
        if (turn & 1) == WG:
            item, row, head = _place(gl.load(list_ptr + tile), tiles_per_item, first_row)
            await_turn(order, turn >> 1, WG)
            acc = new_accumulator(D)
            acc = accumulate(acc, a_ring, b_ring, full, empty, step, stop - start, STAGES)
            pass_turn(order, WG)
            acc = finish(acc, empty, step, stop - start, STAGES)
            x0, x1 = halves(acc)
            if start > 0:
                _leave_part(x0, x1, part_ptr, work_ptr + 1)
            else:
                if stop < num_k:
                    x0 = _add_parts(
                        x0, part_ptr, work_ptr + 1, tile, whole_rounds, cut_steps, parts, num_k, 0
                    )
                x0 = _epilogue(
                    x0, row, head, bias_ptr, norm_ptr, norm_eps, cos_ptr, sin_ptr, stride_cos,
                    stride_sin, rows, NORM,
                )  # fmt: skip
                tma.store_wait(0)  # the buffers were read out
                store_half(x0, out_desc, buffers.index(0), item, head, row, 0)
                if stop < num_k:
                    x1 = _add_parts(
                        x1, part_ptr, work_ptr + 1, tile, whole_rounds, cut_steps, parts, num_k, 1
                    )
                x1 = _epilogue(
                    x1, row + 64, head, bias_ptr, norm_ptr, norm_eps, cos_ptr, sin_ptr, stride_cos,
                    stride_sin, rows, NORM,
                )  # fmt: skip
                store_half(x1, out_desc, buffers.index(1), item, head, row + 64, 0)
        step += stop - start
        turn += 1
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "norm_eps", "stride_cos", "stride_sin", "rows", "num_k", "tiles_per_item", "first_row",
        "num_flags",
    ]
)  # fmt: skip
def gemm_q_kernel(
    x_desc, w_desc, out_desc, bias_ptr, norm_ptr, cos_ptr, sin_ptr, work_ptr, part_ptr, norm_eps,
    stride_cos, stride_sin, rows, num_k, tiles_per_item, first_row, num_flags,
    D: gl.constexpr, NORM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x_desc.dtype
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, 64], x_desc.layout)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, D, 64], w_desc.layout)
    buffers0 = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], out_desc.layout)
    buffers1 = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], out_desc.layout)
    full = make_barriers(STAGES)
    empty = make_barriers(STAGES)
    order = make_barriers(2)
    list_ptr = work_ptr + 1 + num_flags
    gdc_wait()  # the list is made by the launch before this one, which let it start early
    gl.warp_specialize(
        [
            (_consumer, (
                out_desc, a_ring, b_ring, buffers0, full, empty, order, bias_ptr, norm_ptr,
                norm_eps, cos_ptr, sin_ptr, stride_cos, stride_sin, work_ptr, list_ptr, part_ptr,
                rows, num_k, tiles_per_item, first_row, D, NORM, STAGES, 0,
            )),
            (_consumer, (
                out_desc, a_ring, b_ring, buffers1, full, empty, order, bias_ptr, norm_ptr,
                norm_eps, cos_ptr, sin_ptr, stride_cos, stride_sin, work_ptr, list_ptr, part_ptr,
                rows, num_k, tiles_per_item, first_row, D, NORM, STAGES, 1,
            )),
            (_producer, (
                x_desc, w_desc, a_ring, b_ring, full, empty, work_ptr, list_ptr, num_k,
                tiles_per_item, first_row, D, STAGES,
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
    tables = call.rope or (None, None)
    vectors = {"bias": call.bias, "norm_weight": call.norm_weight}
    for name, vector in (vectors | {"rope cos": tables[0], "rope sin": tables[1]}).items():
        reasons += hopper.refuse_contiguous(name, vector)
    return reasons


@register("gemm_q", "sm90", rank=40, refuses=_refuses, available=hopper.available)
def run(call: GemmQCall) -> None:
    if call.out.numel():
        with torch.cuda.device(call.out.device):
            _run(call)


def _run(call: GemmQCall) -> None:
    x, out, symbols = call.x, call.out, call.symbols
    head_dim = out.shape[-1]
    tiles = TileRows.of(symbols, x.shape[1], call.row_offset)
    ctas = hopper.num_ctas(x.device)
    work = live_tiles(symbols, tiles, ctas)
    parts = torch.empty(ctas, TILE_M, head_dim, dtype=torch.float32, device=x.device)
    cos, sin = call.rope or (None, None)
    gemm_q_kernel[(ctas,)](
        hopper.descriptor(x[:, None], [1, 1, TILE_M, hopper.TILE_K]),
        hopper.descriptor(call.weight, [head_dim, hopper.TILE_K]),
        hopper.descriptor(out.transpose(1, 2), [1, 1, hopper.HALF_M, head_dim]),
        call.bias,
        call.norm_weight,
        cos,
        sin,
        work,
        parts,
        0.0 if call.norm_eps is None else call.norm_eps,
        0 if cos is None else cos.stride(0),
        0 if sin is None else sin.stride(0),
        x.shape[1],
        -(-x.shape[2] // hopper.TILE_K),
        tiles.per_item,
        tiles.first_row,
        ctas,
        D=head_dim,
        NORM=call.norm_eps is not None,
        STAGES=hopper.stages(head_dim),
        num_warps=4,
        launch_pdl=True,
    )
