"""What the producer reads of symbols: a row of S_s, a word a lane, and what follows from it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.extra import libdevice

LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)


@gluon.jit
def valid_keys(kv_len_ptr, batch, seqlen_kv, HAS_KV_LEN: gl.constexpr):
    if HAS_KV_LEN:
        return gl.maximum(gl.minimum(gl.load(kv_len_ptr + batch), seqlen_kv), 0)
    else:
        return seqlen_kv


@gluon.jit
def read_row(tile, symbols, num_heads, tiles_m, MAX_WORDS: gl.constexpr):
    """The row of S_s of a tile, a word a lane.

    ``symbols`` are the words, their strides by batch, head and row, and the words of a row.
    """
    kv_bits, stride_b, stride_h, stride_m, row_words = symbols
    # Offsets of 32 bits are enough: the backend's refusals see to it.
    head = tile // tiles_m % num_heads
    batch = tile // tiles_m // num_heads
    row = kv_bits + (batch * stride_b + head * stride_h + tile % tiles_m * stride_m)
    word = gl.arange(0, MAX_WORDS, layout=gl.BlockedLayout([MAX_WORDS // 32], [32], [1], [0]))
    return gl.load(row + word, mask=word < row_words, other=0)


@gluon.jit
def read_symbols(tile, symbols, num_heads, tiles_m, MAX_WORDS: gl.constexpr):
    """The S_c byte of a tile and its row of S_s, a word a lane."""
    q_bits, kv_bits, q_stride_b, q_stride_h, kv_stride_b, kv_stride_h, kv_stride_m, row_words = (
        symbols
    )
    m = tile % tiles_m
    head = tile // tiles_m % num_heads
    batch = tile // tiles_m // num_heads
    q_byte = gl.load(q_bits + (batch * q_stride_b + head * q_stride_h + m // 8))
    kv_symbols = (kv_bits, kv_stride_b, kv_stride_h, kv_stride_m, row_words)
    words = read_row(tile, kv_symbols, num_heads, tiles_m, MAX_WORDS)
    return q_byte.to(gl.int32), words


@gluon.jit
def keep_valid(words, num_blocks):
    """Clear the bits of blocks from ``num_blocks`` on."""
    word = gl.arange(0, words.shape[0], layout=words.type.layout)
    left = num_blocks - word * 32
    some = words & ((1 << gl.minimum(gl.maximum(left, 0), 31)) - 1)
    return gl.where(left >= 32, words, some)


@gluon.jit
def count_blocks(words, num_blocks):
    """How many blocks a row visits, and whether the last one is among them."""
    word = gl.arange(0, words.shape[0], layout=words.type.layout)
    last = gl.maximum(num_blocks - 1, 0)
    is_last = gl.where(word == last // 32, (words >> (last % 32)) & 1, 0)
    # One sum for both: no row has 2 ** 20 blocks.
    total = gl.sum(libdevice.popc(words) + (is_last << 20), axis=0)
    return total & 0xFFFFF, total >> 20


@gluon.jit
def pick(words, i):
    word = gl.arange(0, words.shape[0], layout=words.type.layout)
    return gl.sum(gl.where(word == i, words, 0), axis=0)


@gluon.jit
def is_summarised(left_out, t, SUMMARIES: gl.constexpr, TILE_N: gl.constexpr):
    """Whether summary tile t is visited, if any is: where it is of one word of blocks at most,
    nobody needs it if all of them are live."""
    BLOCKS: gl.constexpr = TILE_N // SUMMARIES  # whose summaries a tile holds
    if BLOCKS > 32:
        return t >= 0
    else:
        word = pick(left_out, t * BLOCKS // 32)
        if BLOCKS < 32:
            word = (word >> (t * BLOCKS % 32)) & ((1 << BLOCKS) - 1)
        return word != 0


@gluon.jit
def count_summary_tiles(left_out, num_blocks, SUMMARIES: gl.constexpr, TILE_N: gl.constexpr):
    """How many tiles of summaries ``is_summarised`` has; none where nothing is left out."""
    BLOCKS: gl.constexpr = TILE_N // SUMMARIES
    some = (left_out != 0).to(gl.int32)
    if BLOCKS > 32:
        return gl.where(gl.max(some, axis=0) != 0, (num_blocks + BLOCKS - 1) // BLOCKS, 0)
    else:
        if BLOCKS < 32:
            some = gl.full_like(left_out, 0)
            for i in gl.static_range(32 // BLOCKS):
                some += (((left_out >> (i * BLOCKS)) & ((1 << BLOCKS) - 1)) != 0).to(gl.int32)
        return gl.sum(some, axis=0)


@gluon.jit
def summary_weights(left_out, t, log_n, SUMMARIES: gl.constexpr, TILE_N: gl.constexpr):
    """What is added to the scores of summary tile t: log2 of n, -inf where it takes no part.

    ``left_out`` are the words of the blocks that are skipped, a word a lane.
    """
    layout: gl.constexpr = gl.BlockedLayout([TILE_N // 32], [32], [1], [0])
    BLOCKS: gl.constexpr = TILE_N // SUMMARIES  # whose summaries a tile holds
    block = t * BLOCKS + gl.arange(0, TILE_N, layout=layout) // SUMMARIES
    first_word = t * BLOCKS // 32
    word = gl.full([TILE_N], 0, gl.int32, layout=layout)
    for i in gl.static_range((BLOCKS + 31) // 32):
        word = gl.where(block // 32 == first_word + i, pick(left_out, first_word + i), word)
    takes_part = ((word >> (block % 32)) & 1) != 0
    column = t * TILE_N + gl.arange(0, TILE_N, layout=layout)
    return gl.load(log_n + column, mask=takes_part, other=-float("inf")) * LOG2_E
