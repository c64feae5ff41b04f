"""Symbols and Grid: layout of the bits, invariants, ragged sizes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import random_symbols
from flashomni.symbols import Grid, Symbols, pack_bits, row_bytes, unpack_bits
from flashomni.symbols.choice.op import pool

common = settings(deadline=None, derandomize=True, max_examples=60)


@st.composite
def grids(draw):
    """Any grid: 1 token to a few hundred, text nowhere, first, last or everywhere."""
    block_m, block_n = (draw(st.sampled_from([16, 32, 64, 128])) for _ in range(2))
    seqlen = draw(st.sampled_from([1, 15, 16, 17, 127, 128, 129, 200, 330, 545]))
    length = draw(st.integers(0, seqlen))
    text = draw(st.sampled_from([(0, 0), (0, length), (seqlen - length, seqlen)]))
    return Grid(seqlen, seqlen, text, block_m, block_n)


@st.composite
def mixed_grids(draw):
    """Several text and reference spans, anywhere."""
    seqlen = draw(st.sampled_from([16, 129, 200, 330, 545]))
    cuts = sorted(draw(st.sets(st.integers(0, seqlen), min_size=2, max_size=8)))
    pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
    kinds = draw(st.lists(st.sampled_from(["text", "text", "reference"]), min_size=4, max_size=4))
    spans = tuple((kind, *pair) for kind, pair in zip(kinds, pairs, strict=False))
    block_m, block_n = (draw(st.sampled_from([16, 32, 64])) for _ in range(2))
    return Grid(seqlen, seqlen, (0, 0), block_m, block_n, spans=spans)


@common
@given(bits=st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_are_little_endian_as_in_numpy(bits):
    """pack_bits is numpy's packbits(bitorder="little"), zero padded; unpack_bits inverts it."""
    mask = torch.tensor(bits)
    packed = pack_bits(mask, row_bytes(len(bits)))
    expected = np.packbits(np.array(bits), bitorder="little")
    assert packed[: len(expected)].tolist() == expected.tolist()
    assert not packed[len(expected) :].any() and len(packed) % 4 == 0
    assert torch.equal(unpack_bits(packed, len(bits)), mask)


@common
@given(grid=st.one_of(grids(), mixed_grids()), seed=st.integers(0, 99))
def test_invariants(grid, seed):
    """Text rows computed, text columns visited, no row empty; all other bits as asked."""
    torch.manual_seed(seed)
    rows, columns = grid.num_q_blocks, grid.num_kv_blocks
    q_mask, kv_mask = torch.rand(2, 3, rows) < 0.3, torch.rand(2, 3, rows, columns) < 0.2
    symbols = Symbols.pack(q_mask, kv_mask, grid)
    got_q, got_kv = symbols.q_mask(), symbols.kv_mask()
    text = {*range(*grid.text)}
    text |= {i for kind, *span in grid.spans if kind == "text" for i in range(*span)}
    for i in range(rows):
        tokens = set(range(i * grid.block_m, (i + 1) * grid.block_m))
        is_text = bool(tokens & text)
        assert torch.equal(got_q[..., i], q_mask[..., i] | is_text)
    for j in range(columns):
        tokens = set(range(j * grid.block_n, (j + 1) * grid.block_n))
        if tokens & text:
            assert got_kv[..., j].all()
        elif j:
            assert torch.equal(got_kv[..., j], kv_mask[..., j])
    assert got_kv.any(-1).all()
    assert symbols.kv_bits.shape[-1] % 4 == 0


