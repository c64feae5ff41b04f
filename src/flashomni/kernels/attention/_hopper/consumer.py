"""A consumer warpgroup: 64 query rows of each tile, from scores to the stored output.

Scores of visit j + 1 are issued before the values of visit j, also across the border of two tiles,
so that the tensor cores have work during the softmax and the epilogue. What happens at a border is
code of its own: the loop over visits does nothing but multiply and weigh.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashomni.kernels.attention._hopper.messages import (
    BAD,
    BATCH,
    HEAD,
    PER_LIVE,
    ROW,
    VALID,
    get,
    give_back,
    put,
    receive,
)
from flashomni.kernels.attention._hopper.rings import parity, slot
from flashomni.kernels.attention._hopper.softmax import (
    anchored,
    as_rounded,
    biased,
    first,
    is_bad,
    online,
    pack,
    row_sums,
    unpack,
)
from flashomni.kernels.common.hopper import tma_store

ROWS: gl.constexpr = gl.constexpr(64)  # of a tile, per warpgroup
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)


@gluon.jit
def release(empty, count, STAGES: gl.constexpr):
    mbarrier.arrive(empty.index(slot(count, STAGES)), count=1)


@gluon.jit
def queries(q_smem, q_full, number, STAGES: gl.constexpr, WARPGROUP: gl.constexpr):
    """Wait for queries number ``number``; the rows of this warpgroup."""
    mbarrier.wait(q_full.index(slot(number, STAGES)), parity(number, STAGES))
    return rows_of(q_smem, number, STAGES, WARPGROUP)


@gluon.jit
def rows_of(q_smem, number, STAGES: gl.constexpr, WARPGROUP: gl.constexpr):
    tile = q_smem.index(slot(number, STAGES))
    return tile.reshape([tile.shape[2], tile.shape[3]]).slice(WARPGROUP * ROWS, ROWS, dim=0)


@gluon.jit
def issue_scores(
    q, k_ring, k_full, count, layout: gl.constexpr,
    TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    at = slot(count, STAGES)
    mbarrier.wait(k_full.index(at), parity(count, STAGES))
    k = k_ring.index(at).reshape([TILE_N, HEAD_DIM]).permute((1, 0))
    s = gl.zeros([ROWS, TILE_N], gl.float32, layout=layout)
    if COLUMNS == HEAD_DIM:
        return warpgroup_mma(q, k, s, use_acc=False, is_async=True)
    # Columns behind those that the tensors have read as zero: the tensor cores need not.
    half: gl.constexpr = HEAD_DIM // 2
    rest: gl.constexpr = COLUMNS - half
    s = warpgroup_mma(
        q.slice(0, half, dim=1), k.slice(0, half, dim=0), s, use_acc=False, is_async=True
    )
    return warpgroup_mma(
        q.slice(half, rest, dim=1), k.slice(half, rest, dim=0), s, use_acc=True, is_async=True
    )


@gluon.jit
def issue_values(
    words, acc, use_acc, v_ring, v_full, count, dtype: gl.constexpr,
    TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    at = slot(count, STAGES)
    mbarrier.wait(v_full.index(at), parity(count, STAGES))
    v = v_ring.index(at).reshape([TILE_N, HEAD_DIM])
    return warpgroup_mma(unpack(words, dtype), v, acc, use_acc=use_acc, is_async=True)


@gluon.jit
def _mask(s, inbox, number, IS_RAGGED: gl.constexpr, HAS_SUMMARY: gl.constexpr):
    """Keys of a tile's first visit that do not exist weigh nothing."""
    if IS_RAGGED:
        valid = get(inbox, number, VALID)
        if HAS_SUMMARY:
            valid = valid % PER_LIVE
        column = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where((column < valid)[None, :], s, -float("inf"))
    return s


@gluon.jit
def scaled(acc, factor):
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def store_part(x, o_desc, o_smem, batch, head, row, column: gl.constexpr):
    tma.store_wait(0)  # what was stored before has left the buffer
    o_smem.reshape([x.shape[0], x.shape[1]]).store(x.to(o_desc.dtype))
    fence_async_shared()
    tma_store(o_desc, [batch, head, row, column], o_smem)


