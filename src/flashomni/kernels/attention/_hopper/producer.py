"""The producer warp: reads symbols, loads tiles through TMA, and says what there is to compute.

It alone decodes symbols, and runs ahead of the consumers. It goes through the tiles in the order
of ``_tile_order``, or in their natural order where all of them cost the same. After that, where
the softmax is anchored, it goes through those that the consumers have reported as bad: a list of
its own, linked through one word a tile, so that nothing has to be counted or cleared before.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.extra import libdevice
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashomni.kernels.attention._hopper.bits import (
    count_blocks,
    count_summary_tiles,
    is_summarised,
    keep_valid,
    pick,
    read_symbols,
    summary_weights,
    valid_keys,
)
from flashomni.kernels.attention._hopper.messages import (
    BAD,
    BATCH,
    DEPTH,
    HEAD,
    PER_LIVE,
    ROW,
    await_slot,
    get,
    send,
)
from flashomni.kernels.attention._hopper.rings import parity, slot
from flashomni.kernels.common.hopper import (
    thread_barrier,
    tma_load,
    wait_for_previous_kernel,
)

# Words of ``redone`` behind the count: tiles of the call under way, programs of it that are done,
# and calls in a row that did more than a tenth of their tiles again.
NOW: gl.constexpr = gl.constexpr(1)
PROGRAMS: gl.constexpr = gl.constexpr(2)
CALLS: gl.constexpr = gl.constexpr(3)
PATIENCE: gl.constexpr = gl.constexpr(3)  # after so many the online softmax is cheaper


@gluon.jit
def load_tile(desc, coordinates, ring, full, empty, count, STAGES: gl.constexpr):
    """Load the tile of number ``count`` into its slot of a ring."""
    at = slot(count, STAGES)
    mbarrier.wait(empty.index(at), parity(count, STAGES) ^ 1)
    mbarrier.expect(full.index(at), desc.block_type.nbytes)
    tma_load(desc, coordinates, full.index(at), ring.index(at))


@gluon.jit
def load_visit(
    k_desc, v_desc, batch, kv_head, n, held, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    count, TILE_N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """Load the keys of visit ``count``, then the values of the one before it in this tile."""
    load_tile(k_desc, [batch, kv_head, n * TILE_N, 0], k_ring, k_full, k_empty, count, K_STAGES)
    if held >= 0:
        load_tile(
            v_desc, [batch, kv_head, held * TILE_N, 0], v_ring, v_full, v_empty, count - 1,
            V_STAGES,
        )  # fmt: skip


@gluon.jit
def load_summaries(
    desc, weights, batch, kv_head, t, k_ring, bias_ring, k_full, k_empty, count,
    TILE_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the keys of summary tile t as those of visit ``count``, and what is added to scores."""
    at = slot(count, STAGES)
    mbarrier.wait(k_empty.index(at), parity(count, STAGES) ^ 1)
    bias_ring.index(at).store(weights)
    thread_barrier()  # one thread arrives for all
    mbarrier.expect(k_full.index(at), desc.block_type.nbytes)
    tma_load(desc, [batch, kv_head, t * TILE_N, 0], k_full.index(at), k_ring.index(at))


@gluon.jit
def retire(number, bad_tile, redo, inbox, inbox_empty, sizes, TILE_M: gl.constexpr):
    """Free the slot of message ``number``: a tile there that has to be done again heads the list.

    ``bad_tile`` is the head of the list, -1 where it is empty.
    """
    _, tiles_m, num_heads, _, _ = sizes
    await_slot(inbox_empty, number)
    if number >= DEPTH:
        # 0 or 1 from each of the two warpgroups.
        bad = get(inbox, number, BAD, NUM_WARPS=1) | get(inbox, number, BAD + 1, NUM_WARPS=1)
        if bad != 0:
            batch = get(inbox, number, BATCH, NUM_WARPS=1)
            head = get(inbox, number, HEAD, NUM_WARPS=1)
            row = get(inbox, number, ROW, NUM_WARPS=1)
            tile = (batch * num_heads + head) * tiles_m + row // TILE_M
            gl.store(redo + tile, bad_tile)
            bad_tile = tile
    return bad_tile


