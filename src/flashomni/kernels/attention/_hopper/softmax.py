"""Weights of one visit: scores in, weights and partial sums of rows out, in powers of two.

*Online*: the maximum of a row so far is its reference, and what was added before is rescaled where
it grows. *Anchored*: the maximum of a row in the tile's FIRST visit is its reference for all of
them. bf16 has the exponents of fp32, so weights may exceed 1 without losing precision, and the
reference cancels when the output is divided by the sum. No maximum, no rescaling, and nothing to
wait for between a score and its weight; but rows whose scores rise too far above the first visit
overflow. ``is_bad`` finds them, and their tiles are done again online. (FlashDecoding++,
arXiv 2311.01282, has a maximum for all rows and recomputes likewise.)

Anchored weights are summed as rounded: where one key has nearly all the weight, the rounding of it
cancels in the division as it does online, where the largest weight is exactly 1.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# An anchored row is done again unless its sum is below this: the reciprocal of the sum is a normal
# number still. Where values are large, products overflow before; that shows in the output.
SUM_LIMIT: gl.constexpr = gl.constexpr(2.0**96)


@gluon.jit
def row_max(s):
    layout: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    # ``[rows, n]`` as ``[rows, n / 8, 8]``: the middle dimension lies within a thread.
    eights = gl.reshape(s, [s.shape[0], s.shape[1] // 8, 8])
    return gl.convert_layout(gl.max(gl.max(eights, axis=1), axis=1), layout, assert_trivial=True)


@gluon.jit
def row_sums(p):
    """Sums over the columns that a thread holds of a row: ``[rows, 4]``."""
    parts = gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(parts, axis=1), axis=2)


@gluon.jit
def pack(weights, dtype: gl.constexpr, layout: gl.constexpr):
    """Weights as words of two, in the layout of an operand.

    16-bit values that cross the back edge of a loop are carried one by one and packed anew in each
    visit; words are not. Of each two words only the first is ever read, ptxas drops the other.
    """
    x = gl.convert_layout(weights, layout, assert_trivial=True)
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $3, $2; mov.b32 $1, 0;", "=r,=r,f,f", [x], dtype=gl.int32,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $3, $2; mov.b32 $1, 0;", "=r,=r,f,f", [x], dtype=gl.int32,
            is_pure=True, pack=2,
        )  # fmt: skip


@gluon.jit
def packed_row_sums(words, layout: gl.constexpr):
    """Partial sums of rows of bf16 weights, as rounded."""
    rounded = gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r,r", [words], dtype=gl.float32,
        is_pure=True, pack=2,
    )  # fmt: skip
    return row_sums(gl.convert_layout(rounded, layout, assert_trivial=True))


@gluon.jit
def unpack(words, dtype: gl.constexpr):
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [words], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [words], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def first(s, scale_log2):
    """Weights of a tile's first visit, and the references of its rows."""
    m = row_max(s) * scale_log2
    return anchored(s, scale_log2, m), m


@gluon.jit
def anchored(s, scale_log2, m):
    return gl.exp2(s * scale_log2 - m[:, None])


@gluon.jit
def online(s, scale_log2, m, row_sum):
    """Weights, maxima and partial sums after one more visit; and what rescales earlier ones."""
    m_new = gl.maximum(m, row_max(s) * scale_log2)
    alpha = gl.exp2(m - m_new)
    p = gl.exp2(s * scale_log2 - m_new[:, None])
    alpha_sum = gl.convert_layout(
        alpha, gl.SliceLayout(1, row_sum.type.layout), assert_trivial=True
    )
    return p, m_new, row_sum * alpha_sum[:, None] + row_sums(p), alpha


@gluon.jit
def is_bad(total, out):
    """Whether a row of a tile left the range that anchored weights may have: 0 or 1.

    Args:
        total: sums of the rows.
        out: the rows, divided by their sums.
    """
    # A sum of finite numbers may overflow: then the tile is done again for nothing.
    left = gl.convert_layout(gl.sum(out, axis=1), total.type.layout) * 0.0
    good = (total < SUM_LIMIT) & (left == 0.0)
    return gl.max(gl.where(good, 0, 1), axis=0)
