"""The producer warp of a refresh: each tile's live blocks, summaries, and the other blocks."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.extra import libdevice

from flashomni.kernels.attention._hopper.bits import (
    keep_valid,
    pick,
    read_row,
    summary_weights,
    valid_keys,
)
from flashomni.kernels.attention._hopper.messages import DEPTH, await_slot, send
from flashomni.kernels.attention._hopper.producer import (
    load_summaries,
    load_tile,
    load_visit,
    retire,
)
from flashomni.kernels.common.hopper import thread_barrier
from flashomni.kernels.refresh._hopper.messages import IS_TILE, OF_LIVE, OF_REST, OF_SUMMARIES


@gluon.jit
def _load_blocks(
    words, num_blocks, num_visits, k_desc, v_desc, batch, kv_head, k_ring, v_ring, barriers, count,
    PER_BLOCK: gl.constexpr, TILE_N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """Load the blocks of a part; the key tile whose values are not loaded yet, -1 without any."""
    _, _, k_full, k_empty, v_full, v_empty, _, _ = barriers
    held = gl.to_tensor(-1)
    i = (num_blocks - 1) // 32
    while i >= 0:
        word = pick(words, i)
        while word != 0:
            highest = 31 - libdevice.clz(word)
            word = word ^ (1 << highest)
            for u in gl.static_range(PER_BLOCK - 1, -1, -1):
                n = (i * 32 + highest) * PER_BLOCK + u
                if (PER_BLOCK == 1) or (n < num_visits):
                    load_visit(
                        k_desc, v_desc, batch, kv_head, n, held, k_ring, v_ring, k_full, k_empty,
                        v_full, v_empty, count, TILE_N, K_STAGES, V_STAGES,
                    )  # fmt: skip
                    count += 1
                    held = n
        i -= 1
    return count, held


@gluon.jit
def _load_values(
    desc, batch, kv_head, held, v_ring, barriers, count, TILE_N: gl.constexpr,
    V_STAGES: gl.constexpr,
):  # fmt: skip
    """The last values of a part, if it has any."""
    if held >= 0:
        load_tile(
            desc, [batch, kv_head, held * TILE_N, 0], v_ring, barriers[4], barriers[5], count - 1,
            V_STAGES,
        )  # fmt: skip


@gluon.jit
def _stream(
    sent, count, loaded, bad_tile, q_desc, k_desc, v_desc, q_smem, k_ring, v_ring, barriers, inbox,
    symbols, sizes, summary, kv_len_ptr, redo, PER_BLOCK: gl.constexpr, MAX_WORDS: gl.constexpr,
    Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    HAS_KV_LEN: gl.constexpr, SUMMARIES: gl.constexpr, ANCHORED: gl.constexpr,
    IS_REDO: gl.constexpr,
):  # fmt: skip
    """All tiles of this program, or those of its list of bad ones."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, inbox_full, inbox_empty = barriers
    num_tiles, tiles_m, num_heads, group, seqlen_kv = sizes
    TILE_M: gl.constexpr = q_desc.block_type.shape[2]
    TILE_N: gl.constexpr = k_desc.block_type.shape[2]
    if SUMMARIES > 0:
        mean_k_desc, mean_v_desc, log_n, log_n_stride, bias_ring = summary
    tile = gl.program_id(0)
    if IS_REDO:
        tile = gl.where(bad_tile < 0, num_tiles, bad_tile)
    words = read_row(gl.minimum(tile, num_tiles - 1), symbols, num_heads, tiles_m, MAX_WORDS)
    while tile < num_tiles:
        this = tile
        m = tile % tiles_m
        head = tile // tiles_m % num_heads
        batch = tile // tiles_m // num_heads
        kv_head = head // group
        valid = valid_keys(kv_len_ptr, batch, seqlen_kv, HAS_KV_LEN)
        num_visits = (valid + TILE_N - 1) // TILE_N
        num_blocks = (num_visits + PER_BLOCK - 1) // PER_BLOCK
        left_out = keep_valid(~words, num_blocks)
        words = keep_valid(words, num_blocks)
        last = gl.maximum(num_blocks - 1, 0)
        has_last = (pick(words, last // 32) >> (last % 32)) & 1
        cut = num_blocks * PER_BLOCK - num_visits  # visits that the last block lacks
        live = gl.sum(libdevice.popc(words), axis=0) * PER_BLOCK - has_last * cut
        rest = num_visits - live
        of_last = valid - (num_visits - 1) * TILE_N
        live_valid = gl.where(has_last != 0, of_last, TILE_N)
        rest_valid = gl.where(has_last != 0, TILE_N, of_last)
        # The first visit is always there: without a live block, it is of keys that are masked.
        is_hollow = live == 0
        live_valid = gl.where(is_hollow, 0, live_valid)
        of_summaries = gl.to_tensor(0)
        if SUMMARIES > 0:
            of_summaries = (num_blocks * SUMMARIES + TILE_N - 1) // TILE_N
            of_summaries = gl.where(rest > 0, of_summaries, 0)
        load_tile(q_desc, [batch, head, m * TILE_M, 0], q_smem, q_full, q_empty, loaded, Q_STAGES)
        loaded += 1
        if ANCHORED and not IS_REDO:
            bad_tile = retire(sent, bad_tile, redo, inbox, inbox_empty, sizes, TILE_M)
        else:
            await_slot(inbox_empty, sent)
        send(
            inbox, inbox_full, sent, batch, head, m * TILE_M,
            IS_TILE + OF_SUMMARIES * of_summaries + rest,
            live_valid + OF_REST * rest_valid + OF_LIVE * gl.maximum(live, 1),
        )  # fmt: skip
        sent += 1
        count, held = _load_blocks(
            words, num_blocks, num_visits, k_desc, v_desc, batch, kv_head, k_ring, v_ring, barriers,
            count, PER_BLOCK, TILE_N, K_STAGES, V_STAGES,
        )  # fmt: skip
        if is_hollow:
            load_visit(
                k_desc, v_desc, batch, kv_head, 0, -1, k_ring, v_ring, k_full, k_empty, v_full,
                v_empty, count, TILE_N, K_STAGES, V_STAGES,
            )  # fmt: skip
            count += 1
            held = gl.to_tensor(0)
        _load_values(v_desc, batch, kv_head, held, v_ring, barriers, count, TILE_N, V_STAGES)
        if SUMMARIES > 0:
            log_n_row = log_n + batch * log_n_stride
            held = gl.to_tensor(-1)
            for t in range(of_summaries):
                weights = summary_weights(left_out, t, log_n_row, SUMMARIES, TILE_N)
                load_summaries(
                    mean_k_desc, weights, batch, kv_head, t, k_ring, bias_ring, k_full, k_empty,
                    count, TILE_N, K_STAGES,
                )  # fmt: skip
                _load_values(
                    mean_v_desc, batch, kv_head, held, v_ring, barriers, count, TILE_N, V_STAGES
                )
                count += 1
                held = t
            _load_values(
                mean_v_desc, batch, kv_head, held, v_ring, barriers, count, TILE_N, V_STAGES
            )
        count, held = _load_blocks(
            left_out, num_blocks, num_visits, k_desc, v_desc, batch, kv_head, k_ring, v_ring,
            barriers, count, PER_BLOCK, TILE_N, K_STAGES, V_STAGES,
        )  # fmt: skip
        if IS_REDO:
            tile = gl.load(redo + this)
            tile = gl.where(tile < 0, num_tiles, tile)
        else:
            tile += gl.num_programs(0)
        # The next tile's symbols are on their way while the last load waits for its slot.
        words = read_row(gl.minimum(tile, num_tiles - 1), symbols, num_heads, tiles_m, MAX_WORDS)
        _load_values(v_desc, batch, kv_head, held, v_ring, barriers, count, TILE_N, V_STAGES)
    if ANCHORED and not IS_REDO:
        bad_tile = retire(sent, bad_tile, redo, inbox, inbox_empty, sizes, TILE_M)
    else:
        await_slot(inbox_empty, sent)
    send(inbox, inbox_full, sent, 0, 0, 0, 0, 0)
    return sent + 1, count, loaded, bad_tile


@gluon.jit
def producer(
    q_desc, k_desc, v_desc, q_smem, k_ring, v_ring, barriers, inbox, symbols, sizes, summary,
    kv_len_ptr, redo, PER_BLOCK: gl.constexpr, MAX_WORDS: gl.constexpr, Q_STAGES: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, HAS_KV_LEN: gl.constexpr,
    SUMMARIES: gl.constexpr, ANCHORED: gl.constexpr,
):  # fmt: skip
    """All tiles; then the bad ones, if the softmax is anchored."""
    TILE_M: gl.constexpr = q_desc.block_type.shape[2]
    zero = gl.to_tensor(0)
    sent, count, loaded, bad_tile = _stream(
        zero, zero, zero, gl.to_tensor(-1), q_desc, k_desc, v_desc, q_smem, k_ring, v_ring,
        barriers, inbox, symbols, sizes, summary, kv_len_ptr, redo, PER_BLOCK, MAX_WORDS, Q_STAGES,
        K_STAGES, V_STAGES, HAS_KV_LEN, SUMMARIES, ANCHORED, False,
    )  # fmt: skip
    if ANCHORED:
        # The message before ``sent`` ended the stream; behind it DEPTH - 1 tiles may be open.
        for i in range(DEPTH - 1):
            bad_tile = retire(sent + i, bad_tile, redo, inbox, barriers[7], sizes, TILE_M)
        thread_barrier()  # the list was written by one thread
        _stream(
            sent, count, loaded, bad_tile, q_desc, k_desc, v_desc, q_smem, k_ring, v_ring,
            barriers, inbox, symbols, sizes, summary, kv_len_ptr, redo, PER_BLOCK, MAX_WORDS,
            Q_STAGES, K_STAGES, V_STAGES, HAS_KV_LEN, SUMMARIES, True, True,
        )  # fmt: skip
