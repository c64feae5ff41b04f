"""Block-sparse attention for Hopper GPUs, in Gluon.

One persistent grid, one program per multiprocessor, three partitions: a producer warp reads the
symbols and loads tiles through TMA, two consumer warpgroups own 64 query rows each. A *tile* is
128 query tokens of one head; a *visit* is one tile of keys and values for it. What makes it fast:

* The producer alone decodes symbols. It runs ahead of the consumers and sends them, per tile, the
  number of visits; they never see a bit. Cached tiles never leave the producer.
* Queries sit in registers where there is room: shared memory then feeds the tensor cores with keys
  and values only, and the queries of the next tile load while this one is computed.
* Scores of visit j + 1 are issued before the values of visit j, also across the border of two
  tiles, so that the tensor cores have work during the softmax and the epilogue.
* A ragged last block of keys is visited first; only the first visit of a tile is ever masked.

The softmax works in powers of two; rows of partial sums stay in the threads until the end.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.extra import libdevice
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashomni.dispatch import register
from flashomni.kernels.attention._empty_tiles import empty_batch_items
from flashomni.kernels.attention._forecast_tiles import write_forecast_tiles
from flashomni.kernels.attention._tile_order import LISTED, tile_order
from flashomni.kernels.attention.op import AttentionCall
from flashomni.kernels.common.configs import DEFAULT, entry, places
from flashomni.kernels.common.hopper import (
    MOVES_OPERANDS,
    descriptor,
    hopper_refusals,
    is_hopper,
    layout_refusals,
    num_multiprocessors,
    on_device,
    tma_load,
    tma_store,
    wait_for_previous_kernel,
)
from flashomni.symbols import Symbols

TILE_M = 128
ROWS: gl.constexpr = gl.constexpr(64)  # of a tile, per warpgroup
LOG2_E = 1.4426950408889634
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)

# What the producer sends per tile, one word each. Consumers read a field when they need it, and
# return the message when the tile is stored: registers are dear.
BATCH: gl.constexpr = gl.constexpr(0)
HEAD: gl.constexpr = gl.constexpr(1)
ROW: gl.constexpr = gl.constexpr(2)  # its first query token
VISITS: gl.constexpr = gl.constexpr(3)  # 0 ends the stream
VALID: gl.constexpr = gl.constexpr(4)  # valid keys of the first visit
WORDS: gl.constexpr = gl.constexpr(5)
DEPTH: gl.constexpr = gl.constexpr(4)  # messages under way


# ---------------------------------------------------------------- messages


@gluon.jit
def _put(inbox, number, field: gl.constexpr, value):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    inbox.index(number % DEPTH * WORDS + field).store(gl.full([1], value, gl.int32, layout=one))


@gluon.jit
def _get(inbox, number, field: gl.constexpr):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(inbox.index(number % DEPTH * WORDS + field).load(one), axis=0)


@gluon.jit
def _send(inbox, inbox_full, inbox_empty, number, batch, head, row, visits, valid):
    mbarrier.wait(inbox_empty.index(number % DEPTH), ((number // DEPTH) & 1) ^ 1)
    _put(inbox, number, BATCH, batch)
    _put(inbox, number, HEAD, head)
    _put(inbox, number, ROW, row)
    _put(inbox, number, VISITS, visits)
    _put(inbox, number, VALID, valid)
    mbarrier.arrive(inbox_full.index(number % DEPTH), count=1)
    return number + 1


@gluon.jit
def _receive(inbox, inbox_full, number):
    """Wait for a message; how many visits it announces."""
    mbarrier.wait(inbox_full.index(number % DEPTH), (number // DEPTH) & 1)
    return _get(inbox, number, VISITS)


# ---------------------------------------------------------------- producer


@gluon.jit
def _load(desc, coordinates, ring, full, empty, count, STAGES: gl.constexpr):
    """Load the tile of number ``count`` into its slot of a ring."""
    slot = count % STAGES
    mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma_load(desc, coordinates, full.index(slot), ring.index(slot))


@gluon.jit
def _valid_keys(kv_len_ptr, batch, seqlen_kv, HAS_KV_LEN: gl.constexpr):
    if HAS_KV_LEN:
        return gl.maximum(gl.minimum(gl.load(kv_len_ptr + batch), seqlen_kv), 0)
    else:
        return seqlen_kv


@gluon.jit
def _read_symbols(tile, symbols, num_heads, tiles_m, MAX_WORDS: gl.constexpr):
    """The S_c byte of a tile and its row of S_s, a word a lane."""
    q_bits, kv_bits, q_stride_b, q_stride_h, kv_stride_b, kv_stride_h, kv_stride_m, row_words = (
        symbols
    )
    # Offsets of 32 bits are enough: _refuses sees to it.
    m = tile % tiles_m
    head = tile // tiles_m % num_heads
    batch = tile // tiles_m // num_heads
    q_byte = gl.load(q_bits + (batch * q_stride_b + head * q_stride_h + m // 8))
    row = kv_bits + (batch * kv_stride_b + head * kv_stride_h + m * kv_stride_m)
    word = gl.arange(0, MAX_WORDS, layout=gl.BlockedLayout([MAX_WORDS // 32], [32], [1], [0]))
    return q_byte.to(gl.int32), gl.load(row + word, mask=word < row_words, other=0)


@gluon.jit
def _keep_valid(words, num_blocks):
    """Clear the bits of blocks from ``num_blocks`` on."""
    word = gl.arange(0, words.shape[0], layout=words.type.layout)
    left = num_blocks - word * 32
    some = words & ((1 << gl.minimum(gl.maximum(left, 0), 31)) - 1)
    return gl.where(left >= 32, words, some)


@gluon.jit
def _count_blocks(words, num_blocks):
    """How many blocks a row visits, and whether the last one is among them."""
    word = gl.arange(0, words.shape[0], layout=words.type.layout)
    last = gl.maximum(num_blocks - 1, 0)
    is_last = gl.where(word == last // 32, (words >> (last % 32)) & 1, 0)
    # One sum for both: no row has 2 ** 20 blocks.
    total = gl.sum(libdevice.popc(words) + (is_last << 20), axis=0)
    return total & 0xFFFFF, total >> 20


@gluon.jit
def _pick(words, i):
    word = gl.arange(0, words.shape[0], layout=words.type.layout)
    return gl.sum(gl.where(word == i, words, 0), axis=0)


@gluon.jit
def _store_lse(lse, lse_ptr, lse_strides, batch, head, first_row, seqlen_q):
    row = first_row + gl.arange(0, lse.shape[0], layout=lse.type.layout)
    stride_b, stride_h, stride_m = lse_strides
    base = lse_ptr + batch.to(gl.int64) * stride_b + head.to(gl.int64) * stride_h
    gl.store(base + row.to(gl.int64) * stride_m, lse, mask=row < seqlen_q)


@gluon.jit
def _load_visit(
    k_desc, v_desc, batch, kv_head, n, held, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    count, TILE_N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """Load the keys of visit ``count``, then the values of the one before it in this tile."""
    _load(k_desc, [batch, kv_head, n * TILE_N, 0], k_ring, k_full, k_empty, count, K_STAGES)
    if held >= 0:
        _load(
            v_desc, [batch, kv_head, held * TILE_N, 0], v_ring, v_full, v_empty, count - 1,
            V_STAGES,
        )  # fmt: skip


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q_smem, k_ring, v_ring, barriers, inbox, symbols, sizes, kv_len_ptr,
    order,
    PER_BLOCK: gl.constexpr, MAX_WORDS: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    IS_SPARSE: gl.constexpr, IS_RAGGED: gl.constexpr, HAS_KV_LEN: gl.constexpr,
    LISTED: gl.constexpr,
):  # fmt: skip
    q_full, q_empty, k_full, k_empty, v_full, v_empty, inbox_full, inbox_empty = barriers
    num_tiles, tiles_m, num_heads, group, seqlen_kv = sizes
    TILE_M: gl.constexpr = q_desc.block_type.shape[2]
    TILE_N: gl.constexpr = k_desc.block_type.shape[2]
    first_listed = gl.maximum(num_tiles - LISTED, 0)
    position = gl.program_id(0)
    tile = position
    if IS_SPARSE:
        wait_for_previous_kernel()
        if position >= first_listed:
            tile = gl.load(order + 1 + position - first_listed)
        q_byte, words = _read_symbols(gl.maximum(tile, 0), symbols, num_heads, tiles_m, MAX_WORDS)
    sent = 0
    count = 0  # visits whose keys were loaded
    while position < num_tiles:
        is_live = tile >= 0
        tile = gl.maximum(tile, 0)
        m = tile % tiles_m
        head = tile // tiles_m % num_heads
        batch = tile // tiles_m // num_heads
        kv_head = head // group
        valid = _valid_keys(kv_len_ptr, batch, seqlen_kv, HAS_KV_LEN)
        num_visits = (valid + TILE_N - 1) // TILE_N
        visits = num_visits
        first_valid = TILE_N
        if IS_RAGGED:
            first_valid = valid - (num_visits - 1) * TILE_N
        if IS_SPARSE:
            is_live = is_live & (((q_byte >> (m % 8)) & 1) != 0)
            num_blocks = (num_visits + PER_BLOCK - 1) // PER_BLOCK
            words = _keep_valid(words, num_blocks)
            if IS_RAGGED or PER_BLOCK > 1:
                blocks, has_last = _count_blocks(words, num_blocks)
                visits = blocks * PER_BLOCK - has_last * (num_blocks * PER_BLOCK - num_visits)
                if IS_RAGGED:
                    first_valid = gl.where(has_last != 0, first_valid, TILE_N)
            else:
                visits = gl.sum(libdevice.popc(words), axis=0)
        held = gl.to_tensor(-1)  # the key tile that was loaded, its values not yet
        if is_live & (visits > 0):  # empty tiles are written already
            _load(q_desc, [batch, head, m * TILE_M, 0], q_smem, q_full, q_empty, sent, 1)
            sent = _send(
                inbox, inbox_full, inbox_empty, sent, batch, head, m * TILE_M, visits,
                first_valid,
            )  # fmt: skip
            if IS_SPARSE:
                i = (num_blocks - 1) // 32
                while i >= 0:
                    word = _pick(words, i)
                    while word != 0:
                        highest = 31 - libdevice.clz(word)
                        word = word ^ (1 << highest)
                        for u in gl.static_range(PER_BLOCK - 1, -1, -1):
                            n = (i * 32 + highest) * PER_BLOCK + u
                            if (PER_BLOCK == 1) or (n < num_visits):
                                _load_visit(
                                    k_desc, v_desc, batch, kv_head, n, held, k_ring, v_ring,
                                    k_full, k_empty, v_full, v_empty, count, TILE_N,
                                    K_STAGES, V_STAGES,
                                )  # fmt: skip
                                if held < 0:  # the consumers have enough to do meanwhile
                                    position = gl.atomic_add(order, 1, sem="relaxed")
                                count += 1
                                held = n
                    i -= 1
            else:
                for j in range(visits):
                    n = visits - 1 - j
                    _load_visit(
                        k_desc, v_desc, batch, kv_head, n, held, k_ring, v_ring, k_full,
                        k_empty, v_full, v_empty, count, TILE_N, K_STAGES, V_STAGES,
                    )  # fmt: skip
                    count += 1
                    held = n
        # The next tile's symbols are on their way while the last load waits for its slot.
        if IS_SPARSE:
            if held < 0:
                position = gl.atomic_add(order, 1, sem="relaxed")
            tile = gl.minimum(position, num_tiles - 1)
            if tile >= first_listed:
                tile = gl.load(order + 1 + tile - first_listed)
            q_byte, words = _read_symbols(
                gl.maximum(tile, 0), symbols, num_heads, tiles_m, MAX_WORDS
            )
        else:
            position += gl.num_programs(0)
            tile = position
        if held >= 0:
            _load(
                v_desc, [batch, kv_head, held * TILE_N, 0], v_ring, v_full, v_empty, count - 1,
                V_STAGES,
            )  # fmt: skip
    _send(inbox, inbox_full, inbox_empty, sent, 0, 0, 0, 0, 0)


# ---------------------------------------------------------------- consumers


@gluon.jit
def _issue_scores(
    q, k_ring, k_full, count, layout: gl.constexpr,
    TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    slot = count % STAGES
    mbarrier.wait(k_full.index(slot), (count // STAGES) & 1)
    k = k_ring.index(slot).reshape([TILE_N, HEAD_DIM]).permute((1, 0))
    s = gl.zeros([ROWS, TILE_N], gl.float32, layout=layout)
    return warpgroup_mma(q, k, s, use_acc=False, is_async=True)


@gluon.jit
def _issue_values(
    p, acc, use_acc, v_ring, v_full, count,
    TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    slot = count % STAGES
    mbarrier.wait(v_full.index(slot), (count // STAGES) & 1)
    v = v_ring.index(slot).reshape([TILE_N, HEAD_DIM])
    return warpgroup_mma(p, v, acc, use_acc=use_acc, is_async=True)


@gluon.jit
def _release(empty, count, STAGES: gl.constexpr):
    mbarrier.arrive(empty.index(count % STAGES), count=1)


@gluon.jit
def _columns_of_eight(x):
    """``[rows, n]`` as ``[rows, n / 8, 8]``: the middle dimension lies within a thread."""
    return gl.reshape(x, [x.shape[0], x.shape[1] // 8, 8])


@gluon.jit
def _row_max(s):
    layout: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    top = gl.max(gl.max(_columns_of_eight(s), axis=1), axis=1)
    return gl.convert_layout(top, layout, assert_trivial=True)


@gluon.jit
def _row_sums(p):
    """Sums over the columns that a thread holds of a row: ``[rows, 4]``."""
    parts = gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(parts, axis=1), axis=2)


@gluon.jit
def _softmax(s, scale_log2, m, row_sum):
    """Weights, maxima and partial sums after one more visit; and what rescales earlier ones."""
    m_new = gl.maximum(m, _row_max(s) * scale_log2)
    alpha = gl.exp2(m - m_new)
    p = gl.exp2(s * scale_log2 - m_new[:, None])
    alpha_sum = gl.convert_layout(
        alpha, gl.SliceLayout(1, row_sum.type.layout), assert_trivial=True
    )
    return p, m_new, row_sum * alpha_sum[:, None] + _row_sums(p), alpha


@gluon.jit
def _mask(s, inbox, number, IS_RAGGED: gl.constexpr):
    """Keys of a tile's first visit that do not exist weigh nothing."""
    if IS_RAGGED:
        valid = _get(inbox, number, VALID)
        column = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where((column < valid)[None, :], s, -float("inf"))
    return s


