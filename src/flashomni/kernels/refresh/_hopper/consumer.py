"""A consumer warpgroup of a refresh: 64 query rows of each tile, to both outputs."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from flashomni.kernels.attention._hopper.consumer import (
    ROWS,
    add_weights,
    await_stores,
    issue_scores,
    issue_values,
    queries,
    release,
    row_total,
    rows_of,
    scaled,
    store_part,
    visit,
)
from flashomni.kernels.attention._hopper.messages import (
    BAD,
    BATCH,
    HEAD,
    ROW,
    VALID,
    get,
    give_back,
    put,
    receive,
)
from flashomni.kernels.attention._hopper.rings import slot
from flashomni.kernels.attention._hopper.softmax import (
    anchored,
    biased,
    first,
    is_bad,
    online,
    pack,
    row_sums,
)
from flashomni.kernels.refresh._hopper.messages import IS_TILE, OF_LIVE, OF_REST, OF_SUMMARIES


@gluon.jit
def _masked(s, valid):
    column = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    return gl.where((column < valid)[None, :], s, -float("inf"))


@gluon.jit
def _begin(
    query, count, valid, acc, m, row_sum, q_smem, k_ring, bias_ring, barriers, scale_log2,
    s_layout: gl.constexpr, p_layout: gl.constexpr, dtype: gl.constexpr, TILE_N: gl.constexpr,
    HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr, Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr,
    ANCHORED: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """The first visit of a later part: its weights, with no values under way meanwhile."""
    _, _, k_full, k_empty, _, _, _, _ = barriers
    q = rows_of(q_smem, query, Q_STAGES, WARPGROUP)
    s = issue_scores(q, k_ring, k_full, count, s_layout, TILE_N, HEAD_DIM, COLUMNS, K_STAGES)
    s = warpgroup_mma_wait(0, deps=(s,))
    if bias_ring is not None:
        bias = bias_ring.index(slot(count, K_STAGES)).load(gl.SliceLayout(0, s_layout))
        s = biased(s, scale_log2, bias)
        scale_log2 = 1.0
    else:
        s = _masked(s, valid)
    release(k_empty, count, K_STAGES)
    if ANCHORED:
        weights = anchored(s, scale_log2, m)
        sums = row_sums(weights)
    else:
        weights, m, row_sum, alpha = online(s, scale_log2, m, row_sum)
        sums = gl.full_like(row_sum, 0.0)
        acc = scaled(acc, alpha)
    return pack(weights, dtype, p_layout), acc, m, sums, row_sum


@gluon.jit
def _drain(
    p, acc, use_acc, sums, row_sum, count, v_ring, barriers, s_layout: gl.constexpr,
    dtype: gl.constexpr, TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr, V_STAGES: gl.constexpr,
    ANCHORED: gl.constexpr,
):  # fmt: skip
    """A part is over: its last values, and what they weigh."""
    _, _, _, _, v_full, v_empty, _, _ = barriers
    acc = issue_values(
        p, acc, use_acc, v_ring, v_full, count - 1, dtype, TILE_N, HEAD_DIM, V_STAGES
    )
    if ANCHORED:
        row_sum, _ = add_weights(sums, p, row_sum, row_sum, s_layout, False)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    release(v_empty, count - 1, V_STAGES)
    return acc, row_sum


@gluon.jit
def _rows(acc, row_sum, m):
    """Rows divided by their sums, 0 where they have no key; the sums."""
    total = row_total(row_sum, m)
    out = scaled(acc, 1.0 / total)
    layout: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    return gl.where((gl.convert_layout(total, layout) == 0.0)[:, None], 0.0, out), total


@gluon.jit
def _scratch(scratch, WARPGROUP: gl.constexpr, HEAD_DIM: gl.constexpr, layout: gl.constexpr):
    """Where this warpgroup keeps the state of live blocks while it visits summaries."""
    start = (gl.program_id(0) * 2 + WARPGROUP) * (ROWS * HEAD_DIM)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, layout))
    return scratch + start + row[:, None] * HEAD_DIM + column[None, :]


@gluon.jit
def _tiles(
    number, count, o_desc, d_desc, q_smem, k_ring, v_ring, bias_ring, o_smem, barriers, inbox,
    scratch, scale_log2, TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr,
    Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, ANCHORED: gl.constexpr,
    PASS: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """Compute tiles until the stream ends; the numbers of the next message and visit."""
    q_full, q_empty, k_full, k_empty, _v_full, _v_empty, inbox_full, inbox_empty = barriers
    HAS_SUMMARY: gl.constexpr = bias_ring is not None
    dtype: gl.constexpr = o_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)

    visits = receive(inbox, inbox_full, number)
    while visits != 0:
        query = number - PASS
        rest = visits % OF_SUMMARIES
        live = get(inbox, number, VALID) // OF_LIVE
        q = queries(q_smem, q_full, query, Q_STAGES, WARPGROUP)
        s = issue_scores(q, k_ring, k_full, count, s_layout, TILE_N, HEAD_DIM, COLUMNS, K_STAGES)
        s = warpgroup_mma_wait(0, deps=(s,))
        release(k_empty, count, K_STAGES)
        s = _masked(s, get(inbox, number, VALID) % OF_REST)
        weights, m, row_sum = first(s, scale_log2, True)
        sums = gl.full_like(row_sum, 0.0)
        p = pack(weights, dtype, p_layout)
        count += 1
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=acc_layout)
        for j in range(1, live):
            p, acc, m, sums, row_sum, _same = visit(
                j, number, count, p, acc, m, sums, row_sum, row_sum, q_smem, k_ring, v_ring, None,
                barriers, scale_log2, s_layout, p_layout, dtype, TILE_N, HEAD_DIM, COLUMNS,
                Q_STAGES, K_STAGES, V_STAGES, False, ANCHORED, PASS, WARPGROUP,
            )  # fmt: skip
            count += 1
        acc, row_sum = _drain(
            p, acc, live > 1, sums, row_sum, count, v_ring, barriers, s_layout, dtype, TILE_N,
            HEAD_DIM, V_STAGES, ANCHORED,
        )  # fmt: skip
        live_m, live_sum = m, row_sum
        if HAS_SUMMARY:
            of_summaries = visits % IS_TILE // OF_SUMMARIES
            if of_summaries > 0:
                gl.store(_scratch(scratch, WARPGROUP, HEAD_DIM, acc_layout), acc)
                p, acc, m, sums, row_sum = _begin(
                    query, count, TILE_N, acc, m, row_sum, q_smem, k_ring, bias_ring, barriers,
                    scale_log2, s_layout, p_layout, dtype, TILE_N, HEAD_DIM, COLUMNS, Q_STAGES,
                    K_STAGES, ANCHORED, WARPGROUP,
                )  # fmt: skip
                count += 1
                for _j in range(1, of_summaries):
                    p, acc, m, sums, row_sum, _same = visit(
                        2, number, count, p, acc, m, sums, row_sum, row_sum, q_smem, k_ring,
                        v_ring, bias_ring, barriers, scale_log2, s_layout, p_layout, dtype, TILE_N,
                        HEAD_DIM, COLUMNS, Q_STAGES, K_STAGES, V_STAGES, False, ANCHORED, PASS,
                        WARPGROUP,
                    )  # fmt: skip
                    count += 1
                acc, row_sum = _drain(
                    p, acc, True, sums, row_sum, count, v_ring, barriers, s_layout, dtype, TILE_N,
                    HEAD_DIM, V_STAGES, ANCHORED,
                )  # fmt: skip
        out, total = _rows(acc, row_sum, m)
        bad = 0
        if ANCHORED:
            bad = is_bad(total, out)
        batch = get(inbox, number, BATCH)
        head = get(inbox, number, HEAD)
        row = get(inbox, number, ROW) + WARPGROUP * ROWS
        store_part(out, o_desc, o_smem, batch, head, row, 0)
        if rest > 0:
            if HAS_SUMMARY:
                acc = gl.load(_scratch(scratch, WARPGROUP, HEAD_DIM, acc_layout))
                # Loaded now, not when values are multiplied: ptxas would serialise all of them.
                acc = warpgroup_mma_wait(0, deps=(acc,))
                m, row_sum = live_m, live_sum
            valid = get(inbox, number, VALID) // OF_REST % (OF_LIVE // OF_REST)
            p, acc, m, sums, row_sum = _begin(
                query, count, valid, acc, m, row_sum, q_smem, k_ring, None, barriers, scale_log2,
                s_layout, p_layout, dtype, TILE_N, HEAD_DIM, COLUMNS, Q_STAGES, K_STAGES, ANCHORED,
                WARPGROUP,
            )  # fmt: skip
            count += 1
            for _j in range(1, rest):
                p, acc, m, sums, row_sum, _same = visit(
                    2, number, count, p, acc, m, sums, row_sum, row_sum, q_smem, k_ring, v_ring,
                    None, barriers, scale_log2, s_layout, p_layout, dtype, TILE_N, HEAD_DIM,
                    COLUMNS, Q_STAGES, K_STAGES, V_STAGES, False, ANCHORED, PASS, WARPGROUP,
                )  # fmt: skip
                count += 1
            acc, row_sum = _drain(
                p, acc, True, sums, row_sum, count, v_ring, barriers, s_layout, dtype, TILE_N,
                HEAD_DIM, V_STAGES, ANCHORED,
            )  # fmt: skip
        mbarrier.arrive(q_empty.index(slot(query, Q_STAGES)), count=1)
        dense, total = _rows(acc, row_sum, m)
        if ANCHORED:
            put(inbox, number, BAD + WARPGROUP, bad | is_bad(total, dense), NUM_WARPS=4)
        # The buffer still holds sparse attention as it was rounded.
        sparse = o_smem.reshape([ROWS, HEAD_DIM]).load(acc_layout).to(gl.float32)
        missed = gl.where(rest > 0, dense - sparse, 0.0)
        store_part(missed, d_desc, o_smem, batch, head, row, 0)
        give_back(inbox_empty, number)
        number += 1
        visits = receive(inbox, inbox_full, number)
    give_back(inbox_empty, number)
    return number + 1, count


@gluon.jit
def consumer(
    o_desc, d_desc, q_smem, k_ring, v_ring, bias_ring, o_smem, barriers, inbox, scratch, scale_log2,
    TILE_N: gl.constexpr, HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr, Q_STAGES: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, ANCHORED: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    zero = gl.to_tensor(0)
    number, count = _tiles(
        zero, zero, o_desc, d_desc, q_smem, k_ring, v_ring, bias_ring, o_smem, barriers, inbox,
        scratch, scale_log2, TILE_N, HEAD_DIM, COLUMNS, Q_STAGES, K_STAGES, V_STAGES, ANCHORED, 0,
        WARPGROUP,
    )  # fmt: skip
    if ANCHORED:
        await_stores()  # of rows that may now be written a second time
        _tiles(
            number, count, o_desc, d_desc, q_smem, k_ring, v_ring, bias_ring, o_smem, barriers,
            inbox, scratch, scale_log2, TILE_N, HEAD_DIM, COLUMNS, Q_STAGES, K_STAGES, V_STAGES,
            False, 1, WARPGROUP,
        )  # fmt: skip
    tma.store_wait(0)
