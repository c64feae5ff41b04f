"""Triton kernels of the map of :func:`fine_map`: means of few tokens, and masses of block pairs.

Of a map of 33K tokens in parts of 8 only sums are stored: of 16 key parts until the sum of a row is
known, then those over block pairs, 1 of 256 entries. So a program goes over the keys once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashomni.symbols.choice._kernels import token_limits

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _means_of_block(
    x, means, similarity, to, at_block, limit, unit_limit, block, count, scale, stride_s,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """PARTS parts at a time, so few that a warp has them: nothing is exchanged between warps."""
    dim = tl.arange(0, PADDED_DIM)
    unit_total = tl.zeros([PADDED_DIM], tl.float32)
    for start in range(0, BLOCK // SIZE, PARTS):
        place = start + tl.arange(0, PARTS)
        part = block * (BLOCK // SIZE) + place
        own = (place < BLOCK // SIZE)[:, None] & (dim < HEAD_DIM)[None, :]
        token = part[:, None, None] * SIZE + tl.arange(0, SIZE)[None, :, None]
        inside = own[:, None, :] & (token < tl.maximum(limit, unit_limit))
        at = token.to(tl.int64) * stride_s + dim[None, None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(tl.where(token < limit, value, 0.0), 1)
        held = tl.maximum(tl.minimum(limit - part * SIZE, SIZE), 1)
        mean = total / held[:, None].to(tl.float32) * scale
        mean = tl.minimum(tl.maximum(mean, -65504.0), 65504.0).to(tl.float16)
        tl.store(
            means + (to + part)[:, None] * HEAD_DIM + dim[None, :], mean,
            mask=own & (part < count)[:, None],
        )  # fmt: skip
        if GATED:
            norm = tl.maximum(tl.sqrt(tl.sum(value * value, 2)), 1e-12)
            unit = tl.where(token < unit_limit, value / norm[:, :, None], 0.0)
            unit_total += tl.sum(tl.sum(unit, 1), 0)
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
    kv_heads, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
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
            at * rows + block, limit, seqlen_q, block, q_count, scale, q_stride_s, BLOCK_M, PARTS,
            SIZE, HEAD_DIM, PADDED_DIM, GATED,
        )  # fmt: skip
    elif head < kv_heads:
        block -= rows
        at = b * kv_heads + h
        _means_of_block(
            k + b * k_stride_b + h * k_stride_h, k_means, k_similarity, at * k_count,
            at * columns + block, valid, valid, block, k_count, 1.0, k_stride_s, BLOCK_N, PARTS,
            SIZE, HEAD_DIM, PADDED_DIM, GATED,
        )  # fmt: skip


@triton.jit
def _keys(
    k_means, part, exists, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Means of key parts, transposed: [PADDED_DIM, COLUMNS]; 0 where there is none."""
    dim = tl.arange(0, PADDED_DIM)
    at = k_means + part[None, :] * HEAD_DIM + dim[:, None]
    if WHOLE and PADDED_DIM == HEAD_DIM:
        return tl.load(at)
    return tl.load(at, mask=exists[None, :] & (dim < HEAD_DIM)[:, None], other=0.0)