@common
@given(grid=grids(), seed=st.integers(0, 99), both=st.booleans())
def test_a_span_at_an_end_is_the_text_by_another_name(grid, seed, both):
    """Bit for bit; and so is a text that is cut in two."""
    torch.manual_seed(seed)
    start, stop = grid.text
    middle = (start + stop) // 2 if both else stop
    spans = tuple(
        ("text", *span) for span in ((start, middle), (middle, stop)) if span[1] > span[0]
    )
    named = Grid(grid.seqlen_q, grid.seqlen_kv, (0, 0), grid.block_m, grid.block_n, spans=spans)
    rows, columns = grid.num_q_blocks, grid.num_kv_blocks
    masks = torch.rand(1, 2, rows) < 0.3, torch.rand(1, 2, rows, columns) < 0.2
    for skip in (False, True):
        a = Symbols.pack(*masks, grid, skip_text_columns=skip)
        b = Symbols.pack(*masks, named, skip_text_columns=skip)
        assert torch.equal(a.q_bits, b.q_bits) and torch.equal(a.kv_bits, b.kv_bits)
    assert named.vision == grid.vision or start == stop
    assert all(named.is_text(i, i + 1) == grid.is_text(i, i + 1) for i in range(grid.seqlen_q))


@common
@given(grid=mixed_grids())
def test_generated_tokens_are_counted_around_the_spans(grid):
    """generated_index skips text and reference; shape must count what is left."""
    taken = {i for _, *span in grid.spans for i in range(*span)}
    free = [i not in taken for i in range(grid.seqlen_q)]
    index = grid.generated_index(torch.arange(grid.seqlen_q + 1))
    assert index.tolist() == [sum(free[:i]) for i in range(grid.seqlen_q + 1)]
    assert grid.num_generated == sum(free)
    if any(free):
        shaped = replace(grid, shape=(1, 1, sum(free)))
        assert shaped != grid and shaped.with_kv_len(None).shape == shaped.shape
    with pytest.raises(ValueError, match=f"neither text nor reference, {sum(free)}, got"):
        replace(grid, shape=(1, 1, sum(free) + 1))


def test_vision_between_texts_is_no_single_range():
    """Who asks for one range is told; ranges of blocks serve everybody."""
    grid = Grid(300, 300, (0, 10), 16, 16, spans=(("text", 100, 120), ("reference", 200, 300)))
    with pytest.raises(
        ValueError, match=r"vision tokens must be one range, got .* text \(0, 10\) and"
    ):
        _ = grid.vision
    assert grid.text_spans == ((0, 10), (100, 120))
    assert grid.text_q_ranges == ((0, 1), (6, 8)) and grid.vision_q_ranges == ((1, 6), (8, 19))
    assert Grid(300, 300, (0, 300)).vision == (300, 300)
    assert Grid(300, 300, (200, 300)).vision == (0, 200)


@common
@given(grid=grids())
def test_blocks_and_segments_tile_the_sequence(grid):
    """Text and vision blocks are disjoint and complete; so are their tokens."""
    for text, vision, count in (
        (grid.text_q_ranges, grid.vision_q_ranges, grid.num_q_blocks),
        (grid.text_kv_ranges, grid.vision_kv_ranges, grid.num_kv_blocks),
    ):
        blocks = [block for span in text + vision for block in range(*span)]
        assert sorted(blocks) == list(range(count))
    tokens = [*range(*grid.text), *range(*grid.vision)]
    assert sorted(tokens) == list(range(grid.seqlen_q))


@common
@given(grid=grids(), seed=st.integers(0, 99))
def test_density_is_the_plain_mean(grid, seed):
    """Of the pairs that are visited by a computed tile."""
    torch.manual_seed(seed)
    symbols = random_symbols(grid, 2, 3)
    computed = symbols.kv_mask() & symbols.q_mask()[..., None]
    torch.testing.assert_close(symbols.density(), computed.float().mean())


def test_dense_and_cached_share_their_bits():
    """One row is stored for batch and heads; text is computed even when all is cached."""
    grid = Grid(300, 300, (0, 20))
    dense, cached = Symbols.dense(grid, 4, 24), Symbols.cached(grid, 4, 24)
    assert dense.q_mask().all() and dense.kv_mask().all() and float(dense.density()) == 1
    assert dense.kv_bits.stride()[:3] == (0, 0, 0) and dense.q_bits.stride()[:2] == (0, 0)
    assert cached.q_mask()[3, 23].tolist() == [True, False, False] and cached.kv_mask().all()
    assert cached.kv_bits.stride()[:2] == (0, 0)


