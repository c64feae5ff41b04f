"""GEMM-O on Hopper: a persistent kernel whose K loop runs over the computed heads of a tile row.

An output tile is 128 tokens and 128 features. Its steps along K are those of the computed heads,
found in a 64 bit word, and of the always-on columns. Tile rows with many heads come first and every
other round is dealt out backwards, which evens out the work of the CTAs. Long calls go over the
features in groups of about twelve tiles, all rows of one group before the next: a round of the CTAs
is then about as many rows as features, and what it reads again of the weight stays in L2.

The bias terms of a tile are copied into its output buffer while its main loop runs, and its result
overwrites them in place: they cost no slot of the ring and no wait. They are asked for a third and
two thirds through the loop: the CTAs go in step, and all terms of a round at once, on top of the
results of the round before, would hold up the operands. They are added to the fp32 accumulators
after the products, not before; only the rounding order differs.

An Update pass lists the cached heads first. Their sum is the first bias term; it is stored, and the
other heads are added on top of it for the dense result: one sweep gives both. The terms of the
differences are sums over the cached heads alone.

Letters in shapes: B batch, R rows, H num_heads, D head_dim, N out_features, T terms.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.extra import libdevice
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from flashomni.dispatch import register
from flashomni.kernels.common import hopper_gemm as hopper
from flashomni.kernels.common.hopper import (
    hopper_refusals,
    num_multiprocessors,
    on_device,
    thread_barrier,
    tma_load,
    view_as,
)
from flashomni.kernels.common.hopper_gemm import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    accumulate,
    await_turn,
    column_index,
    finish,
    halves,
    load_step,
    make_barriers,
    new_accumulator,
    pass_turn,
    place_rows,
    store_half,
)
from flashomni.kernels.common.live_tiles import MAX_HEADS, TILE_M, TileRows, head_words
from flashomni.kernels.gemm_o.op import GemmOCall, GemmOUpdateCall

HEAD_DIMS = (64, 128, 192, 256)
TILE_N = 128
GROUP = 12  # feature tiles of a group, about: the root of the number of CTAs
GROUPED_ROUNDS = 12  # rounds of the CTAs from which on features are grouped
SPREAD_STEPS = gl.constexpr(12)  # steps along K from which on the terms are asked for one by one


@gluon.jit
def _tile_of(turn):
    """Number of this CTA's tile: rounds go forwards and backwards in turn."""
    ctas = gl.num_programs(0)
    cta = gl.program_id(0)
    return turn * ctas + gl.where((turn & 1) == 1, ctas - 1 - cta, cta)