@triton.jit
def _scores(
    query, k_means, start, count, valid, PARTS: tl.constexpr, PADDED: tl.constexpr,
    SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Scores of the parts of the key blocks from ``start`` on; -inf where there is no part.

    WHOLE: all parts of the tile are there, and nobody has to look.
    """
    index = tl.arange(0, COLUMNS)
    part = (start + index // PADDED) * PARTS + index % PADDED
    exists = (index % PADDED < PARTS) & (part < count) & (part * SIZE < valid)
    score = tl.dot(query, _keys(k_means, part, exists, HEAD_DIM, PADDED_DIM, WHOLE))
    return score if WHOLE else tl.where(exists[None, :], score, float("-inf"))


@triton.jit
def _kept(score, top, total, sums, maxima, start, columns, PADDED: tl.constexpr):
    """The sums of a tile over key blocks go to memory, and the maxima that they refer to.

    Maximum and sum of exponentials of rows, with those of the tile.
    """
    ROWS: tl.constexpr = score.shape[0]
    STEP: tl.constexpr = score.shape[1] // PADDED
    now = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score * LOG2E - (now * LOG2E)[:, None])
    mass = tl.sum(tl.reshape(weight, [ROWS, STEP, PADDED]), 2)
    row, column = tl.arange(0, ROWS), start + tl.arange(0, STEP)
    at = row[:, None] * columns + column[None, :]
    tl.store(sums + at, mass, mask=(column < columns)[None, :])
    tl.store(maxima + start // STEP * ROWS + row, now)
    return now, total * tl.exp2((top - now) * LOG2E) + tl.sum(mass, 1)


@triton.jit(do_not_specialize=[
    "seqlen_q", "seqlen_kv", "rows", "columns", "q_count", "k_count", "group", "first", "held",
])  # fmt: skip
def map_kernel(
    q_means, k_means, kv_len, sums, maxima, masses, seqlen_q, seqlen_kv, rows, columns,
    q_count, k_count, group, first, held, Q_PARTS: tl.constexpr, Q_PADDED: tl.constexpr,
    K_PARTS: tl.constexpr, K_PADDED: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PADDED_Q: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Masses ``[B, H, held, Nb]`` of the block pairs of ``ROWS // Q_PADDED`` query blocks.

    A block has PARTS parts; in a tile it takes the next power of two of rows or columns, PADDED.
    Tiles whose parts are all there come first, without a mask; at the end those that are not.
    sums ``[B, H, programs, ROWS, Nb]`` and maxima ``[B, H, programs, tiles, ROWS]`` have the masses
    of rows until what rows sum to is known.
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
    last = (valid + SIZE * K_PARTS - 1) // (SIZE * K_PARTS)  # block with a key that exists
    whole = 0  # key blocks in whole tiles
    if K_PARTS == K_PADDED:
        whole = (valid + SIZE - 1) // SIZE // COLUMNS * STEP
    program = head * tl.num_programs(0) + tl.program_id(0)
    sums += program * ROWS * columns
    maxima += program * ROWS * tl.cdiv(columns, STEP)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, whole, STEP):
        score = _scores(
            query, keys, start, k_count, valid, K_PARTS, K_PADDED, SIZE, HEAD_DIM, PADDED_DIM,
            COLUMNS, True,
        )  # fmt: skip
        top, total = _kept(score, top, total, sums, maxima, start, columns, K_PADDED)
    for start in tl.range(whole, last, STEP, num_stages=1):
        score = _scores(
            query, keys, start, k_count, valid, K_PARTS, K_PADDED, SIZE, HEAD_DIM, PADDED_DIM,
            COLUMNS, False,
        )  # fmt: skip
        top, total = _kept(score, top, total, sums, maxima, start, columns, K_PADDED)
    tl.debug_barrier()  # what other threads of this program have stored
    counts = live & (total > 0)
    norm = tl.where(counts, top * LOG2E + tl.log2(tl.where(counts, total, 1.0)), float("inf"))
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)  # of those that are held
    mine = (block < held) & (first + block < rows)
    at = (head * held + block) * columns
    parts_held = tl.sum(tl.reshape(live.to(tl.float32), [BLOCKS, Q_PADDED]), 1)
    share = 1.0 / tl.maximum(parts_held, 1.0)
    for start in range(0, columns, WIDTH):
        column = start + tl.arange(0, WIDTH)
        there = (column < last)[None, :]
        own = index[:, None] * columns + column[None, :]
        mass = tl.load(sums + own, mask=there, other=0.0)
        own = index[:, None] + (column // STEP * ROWS)[None, :]
        maximum = tl.load(maxima + own, mask=there, other=0.0)
        mass *= tl.exp2(maximum * LOG2E - norm[:, None])
        mass = tl.sum(tl.reshape(mass, [BLOCKS, Q_PADDED, WIDTH]), 1) * share[:, None]
        tl.store(
            masses + at[:, None] + column[None, :], mass,
            mask=mine[:, None] & (column < columns)[None, :],
        )  # fmt: skip
