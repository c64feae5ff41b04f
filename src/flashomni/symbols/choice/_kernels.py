"""Triton kernels that choose symbols: block means, S_s by rows, S_c by heads.

A choice on a row of masses needs no sort. Floats that are not negative order like their bits, so
the bits of the threshold are found one after the other, from the top, each by one masked sum over
the row in registers. Ties at the threshold go by index, as a stable sort would have it: of equal
masses the first count as the lightest of :func:`heavy` and as the heaviest of :func:`most`. Sums
are in fp64, where the order of addition does not matter to a choice. There are no atomics: the same
input gives the same bits.

Rows of the map lie along the last dim of a tile, where lanes are: most of a sum is then within a
thread.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _running_count(flags):
    """How many are set up to each, along dim 0: int32.

    Turned, so that the scan runs along the last dim: along the first of a tile of one column, whose
    elements several warps hold, Triton 3.6 gives other numbers on a card.
    """
    return tl.trans(tl.cumsum(tl.trans(flags.to(tl.int32)), 1))


@triton.jit
def heavy(mass, tau):
    """All but ``low_mass(mass, tau)`` of each column of fp32 ``[N, rows]``; padding must be 0."""
    code = mass.to(tl.int32, bitcast=True)
    wide = mass.to(tl.float64)
    limit = tau.to(tl.float64) * tl.sum(wide, 0)
    # The largest code below which the entries together hold at most the limit.
    edge = tl.zeros_like(tl.sum(code, 0))
    for step in range(31):
        trial = edge | (1 << (30 - step))
        below = tl.sum(tl.where(code < trial[None, :], wide, 0.0), 0)
        edge = tl.where(below <= limit, trial, edge)
    below = tl.sum(tl.where(code < edge[None, :], wide, 0.0), 0)
    tied = code == edge[None, :]
    rank = _running_count(tied).to(tl.float64)
    light = (code < edge[None, :]) | (tied & (below[None, :] + rank * wide <= limit[None, :]))
    return light == 0


@triton.jit
def most(mass, exists, count):
    """``heaviest(mass, count)`` of each column of fp32 ``[N, rows]`` among what exists."""
    code = mass.to(tl.int32, bitcast=True)
    # The largest code that as many entries reach.
    edge = tl.zeros_like(tl.sum(code, 0))
    for step in range(31):
        trial = edge | (1 << (30 - step))
        reach = tl.sum((exists & (code >= trial[None, :])).to(tl.int32), 0)
        edge = tl.where(reach >= count, trial, edge)
    above = exists & (code > edge[None, :])
    tied = exists & (code == edge[None, :])
    room = count - tl.sum(above.to(tl.int32), 0)
    return above | (tied & (_running_count(tied) <= room[None, :]))


@triton.jit
def _share_now(tau, power, progress, GROWS: tl.constexpr):
    """``tau * progress ** power``, rounded as torch does where power is 2, the default."""
    tau = tl.full([], 1.0, tl.float32) * tau
    if GROWS:
        at = tl.load(progress).to(tl.float32)
        tau = tau * tl.where(power == 2.0, at * at, tl.exp2(power * tl.log2(at)))
    return tau


@triton.jit
def _bit(bits, index, inside):
    """Bits of a packed mask, as bool."""
    byte = tl.load(bits + index // 8, mask=inside, other=0).to(tl.int32)
    return ((byte >> (index % 8)) & 1) != 0


@triton.jit
def token_limits(kv_len, b, seqlen_q, seqlen_kv, PADDED_Q: tl.constexpr):
    """Queries and keys of batch item b that are not padding.

    PADDED_Q: padding of the keys is padding of the queries as well.
    """
    valid = seqlen_kv
    if kv_len is not None:
        valid = tl.minimum(tl.load(kv_len + b), seqlen_kv)
    limit = seqlen_q
    if PADDED_Q:
        limit = valid
    return limit, valid


@triton.jit
def _pool_block(
    x, means, similarity, at_block, limit, unit_limit, block, stride_s,
    BLOCK: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, PADDED_DIM)
    total = tl.zeros([PADDED_DIM], tl.float32)
    unit_total = tl.zeros([PADDED_DIM], tl.float32)
    for start in range(0, BLOCK, TILE):
        place = start + tl.arange(0, TILE)
        token = block * BLOCK + place
        mine = (place < BLOCK)[:, None] & (dim < HEAD_DIM)[None, :]
        inside = mine & (token < tl.maximum(limit, unit_limit))[:, None]
        at = token.to(tl.int64)[:, None] * stride_s + dim[None, :]
        tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(tl.where((token < limit)[:, None], tile, 0.0), 0)
        if GATED:
            norm = tl.maximum(tl.sqrt(tl.sum(tile * tile, 1)), 1e-12)
            unit = tl.where((token < unit_limit)[:, None], tile / norm[:, None], 0.0)
            unit_total += tl.sum(unit, 0)
    count = tl.maximum(tl.minimum(limit - block * BLOCK, BLOCK), 1)
    tl.store(means + at_block * HEAD_DIM + dim, total / count, mask=dim < HEAD_DIM)
    if GATED:
        count = tl.maximum(tl.minimum(unit_limit - block * BLOCK, BLOCK), 1)
        unit_total = unit_total / count
        tl.store(similarity + at_block, tl.sum(unit_total * unit_total, 0))


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_kv", "rows", "columns", "kv_heads"])
def pool_kernel(
    q, k, kv_len, q_means, k_means, q_similarity, k_similarity, q_stride_b, q_stride_s, q_stride_h,
    k_stride_b, k_stride_s, k_stride_h, seqlen_q, seqlen_kv, rows, columns, kv_heads,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_Q: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Means of one block of q, ``[B, H, Mb, D]``, or of k, ``[B, Hkv, Nb, D]``."""
    block, head = tl.program_id(0), tl.program_id(1)
    h, b = head.to(tl.int64), tl.program_id(2).to(tl.int64)
    limit, valid = token_limits(kv_len, b, seqlen_q, seqlen_kv, PADDED_Q)
    if block < rows:
        at = (b * tl.num_programs(1) + h) * rows + block
        _pool_block(
            q + b * q_stride_b + h * q_stride_h, q_means, q_similarity, at, limit, seqlen_q, block,
            q_stride_s, BLOCK_M, TILE_M, HEAD_DIM, PADDED_DIM, GATED,
        )  # fmt: skip
    elif head < kv_heads:
        block -= rows
        at = (b * kv_heads + h) * columns + block
        _pool_block(
            k + b * k_stride_b + h * k_stride_h, k_means, k_similarity, at, valid, valid, block,
            k_stride_s, BLOCK_N, TILE_N, HEAD_DIM, PADDED_DIM, GATED,
        )  # fmt: skip