@common
@given(grids() | mixed_grids())
def test_dense_and_cached_are_constants_of_their_grid(grid):
    """What masks give, made once: every layer asks for them in every Update."""
    rows, columns = grid.num_q_blocks, grid.num_kv_blocks
    for make, value in ((Symbols.dense, True), (Symbols.cached, False)):
        q_mask, kv_mask = torch.full((2, 3, rows), value), torch.ones(2, 3, rows, columns).bool()
        packed, made = Symbols.pack(q_mask, kv_mask, grid), make(grid, 2, 3)
        assert torch.equal(made.q_bits, packed.q_bits)
        assert torch.equal(made.kv_bits, packed.kv_bits)
        again = make(grid, 1, 1, "cpu")
        assert again.q_bits.data_ptr() == made.q_bits.data_ptr()
        assert again.kv_bits.data_ptr() == made.kv_bits.data_ptr()


def test_fill_rows_leaves_only_rows_that_pay():
    """A row that skips less than the share visits everything; the others are untouched."""
    grid = Grid(128, 1280, block_n=128, block_m=64)
    kv_mask = torch.ones(1, 1, 2, 10, dtype=torch.bool)
    kv_mask[..., 0, 9], kv_mask[..., 1, 5:] = False, False
    symbols = Symbols.pack(torch.ones(1, 1, 2).bool(), kv_mask, grid).fill_rows(0.15)
    assert symbols.kv_mask()[0, 0].sum(-1).tolist() == [10, 5]