@gluon.jit
def _stream(
    sent, count, loaded, bad_tile, q_desc, k_desc, v_desc, q_smem, k_ring, v_ring, barriers,
    inbox, symbols, sizes, summary, kv_len_ptr, order, redo,
    PER_BLOCK: gl.constexpr, MAX_WORDS: gl.constexpr, Q_STAGES: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, IS_SPARSE: gl.constexpr,
    IS_RAGGED: gl.constexpr, HAS_KV_LEN: gl.constexpr, LISTED: gl.constexpr,
    SUMMARIES: gl.constexpr, ANCHORED: gl.constexpr, IS_REDO: gl.constexpr,
):  # fmt: skip
    """All tiles of this program, or those of its list of bad ones.

    Gives back the numbers of the next message, visit and tile of queries, and the list's head.
    """
    q_full, q_empty, k_full, k_empty, v_full, v_empty, inbox_full, inbox_empty = barriers
    num_tiles, tiles_m, num_heads, group, seqlen_kv = sizes
    TILE_M: gl.constexpr = q_desc.block_type.shape[2]
    TILE_N: gl.constexpr = k_desc.block_type.shape[2]
    TAKES_TURNS: gl.constexpr = IS_SPARSE and not IS_REDO  # tiles come from the grid's counter
    HAS_SUMMARY: gl.constexpr = SUMMARIES > 0
    if HAS_SUMMARY:
        mean_k_desc, mean_v_desc, log_n, log_n_stride, bias_ring = summary
    first_listed = gl.maximum(num_tiles - LISTED, 0)
    position = gl.program_id(0)
    tile = position
    if IS_REDO:
        tile = bad_tile
        position = gl.where(tile < 0, num_tiles, 0)
    if IS_SPARSE:
        if TAKES_TURNS:
            wait_for_previous_kernel()
            if position >= first_listed:
                tile = gl.load(order + 1 + position - first_listed)
        q_byte, words = read_symbols(gl.maximum(tile, 0), symbols, num_heads, tiles_m, MAX_WORDS)
    while position < num_tiles:
        is_live = tile >= 0
        tile = gl.maximum(tile, 0)
        this = tile
        m = tile % tiles_m
        head = tile // tiles_m % num_heads
        batch = tile // tiles_m // num_heads
        kv_head = head // group
        valid = valid_keys(kv_len_ptr, batch, seqlen_kv, HAS_KV_LEN)
        num_visits = (valid + TILE_N - 1) // TILE_N
        visits = num_visits
        first_valid = TILE_N
        if IS_RAGGED:
            first_valid = valid - (num_visits - 1) * TILE_N
        if IS_SPARSE:
            is_live = is_live & (((q_byte >> (m % 8)) & 1) != 0)
            num_blocks = (num_visits + PER_BLOCK - 1) // PER_BLOCK
            if HAS_SUMMARY:
                left_out = keep_valid(~words, num_blocks)
                summary_visits = count_summary_tiles(left_out, num_blocks, SUMMARIES, TILE_N)
            words = keep_valid(words, num_blocks)
            if IS_RAGGED or PER_BLOCK > 1:
                blocks, has_last = count_blocks(words, num_blocks)
                visits = blocks * PER_BLOCK - has_last * (num_blocks * PER_BLOCK - num_visits)
                if IS_RAGGED:
                    first_valid = gl.where(has_last != 0, first_valid, TILE_N)
            else:
                visits = gl.sum(libdevice.popc(words), axis=0)
        if HAS_SUMMARY:
            # The first visit is never of summaries: without a block, it is of keys that are masked.
            is_hollow = visits == 0
            is_live = is_live & (valid > 0)
            visits = gl.maximum(visits, 1)
            first_valid = gl.where(is_hollow, 0, first_valid) + PER_LIVE * visits
            visits += summary_visits
        held = gl.to_tensor(-1)  # the key tile that was loaded, its values not yet
        if is_live & (visits > 0):  # empty tiles are written already
            load_tile(
                q_desc, [batch, head, m * TILE_M, 0], q_smem, q_full, q_empty, loaded, Q_STAGES
            )
            loaded += 1
            if ANCHORED and not IS_REDO:
                bad_tile = retire(sent, bad_tile, redo, inbox, inbox_empty, sizes, TILE_M)
            else:
                await_slot(inbox_empty, sent)
            send(inbox, inbox_full, sent, batch, head, m * TILE_M, visits, first_valid)
            sent += 1
            if HAS_SUMMARY:  # noqa: SIM102 - a constant, the other is not
                if is_hollow:
                    load_visit(
                        k_desc, v_desc, batch, kv_head, 0, held, k_ring, v_ring, k_full, k_empty,
                        v_full, v_empty, count, TILE_N, K_STAGES, V_STAGES,
                    )  # fmt: skip
                    if TAKES_TURNS:
                        position = gl.atomic_add(order, 1, sem="relaxed")
                    count += 1
                    held = gl.to_tensor(0)
            if IS_SPARSE:
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
                                    k_desc, v_desc, batch, kv_head, n, held, k_ring, v_ring,
                                    k_full, k_empty, v_full, v_empty, count, TILE_N,
                                    K_STAGES, V_STAGES,
                                )  # fmt: skip
                                if TAKES_TURNS:  # noqa: SIM102 - a constant, the other is not
                                    if held < 0:  # the consumers have enough to do meanwhile
                                        position = gl.atomic_add(order, 1, sem="relaxed")
                                count += 1
                                held = n
                    i -= 1
                if HAS_SUMMARY:
                    log_n_row = log_n + batch * log_n_stride
                    of_block = gl.to_tensor(True)  # the tile that is held
                    summary_tiles = (num_blocks * SUMMARIES + TILE_N - 1) // TILE_N
                    for t in range(gl.where(summary_visits > 0, summary_tiles, 0)):
                        if is_summarised(left_out, t, SUMMARIES, TILE_N):
                            weights = summary_weights(left_out, t, log_n_row, SUMMARIES, TILE_N)
                            load_summaries(
                                mean_k_desc, weights, batch, kv_head, t, k_ring, bias_ring, k_full,
                                k_empty, count, TILE_N, K_STAGES,
                            )  # fmt: skip
                            if of_block:
                                load_tile(
                                    v_desc, [batch, kv_head, held * TILE_N, 0], v_ring, v_full,
                                    v_empty, count - 1, V_STAGES,
                                )  # fmt: skip
                            else:
                                load_tile(
                                    mean_v_desc, [batch, kv_head, held * TILE_N, 0], v_ring,
                                    v_full, v_empty, count - 1, V_STAGES,
                                )  # fmt: skip
                            of_block = gl.to_tensor(False)
                            count += 1
                            held = t
            else:
                for j in range(visits):
                    n = visits - 1 - j
                    load_visit(
                        k_desc, v_desc, batch, kv_head, n, held, k_ring, v_ring, k_full,
                        k_empty, v_full, v_empty, count, TILE_N, K_STAGES, V_STAGES,
                    )  # fmt: skip
                    count += 1
                    held = n
        # The next tile's symbols are on their way while the last load waits for its slot.
        if IS_REDO:
            tile = gl.load(redo + this)
            position = gl.where(tile < 0, num_tiles, 0)
        elif IS_SPARSE:
            if held < 0:
                position = gl.atomic_add(order, 1, sem="relaxed")
            tile = gl.minimum(position, num_tiles - 1)
            if tile >= first_listed:
                tile = gl.load(order + 1 + tile - first_listed)
        else:
            position += gl.num_programs(0)
            tile = position
        if IS_SPARSE:
            q_byte, words = read_symbols(
                gl.maximum(tile, 0), symbols, num_heads, tiles_m, MAX_WORDS
            )
        if HAS_SUMMARY:  # noqa: SIM102 - a constant, the other is not
            if (held >= 0) & (summary_visits > 0):
                load_tile(
                    mean_v_desc, [batch, kv_head, held * TILE_N, 0], v_ring, v_full, v_empty,
                    count - 1, V_STAGES,
                )  # fmt: skip
                held = gl.to_tensor(-1)
        if held >= 0:
            load_tile(
                v_desc, [batch, kv_head, held * TILE_N, 0], v_ring, v_full, v_empty, count - 1,
                V_STAGES,
            )  # fmt: skip
    if ANCHORED and not IS_REDO:
        bad_tile = retire(sent, bad_tile, redo, inbox, inbox_empty, sizes, TILE_M)
    else:
        await_slot(inbox_empty, sent)
    send(inbox, inbox_full, sent, 0, 0, 0, 0, 0)
    return sent + 1, count, loaded, bad_tile