@triton.jit
def _probabilities(
    q_means, k_means, row, rows, column, columns, exists, scale, HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """Softmax over what exists of the scores of some rows: fp32 ``[COLUMNS, ROWS]``.

    ``row [1, ROWS]``, ``column [COLUMNS, 1]``. DIMS of the head are taken at a time, by a product
    in IEEE fp32; where that is 1, the row being long, one after the other.
    """
    score = tl.zeros([COLUMNS, ROWS], tl.float32)
    for start in range(0, HEAD_DIM, DIMS):
        dim = start + tl.arange(0, DIMS)
        at = row * HEAD_DIM + dim[:, None]
        query = tl.load(
            q_means + at, mask=(row < rows) & (dim < HEAD_DIM)[:, None], other=0.0
        )  # fmt: skip
        at = column * HEAD_DIM + dim[None, :]
        key = tl.load(
            k_means + at, mask=(column < columns) & (dim < HEAD_DIM)[None, :], other=0.0
        )  # fmt: skip
        if CENTER:
            key -= (tl.sum(key, 0) / columns)[None, :]
        if DIMS == 1:
            score += key * (query * scale)
        else:
            score = tl.dot(key, query * scale, score, input_precision="ieee")
    score = tl.where(exists, score, float("-inf"))
    weight = tl.exp(score - tl.max(score, 0)[None, :])
    return weight / tl.sum(weight, 0)[None, :]


@triton.jit(do_not_specialize=[
    "scale", "tau", "power", "gate", "count", "rows", "columns", "num_words", "group", "texts",
    "part_first", "parts", "first", "held",
])  # fmt: skip
def visit_kernel(
    q_means, k_means, q_similarity, k_similarity, kv_len, text_q, text_kv, progress, words, given,
    guide, masses, scale, tau, power, gate, count, rows, columns, num_words, group, texts,
    part_first, parts, first, held, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    VISIT: tl.constexpr, GIVEN: tl.constexpr, GROWS: tl.constexpr, TEXT_ROWS: tl.constexpr,
    TEXT_COLUMNS: tl.constexpr, CENTER: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """S_s words of ROWS query blocks of one head; sums for S_c that need whole rows.

    masses ``[B, H, held, Nb]``: of ``held`` query blocks, program ``first``'s first; ``None`` makes
    them of block means.

    given ``[B, H, parts, Nb]``: sums over the rows of a program, of text rows (GIVEN = "text") or
    of all ("all"). guide ``[B, H, texts, Mb]``: text columns of the map, one after the other.
    """
    part = tl.program_id(0) + first
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(1)
    head = b * num_heads + h
    kv_head = b * (num_heads // group) + h // group
    row = part * ROWS + tl.arange(0, ROWS)[None, :]
    column = tl.arange(0, COLUMNS)[:, None]
    real_row, real = row < rows, column < columns
    is_text, is_text_row = column < 0, row < 0
    if text_q is not None:
        is_text, is_text_row = _bit(text_kv, column, real), _bit(text_q, row, real_row)
    exists = real
    if kv_len is not None:
        exists = real & (column * BLOCK_N < tl.load(kv_len + b))
    if masses is None:
        mass = _probabilities(
            q_means + head * rows * HEAD_DIM, k_means + kv_head * HEAD_DIM * columns, row, rows,
            column, columns, exists, scale, HEAD_DIM, DIMS, ROWS, COLUMNS, CENTER,
        )  # fmt: skip
    else:
        at = (head * held + row - first * ROWS) * columns + column
        mass = tl.load(masses + at, mask=real_row & real, other=0.0)
    if VISIT == "count":  # text counts, above every other block
        mass = tl.where(is_text, 2.0, mass)

    if GIVEN is not None:
        takes = real_row
        if GIVEN == "text":
            takes = is_text_row
            to = (head * texts + _running_count(is_text) - 1) * rows + row
            tl.store(guide + to, mass, mask=is_text & real_row & (is_text_row == 0))
        sums = tl.sum(tl.where(takes, mass, 0.0), 1)[:, None]
        place = part - part_first
        mine = real & (place >= 0) & (place < parts)
        tl.store(given + (head * parts + place) * columns + column, sums, mask=mine)

    if VISIT == "mass":
        if k_similarity is not None:  # what is visited anyway takes no part in the test
            like = tl.load(k_similarity + kv_head * columns + column, mask=real, other=1.0)
            mass = tl.where(like < gate, 0.0, mass)
        chosen = heavy(mass, _share_now(tau, power, progress, GROWS))
    elif VISIT == "count":
        chosen = most(mass, real & (row >= 0), count)
    else:
        chosen = real & (row >= 0)
    if DIAGONAL:
        begins, ends = row * BLOCK_M, (row + 1) * BLOCK_M
        chosen = chosen | ((begins < (column + 1) * BLOCK_N) & (column * BLOCK_N < ends))
    if TEXT_ROWS:
        chosen = chosen | is_text_row
    if TEXT_COLUMNS:
        chosen = chosen | is_text
    if q_similarity is not None:
        like = tl.load(q_similarity + head * rows + row, mask=real_row, other=1.0)
        chosen = chosen | (like < gate)
        like = tl.load(k_similarity + kv_head * columns + column, mask=real, other=1.0)
        chosen = chosen | (like < gate)
    taken = (chosen & real).to(tl.int32)
    empty = (tl.sum(taken, 0) == 0)[None, :]
    taken = tl.where(empty & (column == 0), 1, taken)
    bit = tl.arange(0, 32)[None, :, None]
    packed = tl.sum(tl.reshape(taken, [COLUMNS // 32, 32, ROWS]) << bit, 1)
    word = tl.arange(0, COLUMNS // 32)[:, None]
    at = (head * rows + row) * num_words + word
    tl.store(words + at, packed, mask=real_row & (word < num_words))


@triton.jit
def _received(
    given, head, index, row, vision, columns, parts, vision_rows, vision_columns, ratio,
    ROWS: tl.constexpr, PARTS: tl.constexpr, MAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Column sums of the map by query block ``[ROWS, 1]``; MAP says which columns are a row's."""
    first, end = row, row + 1
    if MAP == "area":  # as adaptive average pooling of the vision blocks has it
        rank = _running_count(vision) - 1
        first = rank * vision_columns // vision_rows
        end = ((rank + 1) * vision_columns + vision_rows - 1) // vision_rows
    if MAP == "nearest":
        first = tl.minimum((row.to(tl.float32) * ratio).to(tl.int32), columns - 1)
        end = first + 1
    total = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS))[None, :]
        for step in range(WINDOW):
            at = first + step
            mine = vision & (at < end)
            if MAP == "area":
                at = tl.load(index + at, mask=mine, other=0)
            value = tl.load(
                given + (head * parts + part) * columns + at,
                mask=mine & (part < parts) & (at < columns), other=0.0,
            )  # fmt: skip
            total += tl.sum(value, 1)[:, None]
    return total / tl.maximum(end - first, 1).to(tl.float32)


@triton.jit(do_not_specialize=[
    "tau", "power", "gate", "count", "ratio", "rows", "columns", "num_bytes", "texts", "parts",
    "vision_rows", "vision_columns",
])  # fmt: skip
def cache_kernel(
    given, guide, q_similarity, text_q, index, progress, bits, tau, power, gate, count, ratio, rows,
    columns, num_bytes, texts, parts, vision_rows, vision_columns, ROWS: tl.constexpr,
    PARTS: tl.constexpr, COMPUTE: tl.constexpr, MAP: tl.constexpr, WINDOW: tl.constexpr,
    GROWS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """S_c bytes of one head, from what `visit_kernel` left."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(0)
    row = tl.arange(0, ROWS)[:, None]
    real = row < rows
    is_text = row < 0
    if text_q is not None:
        is_text = _bit(text_q, row, real)
    vision = real & (is_text == 0)
    c = tl.zeros([ROWS, 1], tl.float32)
    g = tl.zeros([ROWS, 1], tl.float32)
    start, stop = h, h + 1
    if SHARED:
        start, stop = 0, num_heads
    for other in range(start, stop):
        head = b * num_heads + other
        if COMPUTE != "g":
            c += _received(
                given, head, index, row, vision, columns, parts, vision_rows, vision_columns, ratio,
                ROWS, PARTS, MAP, WINDOW,
            )  # fmt: skip
        if (COMPUTE != "c") & (COMPUTE != "count"):
            for text in range(texts):
                at = guide + (head * texts + text) * rows + row
                value = tl.load(at, mask=vision, other=float("-inf"))
                weight = tl.exp(value - tl.max(value, 0)[None, :])
                g += weight / tl.sum(weight, 0)[None, :]
    if COMPUTE == "count":
        chosen = most(tl.where(is_text, float("inf"), c), real, count)
    else:
        mass = c
        if COMPUTE == "g":
            mass = g
        if COMPUTE == "mean":
            mass = c / tl.sum(c, 0)[None, :] + g / tl.sum(g, 0)[None, :]
        if COMPUTE == "and":  # both tests at once
            mass = tl.where(tl.arange(0, 2)[None, :] == 0, c, g)
        is_heavy = heavy(mass, _share_now(tau, power, progress, GROWS))
        chosen = (tl.sum(is_heavy.to(tl.int32), 1) != 0)[:, None]
    chosen = chosen | is_text
    head = b * num_heads + h
    if q_similarity is not None:
        like = tl.load(q_similarity + head * rows + row, mask=real, other=1.0)
        chosen = chosen | (like < gate)
    taken = tl.reshape((chosen & real).to(tl.int32), [ROWS // 8, 8])
    byte = tl.arange(0, ROWS // 8)
    packed = tl.sum(taken << tl.arange(0, 8)[None, :], 1).to(tl.uint8)
    tl.store(bits + head * num_bytes + byte, packed, mask=byte < num_bytes)