@pytest.mark.parametrize("seqlen", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("with_length", [False, True])
def test_pool_is_the_mean_of_the_tokens_that_exist(seqlen, with_length):
    """Against a loop, ragged tail and padding included."""
    x = torch.randn(2, seqlen, 3, 8)
    lengths = [seqlen, max(seqlen // 2, 1)] if with_length else [seqlen, seqlen]
    length = torch.tensor(lengths, dtype=torch.int32) if with_length else None
    got = pool(x, 64, length)
    for b, limit in enumerate(lengths):
        for i in range(-(-seqlen // 64)):
            tokens = x[b, i * 64 : min((i + 1) * 64, limit)]
            expected = tokens.mean(0) if len(tokens) else torch.zeros(3, 8)
            torch.testing.assert_close(got[b, :, i], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seqlen_q": 0}, "seqlen_q must be at least 1, got 0"),
        ({"block_m": 100}, "block_m must be a positive multiple of 16, got 100"),
        ({"block_n": 0}, "block_n must be a positive multiple of 16, got 0"),
        ({"text": (10, 20)}, "text must sit at the start or at the end of the 300 tokens"),
        ({"text": (0, 301)}, "text must be a token range inside the sequence"),
        ({"text": (5, 3)}, "text must be a token range inside the sequence"),
        ({"seqlen_kv": 400, "text": (0, 5)}, "a text span needs query and key tokens to be"),
        ({"kv_len": torch.zeros(2)}, "kv_len must be int32 of shape"),
        ({"order": "spiral"}, "order must be one of raster, tile, hilbert, got 'spiral'"),
        ({"shape": (3, 10)}, r"shape must be \(T, H, W\), positive integers, or None, got"),
        ({"shape": (0, 10, 30)}, r"shape must be \(T, H, W\), positive integers, or None, got"),
        ({"shape": (3, 10, 9)}, r"neither text nor reference, 300, got \(3, 10, 9\) = 270"),
        ({"shape": (3, 10, 10), "text": (0, 7)}, "neither text nor reference, 293, got"),
        ({"shape": (3, 10, 10), "seqlen_kv": 77}, "shape needs query and key tokens to be the"),
        ({"spans": [("text", 0, 3)]}, "spans must be a tuple of"),
        ({"spans": (("text", 3),)}, "spans must be a tuple of"),
        ({"spans": (("picture", 0, 3),)}, "kind of a span must be text or reference, got 'pict"),
        ({"spans": (("text", 290, 301),)}, "text must be a token range inside the sequence"),
        ({"spans": (("reference", 5, 3),)}, "reference must be a token range inside the"),
        ({"text": (0, 9), "spans": (("text", 8, 20),)}, r"must not overlap, got \(8, 20\) before"),
    ],
)
def test_grid_refuses(arguments, message):
    """Each error names the argument, what it got and what is allowed."""
    with pytest.raises(ValueError, match=message):
        Grid(**{"seqlen_q": 300, "seqlen_kv": 300, **arguments})


def test_symbols_refuse():
    """Wrong dtype, shape, or another grid."""
    grid = Grid(300, 300)
    mask, pairs = torch.ones(1, 2, 3).bool(), torch.ones(1, 2, 3, 3).bool()
    with pytest.raises(ValueError, match=r"q_mask must be \[B, H, 3\], got \(1, 2, 4\)"):
        Symbols.pack(torch.ones(1, 2, 4).bool(), pairs, grid)
    with pytest.raises(ValueError, match=r"kv_mask must be \[B, H, 3, 3\]"):
        Symbols.pack(mask, pairs[..., :2], grid)
    with pytest.raises(ValueError, match="masks must be bool"):
        Symbols.pack(mask.float(), pairs, grid)
    good = Symbols.pack(mask, pairs, grid)
    with pytest.raises(ValueError, match="symbols must be uint8"):
        Symbols(good.q_bits.int(), good.kv_bits, grid)
    with pytest.raises(ValueError, match=r"kv_bits must be \[B, H, 3, 4\]"):
        Symbols(good.q_bits, good.kv_bits[..., :2], grid)


def test_densities_of_a_known_case():
    """kv_density is about computed rows only; density is the product over the whole."""
    grid = Grid(4 * 16, 4 * 16, block_m=16, block_n=16)
    q_mask = torch.tensor([True, False, False, True]).view(1, 1, 4)
    kv_mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    kv_mask[..., 0, 1:], kv_mask[..., 1, 2:] = False, False  # 1 of 4, and a cached row
    symbols = Symbols.pack(q_mask, kv_mask, grid)
    assert float(symbols.q_density()) == 0.5
    assert float(symbols.kv_density()) == (0.25 + 1.0) / 2
    assert float(symbols.density()) == (0.25 + 1.0) / 4


def test_text_columns_are_skipped_only_on_demand():
    """skip_text_columns leaves text keys to the caller; text rows are computed all the same."""
    grid = Grid(64, 64, (0, 16), block_m=16, block_n=16)
    q_mask, kv_mask = torch.zeros(1, 1, 4).bool(), torch.zeros(1, 1, 4, 4).bool()
    kv_mask[..., 3] = True
    kept = Symbols.pack(q_mask, kv_mask, grid)
    skipped = Symbols.pack(q_mask, kv_mask, grid, skip_text_columns=True)
    assert kept.kv_mask()[0, 0, 1].tolist() == [True, False, False, True]
    assert skipped.kv_mask()[0, 0, 1].tolist() == [False, False, False, True]
    assert kept.q_mask()[0, 0].tolist() == skipped.q_mask()[0, 0].tolist() == [True] + [False] * 3


def test_to_moves_everything():
    """Bits and kv_len go to the device together."""
    grid = Grid(64, 64, kv_len=torch.tensor([60], dtype=torch.int32))
    moved = Symbols.dense(grid, 1, 2).to("meta")
    assert {moved.q_bits.device.type, moved.kv_bits.device.type} == {"meta"}
    assert moved.grid.kv_len.device.type == "meta"
