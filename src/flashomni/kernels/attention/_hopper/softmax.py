"""Weights of one visit: scores in, weights and partial sums of rows out, in powers of two.

*Online*: the maximum of a row so far is its reference, and what was added before is rescaled where
it grows. *Anchored*: the maximum of a row in the tile's FIRST visit is its reference for all of
them. bf16 has the exponents of fp32, so weights may exceed 1 without losing precision, and the
reference cancels when the output is divided by the sum. No maximum, no rescaling, and nothing to
wait for between a score and its weight; but rows whose scores rise too far above the first visit
overflow. ``is_bad`` finds them, and their tiles are done again online. (FlashDecoding++,
arXiv 2311.01282, has a maximum for all rows and recomputes likewise.) Weights are never smaller
than online, so nothing is lost at the lower end.

The online softmax gives the largest weight as 1, which bf16 has exactly. An anchored weight that
rises far above the others is rounded, and the output with it, unless it is summed as rounded:
then the error cancels in the division. ``as_rounded`` does that where it matters.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# An anchored row is done again unless its sum is below this: the reciprocal of the sum is a normal
# number still. Where values are large, products overflow before; that shows in the output.
SUM_LIMIT: gl.constexpr = gl.constexpr(2.0**96)
LOWEST: gl.constexpr = gl.constexpr(-1e30)  # a reference below all scores


@gluon.jit
def _row_max(s):
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
def first(s, scale_log2, MAY_BE_EMPTY: gl.constexpr):
    """Weights of a tile's first visit, the references of its rows, partial sums.

    Where no row has a key yet, online weights get another reference later; anchored ones overflow.
    """
    m = _row_max(s) * scale_log2
    if MAY_BE_EMPTY:
        m = gl.maximum(m, LOWEST)
    weights = anchored(s, scale_log2, m)
    return weights, m, row_sums(weights)


@gluon.jit
def biased(s, scale_log2, bias):
    """Scores of summaries, scaled: what a summary weighs is added, -inf leaves it out."""
    return s * scale_log2 + bias[None, :]


@gluon.jit
def anchored(s, scale_log2, m):
    return gl.exp2(s * scale_log2 - m[:, None])


@gluon.jit
def online(s, scale_log2, m, row_sum):
    """Weights, maxima and partial sums after one more visit; and what rescales earlier ones."""
    m_new = gl.maximum(m, _row_max(s) * scale_log2)
    alpha = gl.exp2(m - m_new)
    p = gl.exp2(s * scale_log2 - m_new[:, None])
    alpha_sum = gl.convert_layout(
        alpha, gl.SliceLayout(1, row_sum.type.layout), assert_trivial=True
    )
    return p, m_new, row_sum * alpha_sum[:, None] + row_sums(p), alpha


# ---------------------------------------------------------------- weights as operands


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
def unpack(words, dtype: gl.constexpr):
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [words], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [words], dtype=gl.float16, is_pure=True, pack=2
        )


# ---------------------------------------------------------------- sums of rounded weights


def _as_rounded(columns: int) -> str:
    """PTX of ``as_rounded`` for a thread's two rows of ``columns`` / 4 weights each.

    Its tensors have one element for each weight, in the order of an accumulator: two of the first
    row, two of the second, and so on. Of what it gives only elements 0 and 2 are of meaning.
    """
    n = columns // 2
    words, sums, so_far = n, 2 * n, 3 * n
    lines = [
        "{ .reg .pred a, b; .reg .f32 x, y;",
        f"mov.f32 $0, ${sums}; mov.f32 $2, ${sums + 2};",
        *(f"mov.b32 ${i}, 0;" for i in range(n) if i not in (0, 2)),
        f"sub.f32 x, ${sums}, ${so_far}; sub.f32 y, ${sums + 2}, ${so_far + 2};",
        "max.f32 x, x, y; setp.gt.f32 a, x, 0f00000000;",
        "vote.sync.any.pred b, a, 0xffffffff; @!b bra DONE;",
    ]
    for row in (0, 2):
        lines.append(f"mov.f32 ${row}, 0f00000000;")
        for i in range(words + row, words + n, 4):
            lines.append(f"shl.b32 x, ${i}, 16; and.b32 y, ${i}, 0xffff0000;")
            lines.append(f"add.f32 x, x, y; add.f32 ${row}, ${row}, x;")
    return " ".join(lines) + " DONE: }"


def _as_rounded_types(columns: int) -> str:
    n = columns // 2
    return ",".join(["=&f"] * n + ["r"] * n + ["f"] * 2 * n)


ROUND_64 = gl.constexpr(_as_rounded(64))
ROUND_128 = gl.constexpr(_as_rounded(128))
ROUND_64_TYPES = gl.constexpr(_as_rounded_types(64))
ROUND_128_TYPES = gl.constexpr(_as_rounded_types(128))


@gluon.jit
def as_rounded(sums, words, row_sum, layout: gl.constexpr):
    """What a visit adds to the sums of its rows: ``sums``, or those of its weights as rounded.

    A warp takes the trouble if a visit adds more to a thread's part of a row than all before it.
    A single weight that is summed unrounded is then less than half of its row: it moves the output
    by less than half a unit in the last place of bf16. Meant for when the tensor cores have been
    given the weights: what is rare may wait for them, and the test costs nothing.
    """
    words = gl.convert_layout(words, layout, assert_trivial=True)
    arguments = [words, _every_column(sums, words), _every_column(row_sum, words)]
    if words.shape[1] == 128:
        out = gl.inline_asm_elementwise(
            ROUND_128, ROUND_128_TYPES, arguments, dtype=gl.float32, is_pure=False, pack=64
        )
    else:
        out = gl.inline_asm_elementwise(
            ROUND_64, ROUND_64_TYPES, arguments, dtype=gl.float32, is_pure=False, pack=32
        )
    return gl.convert_layout(_one_column(out), row_sum.type.layout, assert_trivial=True)


@gluon.jit
def _every_column(x, words):
    """``[rows, 4]`` of partial sums, repeated for each column that they are of."""
    parts = gl.reshape(words, [words.shape[0], words.shape[1] // 8, 4, 2])
    every, parts = gl.broadcast(gl.expand_dims(gl.expand_dims(x, 2), 1), parts)
    every = gl.reshape(every, [words.shape[0], words.shape[1]])
    return gl.convert_layout(every, words.type.layout, assert_trivial=True)


@gluon.jit
def _one_column(x):
    """What ``_every_column`` would repeat, from the first of its columns."""
    x, _ = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 8, 4, 2]))
    for _ in gl.static_range(4 if x.shape[1] == 16 else 3):
        x = gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2, 4]), (0, 2, 3, 1))
        x, _ = gl.split(x)
    return gl.reshape(x, [x.shape[0], 4])


# ---------------------------------------------------------------- what has to be done again


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