@gluon.jit
def _store_part(x, o_desc, o_smem, batch, head, row, column: gl.constexpr):
    tma.store_wait(0)  # what was stored before has left the buffer
    o_smem.reshape([x.shape[0], x.shape[1]]).store(x.to(o_desc.dtype))
    fence_async_shared()
    tma_store(o_desc, [batch, head, row, column], o_smem)


@gluon.jit
def _store_out(acc, o_desc, o_smem, inbox, number, WARPGROUP: gl.constexpr):
    """Store the normalised rows of the tile that message ``number`` is about."""
    batch = _get(inbox, number, BATCH)
    head = _get(inbox, number, HEAD)
    row = _get(inbox, number, ROW) + WARPGROUP * ROWS
    if acc.shape[1] == o_desc.block_type.shape[3]:
        _store_part(acc, o_desc, o_smem, batch, head, row, 0)
    else:  # the buffer holds half of the columns
        half: gl.constexpr = acc.shape[1] // 2
        parts = gl.permute(gl.reshape(acc, [acc.shape[0], 2, half]), (0, 2, 1))
        low, high = gl.split(parts)
        _store_part(low, o_desc, o_smem, batch, head, row, 0)
        _store_part(high, o_desc, o_smem, batch, head, row, half)


@gluon.jit
def _close(
    m, row_sum, lse_ptr, lse_strides, seqlen_q, inbox, number,
    HAS_LSE: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """All visits of a tile have been weighed: its LSE, and the factor that normalises its rows."""
    total = gl.convert_layout(gl.sum(row_sum, axis=1), m.type.layout, assert_trivial=True)
    if HAS_LSE:
        lse = (m + gl.log2(total)) * LN_2
        batch = _get(inbox, number, BATCH)
        head = _get(inbox, number, HEAD)
        row = _get(inbox, number, ROW) + WARPGROUP * ROWS
        _store_lse(lse, lse_ptr, lse_strides, batch, head, row, seqlen_q)
    return 1.0 / total


@gluon.jit
def _rows_of(q_smem, index, WARPGROUP: gl.constexpr):
    """The queries of one warpgroup in shared memory."""
    tile = q_smem.index(index)
    return tile.reshape([tile.shape[2], tile.shape[3]]).slice(WARPGROUP * ROWS, ROWS, dim=0)


@gluon.jit
def _take_queries(
    q, q_mine, q_full, q_empty, number, layout: gl.constexpr, IN_REGISTERS: gl.constexpr
):
    """Wait for the queries; from registers on their buffer is free for the next tile."""
    mbarrier.wait(q_full.index(0), number & 1)
    if IN_REGISTERS:
        q = q_mine.load(layout)
        mbarrier.arrive(q_empty.index(0), count=1)
    return q


@gluon.jit
def _consumer(
    o_desc, q_smem, k_ring, v_ring, o_smem, barriers, inbox, scale_log2, lse_ptr, lse_strides,
    seqlen_q,
    TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, IS_RAGGED: gl.constexpr, HAS_LSE: gl.constexpr,
    WARPGROUP: gl.constexpr,
):  # fmt: skip
    q_full, q_empty, k_full, k_empty, v_full, v_empty, inbox_full, inbox_empty = barriers
    dtype: gl.constexpr = o_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)

    q_mine = _rows_of(q_smem, 0, WARPGROUP)
    # Visits left of this tile; once there are none, minus those of the next; 0 at the end.
    left = _receive(inbox, inbox_full, 0)
    if left != 0:
        number = 0  # of the tile whose scores were issued last
        count = 0  # of visits whose scores were issued before
        q = _take_queries(q_mine, q_mine, q_full, q_empty, number, q_layout, Q_IN_REGISTERS)
        s = _issue_scores(q, k_ring, k_full, count, s_layout, TILE_N, HEAD_DIM, K_STAGES)
        s = warpgroup_mma_wait(0, deps=(s,))
        s = _mask(s, inbox, number, IS_RAGGED)
        _release(k_empty, count, K_STAGES)
        m = gl.full([ROWS], -float("inf"), gl.float32, layout=row_layout)
        row_sum = gl.full_like(_row_sums(s), 0.0)
        weights, m, row_sum, alpha = _softmax(s, scale_log2, m, row_sum)
        p = gl.convert_layout(weights.to(dtype), p_layout)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=acc_layout)
        has_acc = 0  # whether acc holds visits of the current tile
        count += 1
        left -= 1
        if left == 0:
            # In this order: the next message comes when the next queries are under way.
            if not Q_IN_REGISTERS:
                mbarrier.arrive(q_empty.index(0), count=1)
            left = -_receive(inbox, inbox_full, number + 1)
        while left != 0:
            is_border = left < 0  # this visit is the first of the next tile
            factor = m
            if is_border:
                factor = _close(
                    m, row_sum, lse_ptr, lse_strides, seqlen_q, inbox, number, HAS_LSE, WARPGROUP
                )
                m = gl.full([ROWS], -float("inf"), gl.float32, layout=row_layout)
                row_sum = gl.full_like(row_sum, 0.0)
                number += 1
                q = _take_queries(q, q_mine, q_full, q_empty, number, q_layout, Q_IN_REGISTERS)
            operand = q
            if MOVES_OPERANDS and HEAD_DIM > 128:
                # Always index 0, but computed anew: 16 addresses kept over the loop would spill.
                operand = _rows_of(q_smem, gl.minimum(count, 0), WARPGROUP)
            s = _issue_scores(operand, k_ring, k_full, count, s_layout, TILE_N, HEAD_DIM, K_STAGES)
            acc = _issue_values(
                p, acc, has_acc != 0, v_ring, v_full, count - 1, TILE_N, HEAD_DIM, V_STAGES
            )
            s = warpgroup_mma_wait(1, deps=(s,))
            _release(k_empty, count, K_STAGES)
            if IS_RAGGED and is_border:
                s = _mask(s, inbox, number, IS_RAGGED)
            weights, m, row_sum, alpha = _softmax(s, scale_log2, m, row_sum)
            # At a border the rows get their norm instead; what follows does not add to them.
            alpha = gl.where(is_border, factor, alpha)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            _release(v_empty, count - 1, V_STAGES)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc_layout))[:, None]
            # The multiplication by the old weights is over: their registers may be written.
            p = gl.convert_layout(weights.to(dtype), p_layout)
            has_acc = 1
            if is_border:
                _store_out(acc, o_desc, o_smem, inbox, number - 1, WARPGROUP)
                _release(inbox_empty, number - 1, DEPTH)
                has_acc = 0
                left = -left
            count += 1
            left -= 1
            if left == 0:
                if not Q_IN_REGISTERS:
                    mbarrier.arrive(q_empty.index(0), count=1)
                left = -_receive(inbox, inbox_full, number + 1)
        acc = _issue_values(
            p, acc, has_acc != 0, v_ring, v_full, count - 1, TILE_N, HEAD_DIM, V_STAGES
        )
        factor = _close(
            m, row_sum, lse_ptr, lse_strides, seqlen_q, inbox, number, HAS_LSE, WARPGROUP
        )
        acc = warpgroup_mma_wait(0, deps=(acc,))
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, acc_layout))[:, None]
        _store_out(acc, o_desc, o_smem, inbox, number, WARPGROUP)
    tma.store_wait(0)