@gluon.jit
def _store_out(out, o_desc, o_smem, inbox, number, WARPGROUP: gl.constexpr):
    """Store the normalised rows of the tile that message ``number`` is about."""
    batch = get(inbox, number, BATCH)
    head = get(inbox, number, HEAD)
    row = get(inbox, number, ROW) + WARPGROUP * ROWS
    if out.shape[1] == o_desc.block_type.shape[3]:
        store_part(out, o_desc, o_smem, batch, head, row, 0)
    else:  # the buffer holds half of the columns
        half: gl.constexpr = out.shape[1] // 2
        parts = gl.permute(gl.reshape(out, [out.shape[0], 2, half]), (0, 2, 1))
        low, high = gl.split(parts)
        store_part(low, o_desc, o_smem, batch, head, row, 0)
        store_part(high, o_desc, o_smem, batch, head, row, half)


@gluon.jit
def row_total(row_sum, m):
    """Sums of rows from those of the parts that threads hold."""
    return gl.convert_layout(gl.sum(row_sum, axis=1), m.type.layout, assert_trivial=True)


@gluon.jit
def _store_lse(
    m, row_sum, lse_ptr, lse_strides, seqlen_q, inbox, number, WARPGROUP: gl.constexpr
):  # fmt: skip
    lse = (m + gl.log2(row_total(row_sum, m))) * LN_2
    stride_b, stride_h, stride_m = lse_strides
    batch = get(inbox, number, BATCH).to(gl.int64)
    head = get(inbox, number, HEAD).to(gl.int64)
    row = get(inbox, number, ROW) + WARPGROUP * ROWS
    row += gl.arange(0, lse.shape[0], layout=lse.type.layout)
    at = batch * stride_b + head * stride_h + row.to(gl.int64) * stride_m
    gl.store(lse_ptr + at, lse, mask=row < seqlen_q)


@gluon.jit
def add_weights(sums, words, row_sum, exact_sum, layout: gl.constexpr, HAS_LSE: gl.constexpr):
    """Add what the weights under way weigh: rounded for the output, exact for the LSE."""
    if HAS_LSE:
        exact_sum += sums
    return row_sum + as_rounded(sums, words, row_sum, layout), exact_sum