@gluon.jit
def _count(redone, again, num_tiles):
    """Add the tiles that this program did again; the last program judges the whole call."""
    if again > 0:
        gl.atomic_add(redone, again, sem="relaxed")
        gl.atomic_add(redone + NOW, again, sem="relaxed")
    done = gl.atomic_add(redone + PROGRAMS, 1, sem="acq_rel")
    if done == gl.num_programs(0) - 1:
        now = gl.atomic_add(redone + NOW, 0, sem="relaxed")
        calls = gl.load(redone + CALLS)
        gl.store(redone + CALLS, gl.where(now * 10 > num_tiles, calls + 1, 0))
        gl.store(redone + NOW, 0)
        gl.store(redone + PROGRAMS, 0)


@gluon.jit
def _anchored(
    q_desc, k_desc, v_desc, q_smem, k_ring, v_ring, barriers, inbox, symbols, sizes, summary,
    kv_len_ptr, order, redo, redone,
    PER_BLOCK: gl.constexpr, MAX_WORDS: gl.constexpr, Q_STAGES: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, IS_SPARSE: gl.constexpr,
    IS_RAGGED: gl.constexpr, HAS_KV_LEN: gl.constexpr, LISTED: gl.constexpr,
    SUMMARIES: gl.constexpr,
):  # fmt: skip
    """All tiles, then the bad ones."""
    TILE_M: gl.constexpr = q_desc.block_type.shape[2]
    inbox_empty = barriers[7]
    zero = gl.to_tensor(0)
    sent, count, loaded, bad_tile = _stream(
        zero, zero, zero, gl.to_tensor(-1), q_desc, k_desc, v_desc, q_smem, k_ring, v_ring,
        barriers, inbox, symbols, sizes, summary, kv_len_ptr, order, redo, PER_BLOCK, MAX_WORDS,
        Q_STAGES, K_STAGES, V_STAGES, IS_SPARSE, IS_RAGGED, HAS_KV_LEN, LISTED, SUMMARIES, True,
        False,
    )  # fmt: skip
    # The message before ``sent`` ended the stream; behind it up to DEPTH - 1 tiles are open.
    for i in range(DEPTH - 1):
        bad_tile = retire(sent + i, bad_tile, redo, inbox, inbox_empty, sizes, TILE_M)
    thread_barrier()  # the list was written by one thread
    started = loaded
    sent, count, loaded, bad_tile = _stream(
        sent, count, loaded, bad_tile, q_desc, k_desc, v_desc, q_smem, k_ring, v_ring, barriers,
        inbox, symbols, sizes, summary, kv_len_ptr, order, redo, PER_BLOCK, MAX_WORDS, Q_STAGES,
        K_STAGES, V_STAGES, IS_SPARSE, IS_RAGGED, HAS_KV_LEN, LISTED, SUMMARIES, True, True,
    )  # fmt: skip
    if redone is not None:
        _count(redone, loaded - started, sizes[0])