# ---------------------------------------------------------------- kernel


@gluon.jit(
    do_not_specialize=[
        "num_tiles", "tiles_m", "num_heads", "group", "seqlen_q", "seqlen_kv",
        "row_words", "q_stride_b", "q_stride_h", "kv_stride_b", "kv_stride_h", "kv_stride_m",
        "lse_stride_b", "lse_stride_h", "lse_stride_m",
    ]
)  # fmt: skip
def attention_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, q_bits, kv_bits, kv_len_ptr, order, scale_log2,
    num_tiles, tiles_m, num_heads, group, seqlen_q, seqlen_kv, row_words,
    q_stride_b, q_stride_h, kv_stride_b, kv_stride_h, kv_stride_m,
    lse_stride_b, lse_stride_h, lse_stride_m,
    PER_BLOCK: gl.constexpr, MAX_WORDS: gl.constexpr, LISTED: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, Q_IN_REGISTERS: gl.constexpr,
    IS_SPARSE: gl.constexpr, IS_RAGGED: gl.constexpr, HAS_KV_LEN: gl.constexpr,
    HAS_LSE: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    TILE_M: gl.constexpr = q_desc.block_type.shape[2]
    TILE_N: gl.constexpr = k_desc.block_type.shape[2]
    HEAD_DIM: gl.constexpr = q_desc.block_type.shape[3]
    o_block: gl.constexpr = o_desc.block_type.shape
    q_smem = gl.allocate_shared_memory(dtype, [1, 1, 1, TILE_M, HEAD_DIM], q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [K_STAGES, 1, 1, TILE_N, HEAD_DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [V_STAGES, 1, 1, TILE_N, HEAD_DIM], v_desc.layout)
    o_smem0 = gl.allocate_shared_memory(dtype, o_block, o_desc.layout)
    o_smem1 = gl.allocate_shared_memory(dtype, o_block, o_desc.layout)

    flag: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], flag)
    q_empty = gl.allocate_shared_memory(gl.int64, [1, 1], flag)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], flag)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], flag)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], flag)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], flag)
    inbox_full = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], flag)
    inbox_empty = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], flag)
    word: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    inbox = gl.allocate_shared_memory(gl.int32, [DEPTH * WORDS, 1], word)
    mbarrier.init(q_full.index(0), count=1)
    mbarrier.init(q_empty.index(0), count=2)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(DEPTH):
        mbarrier.init(inbox_full.index(i), count=1)
        mbarrier.init(inbox_empty.index(i), count=2)

    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, inbox_full, inbox_empty)
    sizes = (num_tiles, tiles_m, num_heads, group, seqlen_kv)
    symbols = (
        q_bits, kv_bits, q_stride_b, q_stride_h, kv_stride_b, kv_stride_h, kv_stride_m, row_words,
    )  # fmt: skip
    lse_strides = (lse_stride_b, lse_stride_h, lse_stride_m)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    o_desc, q_smem, k_ring, v_ring, o_smem0, barriers, inbox, scale_log2,
                    lse_ptr, lse_strides, seqlen_q, TILE_N, HEAD_DIM, K_STAGES, V_STAGES,
                    Q_IN_REGISTERS,
                    IS_RAGGED, HAS_LSE, 0,
                ),
            ),
            (
                _consumer,
                (
                    o_desc, q_smem, k_ring, v_ring, o_smem1, barriers, inbox, scale_log2,
                    lse_ptr, lse_strides, seqlen_q, TILE_N, HEAD_DIM, K_STAGES, V_STAGES,
                    Q_IN_REGISTERS,
                    IS_RAGGED, HAS_LSE, 1,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, v_desc, q_smem, k_ring, v_ring, barriers, inbox, symbols,
                    sizes, kv_len_ptr, order, PER_BLOCK, MAX_WORDS, K_STAGES, V_STAGES,
                    IS_SPARSE, IS_RAGGED, HAS_KV_LEN, LISTED,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


# ---------------------------------------------------------------- host


@dataclass(frozen=True)
class Config:
    """How a head_dim runs: bytes of shared memory and registers decide.

    Args:
        head_dim: columns of a tile; what a tensor lacks reads as zero.
        tile_n: keys per visit.
        k_stages: key tiles under way.
        v_stages: value tiles under way.
        q_in_registers: whether the queries fit beside scores, weights and output.
        registers: of a consumer thread and of a producer thread.
        overlapped: whether the grid starts while the order of its tiles is still being built.
    """

    head_dim: int
    tile_n: int
    k_stages: int
    v_stages: int
    q_in_registers: bool = True
    registers: tuple[int, int] = (240, 24)
    overlapped: bool = True


@functools.cache
def choose_config(
    head_dim: int, block_n: int, where: tuple[str, ...] = ("sm_90", DEFAULT)
) -> Config:
    """The configuration for a head_dim up to 256 and symbols of ``block_n`` keys.

    Args:
        head_dim: of the tensors.
        block_n: a multiple of 64.
        where: the files of configurations that are asked, in order.
    """
    columns = next(size for size in (64, 128, 256) if head_dim <= size)
    key = {"head_dim": columns, "block_n": 64 if block_n % 128 else 128}
    found = dict(entry("attention/sm90", where, **key))
    # Where operands are moved, queries in registers may leave too few of them.
    moved = found.pop("where_operands_move", {})
    found |= moved if MOVES_OPERANDS.value else {}
    return Config(columns, **found | {"registers": tuple(found["registers"])})


def _refuses(call: AttentionCall) -> list[str]:
    q, symbols = call.q, call.symbols
    if q.device.type != "cuda":
        return [f"tensors are on {q.device.type}, this backend is for cuda"]
    if not is_hopper(q.device.index):
        return [f"{q.device} is not of compute capability 9.0"]
    reasons = []
    if q.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"dtype must be bfloat16 or float16, got {str(q.dtype)[6:]}")
    head_dim = q.shape[3]
    if head_dim % 8 or head_dim > 256:
        reasons.append(f"head_dim must be a multiple of 8 up to 256, got {head_dim}")
    if min(q.numel(), call.k.numel()) == 0:
        reasons.append("q, k and v must not be empty")
    if call.softmax_scale <= 0:
        reasons.append(f"softmax_scale must be positive, got {call.softmax_scale}")
    for name, x in (("q", q), ("k", call.k), ("v", call.v), ("out", call.out)):
        reasons += layout_refusals(name, x)
    if symbols is not None:
        grid = symbols.grid
        if grid.block_m != TILE_M:
            reasons.append(f"block_m must be {TILE_M}, got {grid.block_m}")
        if grid.block_n % 64:
            reasons.append(f"block_n must be a multiple of 64, got {grid.block_n}")
        if grid.num_kv_blocks >= 1 << 20:
            reasons.append(f"there must be fewer than 2**20 key blocks, got {grid.num_kv_blocks}")
        reasons += _symbol_refusals(symbols)
    return reasons


def _symbol_refusals(symbols: Symbols) -> list[str]:
    """Rows of S_s are read as 32-bit words."""
    q_bits, kv_bits = symbols.q_bits, symbols.kv_bits
    strides = kv_bits.stride()
    if q_bits.stride(-1) != 1 and q_bits.shape[-1] > 1:
        return ["q_bits must be contiguous in their last dim"]
    if kv_bits.numel() >= 1 << 31:
        return [f"kv_bits must have less than 2**31 bytes, got {kv_bits.numel()}"]
    if strides[-1] != 1 or any(stride % 4 for stride in strides[:-1]) or kv_bits.data_ptr() % 4:
        return ["rows of kv_bits must be contiguous and start at multiples of 4 bytes"]
    return []


@register(
    "attention", "sm90", rank=40, refuses=_refuses,
    available=hopper_refusals, device="cuda",
)  # fmt: skip
def run(call: AttentionCall) -> None:
    block_n = 128 if call.symbols is None else call.symbols.grid.block_n
    with on_device(call.q.device):
        launch(call, choose_config(call.q.shape[3], block_n, places(call.q.device)))


def launch(call: AttentionCall, config: Config) -> None:
    """Compute ``call`` with a given configuration, on the current device."""
    write_forecast_tiles(call)
    q, k, v, out, lse, symbols = call.q, call.k, call.v, call.out, call.lse, call.symbols
    batch, seqlen_q, num_heads, _ = q.shape
    seqlen_kv = k.shape[1]
    tiles_m = -(-seqlen_q // TILE_M)
    num_tiles = batch * num_heads * tiles_m
    num_programs = min(num_multiprocessors(q.device.index), num_tiles)
    tile_n, columns = config.tile_n, config.head_dim
    order, q_bits, kv_bits = None, None, None
    per_block, row_words, max_words = 1, 0, 32
    symbol_strides: tuple[int, ...] = (0, 0, 0, 0, 0)
    if symbols is not None:
        order = tile_order(call, symbols, TILE_M, num_programs, overlapped=config.overlapped)
        q_bits, kv_bits = symbols.q_bits, symbols.kv_bits.view(torch.int32)
        per_block, row_words = symbols.grid.block_n // tile_n, kv_bits.shape[-1]
        max_words = max(32, 1 << (row_words - 1).bit_length())
        symbol_strides = (*q_bits.stride()[:2], *kv_bits.stride()[:3])
    elif call.kv_len is not None:
        empty_batch_items(call, TILE_M)
    attention_kernel[(num_programs,)](
        descriptor(q, TILE_M, columns),
        descriptor(k, tile_n, columns),
        descriptor(v, tile_n, columns),
        descriptor(out, TILE_M // 2, min(columns, 128)),
        lse,
        q_bits,
        kv_bits,
        call.kv_len,
        order,
        call.softmax_scale * LOG2_E,
        num_tiles,
        tiles_m,
        num_heads,
        num_heads // k.shape[2],
        seqlen_q,
        seqlen_kv,
        row_words,
        *symbol_strides,
        *((0, 0, 0) if lse is None else lse.stride()),
        PER_BLOCK=per_block,
        MAX_WORDS=max_words,
        LISTED=LISTED,
        K_STAGES=config.k_stages,
        V_STAGES=config.v_stages,
        Q_IN_REGISTERS=config.q_in_registers,
        IS_SPARSE=symbols is not None,
        IS_RAGGED=call.kv_len is not None or seqlen_kv % tile_n != 0,
        HAS_KV_LEN=call.kv_len is not None,
        HAS_LSE=lse is not None,
        CONSUMER_REGISTERS=config.registers[0],
        PRODUCER_REGISTERS=config.registers[1],
        num_warps=4,
        launch_pdl=symbols is not None and config.overlapped,
    )