@gluon.jit
def _close(
    m, sums, words, row_sum, exact_sum, layout: gl.constexpr, lse_ptr, lse_strides, seqlen_q,
    inbox, number, HAS_LSE: gl.constexpr, ANCHORED: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """All visits of a tile have been weighed: sums of its rows; its LSE is stored."""
    if ANCHORED:
        row_sum, exact_sum = add_weights(sums, words, row_sum, exact_sum, layout, HAS_LSE)
    if HAS_LSE:
        exact_sum = exact_sum if ANCHORED else row_sum
        _store_lse(m, exact_sum, lse_ptr, lse_strides, seqlen_q, inbox, number, WARPGROUP)
    return row_total(row_sum, m)


@gluon.jit
def _finish(
    acc, total, o_desc, o_smem, inbox, inbox_empty, number,
    HAS_SUMMARY: gl.constexpr, ANCHORED: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """Divide by the sums, store, and report a tile that has to be done again."""
    factor = 1.0 / total
    if HAS_SUMMARY:  # none of which may take part
        factor = gl.where(total == 0.0, 0.0, factor)
    out = scaled(acc, factor)
    if ANCHORED:
        put(inbox, number, BAD + WARPGROUP, is_bad(total, out), NUM_WARPS=4)
    _store_out(out, o_desc, o_smem, inbox, number, WARPGROUP)
    give_back(inbox_empty, number)


@gluon.jit
def visit(
    j, number, count, p, acc, m, sums, row_sum, exact_sum, q_smem, k_ring, v_ring, bias_ring,
    barriers, scale_log2, s_layout: gl.constexpr, p_layout: gl.constexpr, dtype: gl.constexpr,
    TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr,
    Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    HAS_LSE: gl.constexpr, ANCHORED: gl.constexpr, PASS: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """Visit j of a tile, not its first one; of summaries where there is a ``bias_ring``.

    The values of the visit before are multiplied while this one's scores are weighed.
    """
    _, _, k_full, k_empty, v_full, v_empty, _, _ = barriers
    q = rows_of(q_smem, number - PASS, Q_STAGES, WARPGROUP)
    s = issue_scores(q, k_ring, k_full, count, s_layout, TILE_N, HEAD_DIM, COLUMNS, K_STAGES)
    acc = issue_values(p, acc, j > 1, v_ring, v_full, count - 1, dtype, TILE_N, HEAD_DIM, V_STAGES)
    if ANCHORED:
        row_sum, exact_sum = add_weights(sums, p, row_sum, exact_sum, s_layout, HAS_LSE)
    s = warpgroup_mma_wait(1, deps=(s,))
    if bias_ring is not None:
        bias = bias_ring.index(slot(count, K_STAGES)).load(gl.SliceLayout(0, s_layout))
        s = biased(s, scale_log2, bias)
        scale_log2 = 1.0
    release(k_empty, count, K_STAGES)
    if ANCHORED:
        weights = anchored(s, scale_log2, m)
        sums = row_sums(weights)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        release(v_empty, count - 1, V_STAGES)
    else:
        weights, m, row_sum, alpha = online(s, scale_log2, m, row_sum)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        release(v_empty, count - 1, V_STAGES)
        acc = scaled(acc, alpha)
    # The old weights are no longer read: their registers may be written.
    return pack(weights, dtype, p_layout), acc, m, sums, row_sum, exact_sum


@gluon.jit
def _tiles(
    number, count, o_desc, q_smem, k_ring, v_ring, bias_ring, o_smem, barriers, inbox, scale_log2,
    lse_ptr, lse_strides, seqlen_q,
    TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr,
    Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    IS_RAGGED: gl.constexpr, HAS_LSE: gl.constexpr, ANCHORED: gl.constexpr, PASS: gl.constexpr,
    WARPGROUP: gl.constexpr,
):  # fmt: skip
    """Compute tiles until the stream ends; the numbers of the next message and visit.

    Message ``number`` has the queries of number ``number - PASS``: one ended each earlier pass.
    """
    q_full, q_empty, k_full, k_empty, v_full, v_empty, inbox_full, inbox_empty = barriers
    HAS_SUMMARY: gl.constexpr = bias_ring is not None
    dtype: gl.constexpr = o_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)

    visits = receive(inbox, inbox_full, number)
    if visits != 0:
        q = queries(q_smem, q_full, number - PASS, Q_STAGES, WARPGROUP)
        s = issue_scores(q, k_ring, k_full, count, s_layout, TILE_N, HEAD_DIM, COLUMNS, K_STAGES)
        s = warpgroup_mma_wait(0, deps=(s,))
        release(k_empty, count, K_STAGES)
        s = _mask(s, inbox, number, IS_RAGGED, HAS_SUMMARY)
        weights, m, row_sum = first(s, scale_log2, HAS_SUMMARY)
        sums = gl.full_like(row_sum, 0.0)  # of the visit before, where they are not added yet
        exact_sum = row_sum
        p = pack(weights, dtype, p_layout)
        count += 1
        while visits != 0:
            acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=acc_layout)
            live = visits
            if HAS_SUMMARY:
                live = get(inbox, number, VALID) // PER_LIVE
            for j in range(1, live):
                p, acc, m, sums, row_sum, exact_sum = visit(
                    j, number, count, p, acc, m, sums, row_sum, exact_sum, q_smem, k_ring, v_ring,
                    None, barriers, scale_log2, s_layout, p_layout, dtype, TILE_N, HEAD_DIM,
                    COLUMNS, Q_STAGES, K_STAGES, V_STAGES, HAS_LSE, ANCHORED, PASS, WARPGROUP,
                )  # fmt: skip
                count += 1
            if HAS_SUMMARY:
                for j in range(live, visits):
                    p, acc, m, sums, row_sum, exact_sum = visit(
                        j, number, count, p, acc, m, sums, row_sum, exact_sum, q_smem, k_ring,
                        v_ring, bias_ring, barriers, scale_log2, s_layout, p_layout, dtype, TILE_N,
                        HEAD_DIM, COLUMNS, Q_STAGES, K_STAGES, V_STAGES, HAS_LSE, ANCHORED, PASS,
                        WARPGROUP,
                    )  # fmt: skip
                    count += 1
            # The last values of this tile, the first scores of the next one.
            mbarrier.arrive(q_empty.index(slot(number - PASS, Q_STAGES)), count=1)
            visits_after = receive(inbox, inbox_full, number + 1)
            if visits_after != 0:
                q = queries(q_smem, q_full, number - PASS + 1, Q_STAGES, WARPGROUP)
                s = issue_scores(
                    q, k_ring, k_full, count, s_layout, TILE_N, HEAD_DIM, COLUMNS, K_STAGES
                )
                acc = issue_values(
                    p, acc, visits > 1, v_ring, v_full, count - 1, dtype, TILE_N, HEAD_DIM,
                    V_STAGES,
                )  # fmt: skip
                total = _close(
                    m, sums, p, row_sum, exact_sum, s_layout, lse_ptr, lse_strides, seqlen_q, inbox,
                    number, HAS_LSE, ANCHORED, WARPGROUP,
                )  # fmt: skip
                s = warpgroup_mma_wait(1, deps=(s,))
                release(k_empty, count, K_STAGES)
                s = _mask(s, inbox, number + 1, IS_RAGGED, HAS_SUMMARY)
                weights, m, row_sum = first(s, scale_log2, HAS_SUMMARY)
                sums = gl.full_like(row_sum, 0.0)
                exact_sum = row_sum
                acc = warpgroup_mma_wait(0, deps=(acc,))
                release(v_empty, count - 1, V_STAGES)
                p = pack(weights, dtype, p_layout)
                _finish(
                    acc, total, o_desc, o_smem, inbox, inbox_empty, number, HAS_SUMMARY, ANCHORED,
                    WARPGROUP,
                )  # fmt: skip
                count += 1
            else:
                acc = issue_values(
                    p, acc, visits > 1, v_ring, v_full, count - 1, dtype, TILE_N, HEAD_DIM,
                    V_STAGES,
                )  # fmt: skip
                total = _close(
                    m, sums, p, row_sum, exact_sum, s_layout, lse_ptr, lse_strides, seqlen_q, inbox,
                    number, HAS_LSE, ANCHORED, WARPGROUP,
                )  # fmt: skip
                acc = warpgroup_mma_wait(0, deps=(acc,))
                release(v_empty, count - 1, V_STAGES)
                _finish(
                    acc, total, o_desc, o_smem, inbox, inbox_empty, number, HAS_SUMMARY, ANCHORED,
                    WARPGROUP,
                )  # fmt: skip
            number += 1
            visits = visits_after
    give_back(inbox_empty, number)
    return number + 1, count


@gluon.jit
def await_stores():
    """What this thread stored through TMA has arrived in global memory."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def consumer(
    o_desc, q_smem, k_ring, v_ring, bias_ring, o_smem, barriers, inbox, scale_log2, lse_ptr,
    lse_strides, seqlen_q,
    TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr,
    Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    IS_RAGGED: gl.constexpr, HAS_LSE: gl.constexpr, ANCHORED: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    zero = gl.to_tensor(0)
    number, count = _tiles(
        zero, zero, o_desc, q_smem, k_ring, v_ring, bias_ring, o_smem, barriers, inbox, scale_log2,
        lse_ptr, lse_strides, seqlen_q, TILE_N, HEAD_DIM, COLUMNS, Q_STAGES, K_STAGES, V_STAGES,
        IS_RAGGED, HAS_LSE, ANCHORED, 0, WARPGROUP,
    )  # fmt: skip
    if ANCHORED:
        await_stores()  # of rows that may now be written a second time
        _tiles(
            number, count, o_desc, q_smem, k_ring, v_ring, bias_ring, o_smem, barriers, inbox,
            scale_log2, lse_ptr, lse_strides, seqlen_q, TILE_N, HEAD_DIM, COLUMNS, Q_STAGES,
            K_STAGES, V_STAGES, IS_RAGGED, HAS_LSE, False, 1, WARPGROUP,
        )  # fmt: skip
    tma.store_wait(0)