@gluon.jit
def _online(
    sent, q_desc, k_desc, v_desc, q_smem, k_ring, v_ring, barriers, inbox, symbols, sizes, summary,
    kv_len_ptr, order, redo,
    PER_BLOCK: gl.constexpr, MAX_WORDS: gl.constexpr, Q_STAGES: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, IS_SPARSE: gl.constexpr,
    IS_RAGGED: gl.constexpr, HAS_KV_LEN: gl.constexpr, LISTED: gl.constexpr,
    SUMMARIES: gl.constexpr,
):  # fmt: skip
    """All tiles, in the only pass or in that which is online."""
    zero = gl.to_tensor(0)
    _stream(
        sent, zero, zero, gl.to_tensor(-1), q_desc, k_desc, v_desc, q_smem, k_ring, v_ring,
        barriers, inbox, symbols, sizes, summary, kv_len_ptr, order, redo, PER_BLOCK, MAX_WORDS,
        Q_STAGES, K_STAGES, V_STAGES, IS_SPARSE, IS_RAGGED, HAS_KV_LEN, LISTED, SUMMARIES, False,
        False,
    )  # fmt: skip


@gluon.jit
def producer(
    q_desc, k_desc, v_desc, q_smem, k_ring, v_ring, barriers, inbox, symbols, sizes, summary,
    kv_len_ptr, order, redo, redone,
    PER_BLOCK: gl.constexpr, MAX_WORDS: gl.constexpr, Q_STAGES: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, IS_SPARSE: gl.constexpr,
    IS_RAGGED: gl.constexpr, HAS_KV_LEN: gl.constexpr, LISTED: gl.constexpr,
    SUMMARIES: gl.constexpr, ANCHORED: gl.constexpr,
):  # fmt: skip
    zero = gl.to_tensor(0)
    if not ANCHORED:
        _online(
            zero, q_desc, k_desc, v_desc, q_smem, k_ring, v_ring, barriers, inbox, symbols, sizes,
            summary, kv_len_ptr, order, redo, PER_BLOCK, MAX_WORDS, Q_STAGES, K_STAGES, V_STAGES,
            IS_SPARSE, IS_RAGGED, HAS_KV_LEN, LISTED, SUMMARIES,
        )  # fmt: skip
    elif redone is None or gl.load(redone + CALLS) < PATIENCE:
        _anchored(
            q_desc, k_desc, v_desc, q_smem, k_ring, v_ring, barriers, inbox, symbols, sizes,
            summary, kv_len_ptr, order, redo, redone, PER_BLOCK, MAX_WORDS, Q_STAGES, K_STAGES,
            V_STAGES, IS_SPARSE, IS_RAGGED, HAS_KV_LEN, LISTED, SUMMARIES,
        )  # fmt: skip
    else:  # the first pass is over before it begins
        await_slot(barriers[7], zero)
        send(inbox, barriers[6], zero, 0, 0, 0, 0, 0)
        _online(
            zero + 1, q_desc, k_desc, v_desc, q_smem, k_ring, v_ring, barriers, inbox, symbols,
            sizes, summary, kv_len_ptr, order, redo, PER_BLOCK, MAX_WORDS, Q_STAGES, K_STAGES,
            V_STAGES, IS_SPARSE, IS_RAGGED, HAS_KV_LEN, LISTED, SUMMARIES,
        )  # fmt: skip
