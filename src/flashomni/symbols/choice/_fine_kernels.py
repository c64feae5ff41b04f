"""Triton kernels of the map of :func:`fine_map`: means of few tokens, and masses of block pairs.

Of a map of 33K tokens in parts of 8 only the sums over block pairs are ever stored: 1 of 256
entries. A program goes over the keys twice: once for the sums of its rows, once for the masses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashomni.symbols.choice._kernels import token_limits

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _means_of_block(
    x, means, similarity, to, at_block, limit, unit_limit, block, count, scale, stride_s,
    BLOCK: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, PADDED_DIM)
    unit_total = tl.zeros([PADDED_DIM], tl.float32)
    for start in range(0, BLOCK, TILE):
        place = start + tl.arange(0, TILE)
        token = block * BLOCK + place
        mine = (place < BLOCK)[:, None] & (dim < HEAD_DIM)[None, :]
        inside = mine & (token < tl.maximum(limit, unit_limit))[:, None]
        at = token.to(tl.int64)[:, None] * stride_s + dim[None, :]
        tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        valid = tl.where((token < limit)[:, None], tile, 0.0)
        total = tl.sum(tl.reshape(valid, [TILE // SIZE, SIZE, PADDED_DIM]), 1)
        part = block * (BLOCK // SIZE) + start // SIZE + tl.arange(0, TILE // SIZE)
        held = tl.maximum(tl.minimum(limit - part * SIZE, SIZE), 1)
        mean = total / held[:, None].to(tl.float32) * scale
        mean = tl.minimum(tl.maximum(mean, -65504.0), 65504.0).to(tl.float16)
        own = (start // SIZE + tl.arange(0, TILE // SIZE) < BLOCK // SIZE) & (part < count)
        tl.store(
            means + (to + part)[:, None] * HEAD_DIM + dim[None, :], mean,
            mask=own[:, None] & (dim < HEAD_DIM)[None, :],
        )  # fmt: skip
        if GATED:
            norm = tl.maximum(tl.sqrt(tl.sum(tile * tile, 1)), 1e-12)
            unit = tl.where((token < unit_limit)[:, None], tile / norm[:, None], 0.0)
            unit_total += tl.sum(unit, 0)
    if GATED:
        held_tokens = tl.maximum(tl.minimum(unit_limit - block * BLOCK, BLOCK), 1)
        unit_total = unit_total / held_tokens
        tl.store(similarity + at_block, tl.sum(unit_total * unit_total, 0))


@triton.jit(do_not_specialize=[
    "scale", "seqlen_q", "seqlen_kv", "rows", "columns", "q_count", "k_count", "kv_heads",
])  # fmt: skip
def means_kernel(
    q, k, kv_len, q_means, k_means, q_similarity, k_similarity, q_stride_b, q_stride_s, q_stride_h,
    k_stride_b, k_stride_s, k_stride_h, scale, seqlen_q, seqlen_kv, rows, columns, q_count, k_count,
    kv_heads, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    PADDED_Q: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Means of the parts of one block, fp16: of q ``[B, H, q_count, D]``, times the scale, or k.

    Beside them the similarity of the block, if it is gated.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    h, b = head.to(tl.int64), tl.program_id(2).to(tl.int64)
    limit, valid = token_limits(kv_len, b, seqlen_q, seqlen_kv, PADDED_Q)
    if block < rows:
        at = b * tl.num_programs(1) + h
        _means_of_block(
            q + b * q_stride_b + h * q_stride_h, q_means, q_similarity, at * q_count,
            at * rows + block, limit, seqlen_q, block, q_count, scale, q_stride_s, BLOCK_M, TILE_M,
            SIZE, HEAD_DIM, PADDED_DIM, GATED,
        )  # fmt: skip
    elif head < kv_heads:
        block -= rows
        at = b * kv_heads + h
        _means_of_block(
            k + b * k_stride_b + h * k_stride_h, k_means, k_similarity, at * k_count,
            at * columns + block, valid, valid, block, k_count, 1.0, k_stride_s, BLOCK_N, TILE_N,
            SIZE, HEAD_DIM, PADDED_DIM, GATED,
        )  # fmt: skip


@triton.jit
def _scores(
    query, k_means, start, count, valid, PARTS: tl.constexpr, PADDED: tl.constexpr,
    SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scores of the parts of ``COLUMNS // PADDED`` key blocks in powers of two; -inf outside."""
    index, dim = tl.arange(0, COLUMNS), tl.arange(0, PADDED_DIM)
    part = (start + index // PADDED) * PARTS + index % PADDED
    exists = (index % PADDED < PARTS) & (part < count) & (part * SIZE < valid)
    key = tl.load(
        k_means + part[None, :] * HEAD_DIM + dim[:, None],
        mask=exists[None, :] & (dim < HEAD_DIM)[:, None], other=0.0,
    )  # fmt: skip
    score = tl.dot(query, key) * LOG2E
    return tl.where(exists[None, :], score, float("-inf"))


@triton.jit(do_not_specialize=[
    "seqlen_q", "seqlen_kv", "rows", "columns", "q_count", "k_count", "group", "first", "held",
])  # fmt: skip
def map_kernel(
    q_means, k_means, kv_len, masses, seqlen_q, seqlen_kv, rows, columns, q_count, k_count, group,
    first, held, Q_PARTS: tl.constexpr, Q_PADDED: tl.constexpr, K_PARTS: tl.constexpr,
    K_PADDED: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PADDED_Q: tl.constexpr,
):  # fmt: skip
    """Masses ``[B, H, held, Nb]`` of the block pairs of ``ROWS // Q_PADDED`` query blocks.

    A block has PARTS parts; in a tile it takes the next power of two of rows or columns, PADDED.
    """
    BLOCKS: tl.constexpr = ROWS // Q_PADDED
    STEP: tl.constexpr = COLUMNS // K_PADDED
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(1)
    head, kv_head = b * num_heads + h, b * (num_heads // group) + h // group
    limit, valid = token_limits(kv_len, b, seqlen_q, seqlen_kv, PADDED_Q)
    index, dim = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM)
    row = first + tl.program_id(0) * BLOCKS + index // Q_PADDED
    part = row * Q_PARTS + index % Q_PADDED
    live = (index % Q_PADDED < Q_PARTS) & (part < q_count) & (part * SIZE < limit)
    query = tl.load(
        q_means + (head * q_count + part)[:, None] * HEAD_DIM + dim[None, :],
        mask=live[:, None] & (dim < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    keys = k_means + kv_head * k_count * HEAD_DIM
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    last = (valid + SIZE * K_PARTS - 1) // (SIZE * K_PARTS)  # block with a key that exists
    for start in range(0, last, STEP):
        score = _scores(
            query, keys, start, k_count, valid, K_PARTS, K_PADDED, SIZE, HEAD_DIM, PADDED_DIM,
            COLUMNS,
        )  # fmt: skip
        now = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp2(top - now) + tl.sum(tl.exp2(score - now[:, None]), 1)
        top = now
    norm = top + tl.log2(total)
    block = tl.arange(0, BLOCKS)
    mine = tl.program_id(0) * BLOCKS + block  # of those that are held
    parts_held = tl.sum(tl.reshape(live.to(tl.float32), [BLOCKS, Q_PADDED]), 1)
    share = 1.0 / tl.maximum(parts_held, 1.0)
    for start in range(0, columns, STEP):
        score = _scores(
            query, keys, start, k_count, valid, K_PARTS, K_PADDED, SIZE, HEAD_DIM, PADDED_DIM,
            COLUMNS,
        )  # fmt: skip
        counts = live[:, None] & (score > float("-inf"))
        mass = tl.where(counts, tl.exp2(score - norm[:, None]), 0.0)
        mass = tl.sum(tl.reshape(mass, [ROWS, STEP, K_PADDED]), 2)
        mass = tl.sum(tl.reshape(mass, [BLOCKS, Q_PADDED, STEP]), 1) * share[:, None]
        column = start + tl.arange(0, STEP)
        at = (head * held + mine)[:, None] * columns + column[None, :]
        inside = (mine < held) & (first + mine < rows)
        tl.store(masses + at, mass, mask=inside[:, None] & (column < columns)[None, :])