@gluon.jit
def _spot(tile, tiling):
    """Place of a tile's row in the lists, and which of its feature tiles it is."""
    num_tile_rows, num_n, group_n = tiling
    in_group = num_tile_rows * group_n
    group = gl.minimum(tile // in_group, (num_n - 1) // group_n)
    start = group * group_n
    width = gl.minimum(group_n, num_n - start)  # the last group may be narrower
    within = tile - group * in_group
    return within // width, start + within % width


@gluon.jit
def _rank(turn, tiling):
    """Place of the tile row in the lists; that of the last one where there is no tile any more."""
    rank, _ = _spot(_tile_of(turn), tiling)
    return gl.minimum(rank, tiling[0] - 1)


@gluon.jit
def _listed(words_ptr, turn, tiling, D: gl.constexpr):
    """Steps along K of the listed heads of a tile."""
    word = gl.load(words_ptr + _rank(turn, tiling))
    return libdevice.popc(word) * (D // 64)


@gluon.jit
def _steps(listed, num_heads, always_steps, D: gl.constexpr, UPDATE: gl.constexpr):
    """All steps of a tile; an Update goes over the heads that are not listed as well."""
    if UPDATE:
        return num_heads * (D // 64) + always_steps
    else:
        return listed + always_steps


@gluon.jit
def _load_heads(
    heads, o_desc, w_desc, a_ring, b_ring, full, empty, item, row, column, slot, phase,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    while heads != 0:
        head = libdevice.ffs(heads) - 1
        heads = heads & (heads - 1)
        for part in gl.static_range(D // 64):
            slot, phase = load_step(
                o_desc, w_desc, a_ring, b_ring, full, empty, item, head, row, part * 64, column,
                head * D + part * 64, slot, phase, STAGES,
            )  # fmt: skip
    return slot, phase


@gluon.jit
def _producer(
    o_desc, always_desc, w_desc, a_ring, b_ring, full, empty, rows_ptr, words_ptr, tiling,
    tiles_per_item, first_row, rows, num_heads, always_steps, D: gl.constexpr,
    UPDATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    tile = _tile_of(turn)
    rank = _rank(turn, tiling)
    next_row = gl.load(rows_ptr + rank)
    next_heads = gl.load(words_ptr + rank)
    next_others = gl.load(words_ptr + tiling[0] + rank)
    while tile < tiling[0] * tiling[1]:
        item, row, _ = place_rows(next_row, tiles_per_item, first_row, rows)
        _, feature_tile = _spot(tile, tiling)
        column = feature_tile * 128
        heads = next_heads
        others = next_others
        turn += 1
        tile = _tile_of(turn)
        # What the next tile needs is fetched while this tile's loads are issued.
        rank = _rank(turn, tiling)
        next_row = gl.load(rows_ptr + rank)
        next_heads = gl.load(words_ptr + rank)
        next_others = gl.load(words_ptr + tiling[0] + rank)
        slot, phase = _load_heads(
            heads, o_desc, w_desc, a_ring, b_ring, full, empty, item, row, column, slot, phase, D,
            STAGES,
        )  # fmt: skip
        if UPDATE:
            slot, phase = _load_heads(
                others, o_desc, w_desc, a_ring, b_ring, full, empty, item, row, column, slot, phase,
                D, STAGES,
            )  # fmt: skip
        if always_desc is not None:
            for k in range(always_steps):
                slot, phase = load_step(
                    always_desc, w_desc, a_ring, b_ring, full, empty, item, 0, row, k * 64, column,
                    num_heads * D + k * 64, slot, phase, STAGES,
                )  # fmt: skip


@gluon.jit
def _term_view(terms_desc, buffer):
    return view_as(buffer, terms_desc)


@gluon.jit
def _fetch_term(terms_desc, buffer, bar, term, item, row, column):
    mbarrier.expect(bar, terms_desc.block_type.nbytes)
    tma_load(terms_desc, [term, item, row, column], bar, _term_view(terms_desc, buffer))


@gluon.jit
def _add_term(x, coefficient, terms_desc, buffer, bar, phase):
    mbarrier.wait(bar, phase)
    term = _term_view(terms_desc, buffer).reshape([x.shape[0], x.shape[1]]).load(x.type.layout)
    return x + coefficient * term.to(gl.float32)


@gluon.jit
def _add_terms(x, coefficients_ptr, terms_desc, buffer, bar, num_terms, uses, item, row, column):
    """Add the bias terms. The first is on its way; another one follows when its place is read."""
    for term in range(num_terms):
        coefficient = gl.load(coefficients_ptr + term)
        x = _add_term(x, coefficient, terms_desc, buffer, bar, (uses + term) & 1)
        if term + 1 < num_terms:
            thread_barrier()
            _fetch_term(terms_desc, buffer, bar, term + 1, item, row, column)
    return x


@gluon.jit
def _finish_half(
    x, out_desc, cut_desc, is_cut, terms_desc, buffer, bar, bias_ptr, coefficients_ptr, num_terms,
    turn, item, row,
    column, out_features,
):  # fmt: skip
    if bias_ptr is not None:
        feature = column + column_index(x)
        bias = gl.load(bias_ptr + feature, mask=feature < out_features, other=0.0)
        x = x + bias.to(gl.float32)[None, :]
    if coefficients_ptr is not None:
        x = _add_terms(
            x, coefficients_ptr, terms_desc, buffer, bar, num_terms, turn * num_terms, item, row,
            column,
        )  # fmt: skip
    store_half(x, out_desc, cut_desc, is_cut, buffer, 0, item, row, column)


@gluon.jit
def _consumer(
    out_desc, cut_desc, terms_desc, cut_terms_desc, a_ring, b_ring, buffers, full, empty, order,
    ready, bias_ptr,
    coefficients_ptr, rows_ptr, words_ptr, tiling, tiles_per_item, first_row, rows, num_heads,
    num_terms, always_steps, out_features, D: gl.constexpr, UPDATE: gl.constexpr,
    STAGES: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    num_tiles = tiling[0] * tiling[1]
    turn = gl.to_tensor(WG)
    step = gl.to_tensor(0)
    if WG == 1:
        step += _steps(_listed(words_ptr, 0, tiling, D), num_heads, always_steps, D, UPDATE)
    listed = _listed(words_ptr, turn, tiling, D)
    tile_row = gl.load(rows_ptr + _rank(turn, tiling))
    tile = _tile_of(turn)
    while tile < num_tiles:
        # Fetched now, needed after the epilogue: what the other warpgroup does, and our next tile.
        others = _listed(words_ptr, turn + 1, tiling, D)
        next_listed = _listed(words_ptr, turn + 2, tiling, D)
        next_row = gl.load(rows_ptr + _rank(turn + 2, tiling))
        steps = _steps(listed, num_heads, always_steps, D, UPDATE)
        item, row, is_cut = place_rows(tile_row, tiles_per_item, first_row, rows)
        _, feature_tile = _spot(tile, tiling)
        column = feature_tile * 128
        if coefficients_ptr is not None:
            tma.store_wait(0)  # the buffers were read out
            if steps < SPREAD_STEPS:
                _fetch_term(terms_desc, buffers.index(0), ready.index(0), 0, item, row, column)
                _fetch_term(terms_desc, buffers.index(1), ready.index(1), 0, item, row + 64, column)
        await_turn(order, turn >> 1, WG)
        acc = new_accumulator(128)
        done = 0
        if UPDATE:
            acc = accumulate(acc, a_ring, b_ring, full, empty, step, listed, STAGES)
            acc = finish(acc, empty, step, listed, STAGES)
            done = listed
            x0, x1 = halves(acc)
            tma.store_wait(0)
            store_half(
                x0, terms_desc, cut_terms_desc, is_cut, buffers.index(0), 0, item, row, column
            )
            store_half(
                x1, terms_desc, cut_terms_desc, is_cut, buffers.index(1), 0, item, row + 64, column
            )
        running = 0
        if coefficients_ptr is not None:
            part = gl.where(steps < SPREAD_STEPS, 0, steps // 3)
            for half in range(2):
                acc = accumulate(acc, a_ring, b_ring, full, empty, step + done, part, STAGES, done)
                if part > 0:
                    _fetch_term(
                        terms_desc, buffers.index(half), ready.index(half), 0, item,
                        row + half * 64, column,
                    )  # fmt: skip
                done += part
            running = done
        acc = accumulate(
            acc, a_ring, b_ring, full, empty, step + done, steps - done, STAGES, running
        )
        pass_turn(order, WG)
        acc = finish(acc, empty, step + done, steps - done, STAGES)
        x0, x1 = halves(acc)
        if coefficients_ptr is None:
            tma.store_wait(0)
        _finish_half(
            x0, out_desc, cut_desc, is_cut, terms_desc, buffers.index(0), ready.index(0), bias_ptr,
            coefficients_ptr, num_terms, turn >> 1, item, row, column, out_features,
        )  # fmt: skip
        _finish_half(
            x1, out_desc, cut_desc, is_cut, terms_desc, buffers.index(1), ready.index(1), bias_ptr,
            coefficients_ptr, num_terms, turn >> 1, item, row + 64, column, out_features,
        )  # fmt: skip
        step += steps + _steps(others, num_heads, always_steps, D, UPDATE)
        listed = next_listed
        tile_row = next_row
        turn += 2
        tile = _tile_of(turn)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "num_tile_rows", "num_n", "group_n", "tiles_per_item", "first_row", "rows", "num_heads",
        "num_terms", "always_steps",
    ]
)  # fmt: skip
def gemm_o_kernel(
    o_desc, always_desc, w_desc, out_desc, cut_desc, terms_desc, cut_terms_desc, bias_ptr,
    coefficients_ptr, rows_ptr,
    words_ptr, num_tile_rows, num_n, group_n, tiles_per_item, first_row, rows, num_heads,
    num_terms, always_steps, out_features, D: gl.constexpr, UPDATE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = o_desc.dtype
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, 64], o_desc.layout)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, 128, 64], w_desc.layout)
    buffers0 = gl.allocate_shared_memory(out_desc.dtype, [2, 1, 1, 64, 128], out_desc.layout)
    buffers1 = gl.allocate_shared_memory(out_desc.dtype, [2, 1, 1, 64, 128], out_desc.layout)
    full = make_barriers(STAGES)
    empty = make_barriers(STAGES)
    order = make_barriers(2)
    ready0 = make_barriers(2)
    ready1 = make_barriers(2)
    tiling = (num_tile_rows, num_n, group_n)
    gdc_wait()  # the lists are made by the launch before this one, which let it start early
    gl.warp_specialize(
        [
            (_consumer, (
                out_desc, cut_desc, terms_desc, cut_terms_desc, a_ring, b_ring, buffers0, full,
                empty, order, ready0,
                bias_ptr, coefficients_ptr, rows_ptr, words_ptr, tiling, tiles_per_item,
                first_row, rows, num_heads, num_terms, always_steps, out_features, D,
                UPDATE, STAGES, 0,
            )),
            (_consumer, (
                out_desc, cut_desc, terms_desc, cut_terms_desc, a_ring, b_ring, buffers1, full,
                empty, order, ready1,
                bias_ptr, coefficients_ptr, rows_ptr, words_ptr, tiling, tiles_per_item,
                first_row, rows, num_heads, num_terms, always_steps, out_features, D,
                UPDATE, STAGES, 1,
            )),
            (_producer, (
                o_desc, always_desc, w_desc, a_ring, b_ring, full, empty, rows_ptr, words_ptr,
                tiling, tiles_per_item, first_row, rows, num_heads, always_steps, D,
                UPDATE, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def group_width(num_n: int, tile_rows: int, ctas: int) -> int:
    """Feature tiles of a group: all where the tiles are few, since groups end unevenly."""
    if num_n * tile_rows < GROUPED_ROUNDS * ctas:
        return num_n
    return -(-num_n // max(1, round(num_n / GROUP)))


def _launch(
    o: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    always: Tensor | None,
    out: Tensor,
    terms: Tensor | None,
    coefficients: Tensor | None,
    tiles: TileRows,
    lists: tuple[Tensor, Tensor],
    *,
    update: bool,
) -> None:
    """``out`` and, on an Update, ``terms[0]``; ``terms`` are inputs if there are coefficients."""
    num_heads, head_dim = o.shape[2:]
    block = [1, 1, TILE_M, hopper.TILE_K]
    half = [1, 1, hopper.HALF_M, TILE_N]
    out_features = out.shape[-1]
    num_n = -(-out_features // TILE_N)
    always_steps = 0 if always is None else -(-always.shape[-1] // hopper.TILE_K)
    ctas = min(num_multiprocessors(o.device.index), tiles.count * num_n)
    gemm_o_kernel[(ctas,)](
        hopper.descriptor(o.transpose(1, 2), block),
        None if always is None else hopper.descriptor(always[:, None], block),
        hopper.descriptor(weight, [TILE_N, hopper.TILE_K]),
        hopper.descriptor(out[None], half),
        hopper.cut_descriptor(out[None], 2, tiles.first_row, half),
        None if terms is None else hopper.descriptor(terms, half),
        hopper.cut_descriptor(terms, 2, tiles.first_row, half)
        if update and terms is not None
        else None,
        bias,
        coefficients,
        *lists,
        tiles.count,
        num_n,
        group_width(num_n, tiles.count, ctas),
        tiles.per_item,
        tiles.first_row,
        out.shape[1],
        num_heads,
        0 if coefficients is None else coefficients.shape[0],
        always_steps,
        out_features,
        D=head_dim,
        UPDATE=update,
        STAGES=hopper.stages(TILE_N),
        num_warps=4,
        launch_pdl=True,
    )


def _refuses_shared(call: GemmOCall | GemmOUpdateCall, o: Tensor) -> list[str]:
    grid = call.symbols.grid
    reasons = hopper.refuse_call(call.out, grid.block_m, o.shape[-1], HEAD_DIMS)
    reasons += hopper.refuse_dtype("o", o)
    terms = call.bias_terms
    if terms is not None:
        reasons += hopper.refuse_dtype("bias_terms", terms)
    if reasons:
        return reasons
    if o.shape[2] > MAX_HEADS:
        reasons.append(f"num_heads must be at most {MAX_HEADS}, got {o.shape[2]}")
    named = {"weight": call.weight, "always": call.always, "out": call.out, "bias_terms": terms}
    for name, tensor in named.items():
        reasons += hopper.refuse_strides(name, tensor)
    return reasons + hopper.refuse_contiguous("bias", call.bias)


def _refuses(call: GemmOCall) -> list[str]:
    reasons = _refuses_shared(call, call.o)
    return reasons or (
        hopper.refuse_strides("o", call.o)
        + hopper.refuse_contiguous("coefficients", call.coefficients)
    )


def _refuses_update(call: GemmOUpdateCall) -> list[str]:
    reasons = _refuses_shared(call, call.terms[0])
    for index, term in enumerate(call.terms):
        name = f"terms[{index}]"
        if term.dtype != call.terms[0].dtype:
            reasons.append(f"{name} must have the dtype of terms[0], got {term.dtype}")
        reasons += hopper.refuse_strides(name, term)
    return reasons


@register(
    "gemm_o", "sm90", rank=40, refuses=_refuses,
    available=hopper_refusals, device="cuda",
)  # fmt: skip
def run(call: GemmOCall) -> None:
    if not call.out.numel():
        return
    always, terms, coefficients = _columns(call.always), call.bias_terms, call.coefficients
    if terms is not None and not terms.shape[0]:
        terms = coefficients = None
    tiles = TileRows.of(call.symbols, call.o.shape[1], call.row_offset)
    with on_device(call.out.device):
        lists = head_words(call.symbols, tiles, cached=False)
        data = (call.o, call.weight, call.bias, always, call.out, terms, coefficients)
        _launch(*data, tiles, lists, update=False)


@register(
    "gemm_o_update", "sm90", rank=40, refuses=_refuses_update,
    available=hopper_refusals, device="cuda",
)  # fmt: skip
def update(call: GemmOUpdateCall) -> None:
    if not call.out.numel():
        return
    o, always, bias_terms = call.terms[0], _columns(call.always), call.bias_terms
    heads = call.weight[:, : o.shape[2] * o.shape[3]]
    tiles = TileRows.of(call.symbols, o.shape[1], call.row_offset)
    with on_device(call.out.device):
        lists = head_words(call.symbols, tiles, cached=True)
        data = (o, call.weight, call.bias, always, call.out, bias_terms, None)
        _launch(*data, tiles, lists, update=True)
        for difference, term in zip(call.terms[1:], bias_terms[1:], strict=True):
            partial = (difference, heads, None, None, term, None, None)
            _launch(*partial, tiles, lists, update=False)


def _columns(always: Tensor | None) -> Tensor | None:
    return None if always is None or always.shape[-1] == 0 else always
