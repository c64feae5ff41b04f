"""Summaries: what they are made of, and attention that sees them where it skips."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import (
    device_for,
    examples,
    random_symbols,
    refusal_skips,
    token_masks,
    with_gpu_marks,
)
from flashomni import dispatch
from flashomni.kernels import ForecastTerms, Summary, backends, sparse_attention, summarise
from flashomni.kernels.attention.op import AttentionCall
from flashomni.kernels.summarise.op import SummariseCall
from flashomni.symbols import Grid, Symbols

ATTENTION = with_gpu_marks(backends("attention"))
SUMMARISE = with_gpu_marks(backends("summarise"))
POISON = 7.0
# (batch, seqlen_q, seqlen_kv, heads, key heads, head_dim, block_n, r)
SHAPES = [
    (1, 1, 1, 1, 1, 64, 128, 1),
    (1, 127, 129, 2, 2, 64, 128, 4),
    (2, 200, 330, 4, 2, 64, 128, 16),
    (1, 257, 1290, 2, 1, 128, 128, 4),
    (2, 300, 600, 2, 2, 80, 64, 4),
    (1, 130, 4300, 1, 1, 64, 128, 4),  # more blocks than a word has bits
]

SMALL = (1, 260, 330, 2, 1, 64, 128, 16)


def made(shape, dtype, device, kv_len=None, q_density=0.7, kv_density=0.3):
    """``(q, k, v, symbols, summary)``; the summary by its definition."""
    batch, seqlen_q, seqlen_kv, heads, kv_heads, head_dim, block_n, per_block = shape
    q = torch.randn(batch, seqlen_q, heads, head_dim, device=device).to(dtype)
    k, v = torch.randn(2, batch, seqlen_kv, kv_heads, head_dim, device=device).to(dtype)
    grid = Grid(seqlen_q, seqlen_kv, block_n=block_n, kv_len=kv_len)
    symbols = random_symbols(grid, batch, heads, q_density, kv_density).to(device)
    summary = summarise(k, v, symbols.grid, per_block, backend="reference")
    return q, k, v, symbols, summary


def exact(q, k, v, symbols, summary):
    """fp64 ``(out [B, M, H, D], lse [B, H, M], rows [B, H, M])``, summaries as keys like others."""
    grid, log_n = symbols.grid, summary.log_n.double()[:, None, None]
    per_block = summary.k.shape[1] // grid.num_kv_blocks
    rows, pairs = token_masks(symbols)
    parts = (
        (~symbols.kv_mask()).repeat_interleave(grid.block_m, -2).repeat_interleave(per_block, -1)
    )
    pairs = torch.cat([pairs, parts[:, :, : q.shape[1]] & (log_n > -torch.inf)], -1)
    k, v = (
        torch.cat(pair, 1).double().repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2)
        for pair in ((k, summary.k), (v, summary.v))
    )
    score = q.double().transpose(1, 2) @ k.mT / math.sqrt(q.shape[3])
    score[..., grid.seqlen_kv :] += log_n
    score = score.masked_fill(~pairs, -torch.inf)
    prob = score.softmax(-1).masked_fill(~pairs, 0.0)
    return (prob @ v).transpose(1, 2), score.logsumexp(-1), rows


def check(backend, q, k, v, symbols, summary):
    """Error at most that of two roundings to the dtype; lse; cached rows keep what they had."""
    out = torch.full_like(q, POISON)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), POISON, device=q.device)
    with refusal_skips():
        sparse_attention(q, k, v, symbols, out=out, lse=lse, summary=summary, backend=backend)
    want, want_lse, rows = exact(q, k, v, symbols, summary)
    live = rows.mT[..., None].expand_as(out)
    limit = 1.5 * torch.finfo(q.dtype).eps * want.abs().amax() + 2e-6
    assert torch.where(live, (out - want).abs(), 0.0).amax() <= limit
    assert (out[~live] == POISON).all() and (lse[~rows] == POISON).all()
    torch.testing.assert_close(lse[rows].double(), want_lse[rows], atol=2e-3, rtol=1e-4)
    return out, lse


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_skipped_blocks_count_as_their_summaries(backend, dtype, shape):
    """Ragged, GQA, several words of bits; few and many blocks skipped."""
    for density in (0.0, 0.4):
        check(backend, *made(shape, dtype, device_for(backend), kv_density=density))


@pytest.mark.parametrize("backend", ATTENTION)
@examples(8)
@given(data=st.data())
def test_properties(backend, data):
    """Random shapes, blocks, r, GQA ratios, densities and valid lengths, none among them."""
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    ratio, head_dim = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([16, 64, 80]))
    seqlen_q, seqlen_kv = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 500))
    block_n = data.draw(st.sampled_from([16, 64, 128]))
    per_block = data.draw(st.sampled_from([1, 2, 4, 16]))
    kv_len = None
    if data.draw(st.booleans()):
        lengths = data.draw(st.lists(st.integers(0, seqlen_kv), min_size=batch, max_size=batch))
        kv_len = torch.tensor(lengths, dtype=torch.int32)
    shape = (batch, seqlen_q, seqlen_kv, heads * ratio, heads, head_dim, block_n, per_block)
    dtype = torch.bfloat16 if backend == "sm90" else torch.float32
    density = data.draw(st.sampled_from([0.0, 0.3, 0.9]))
    check(backend, *made(shape, dtype, device_for(backend), kv_len, 0.7, density))


@pytest.mark.parametrize("backend", ATTENTION)
def test_a_summary_of_every_token_makes_it_dense(backend):
    """r = block_n: whatever is skipped, it is all there."""
    shape = (1, 100, 300, 2, 2, 64, 16, 16)
    q, k, v, symbols, summary = made(shape, torch.float32, device_for(backend))
    out, _ = check(backend, q, k, v, symbols, summary)
    dense = sparse_attention(q, k, v, backend="reference")
    live = token_masks(symbols)[0].mT
    torch.testing.assert_close(out[live], dense[live], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ATTENTION)
def test_rows_that_skip_nothing_have_none(backend):
    """The same as without, to rounding; values that are never used may be anything finite."""
    dtype = torch.bfloat16 if backend == "sm90" else torch.float32
    q, k, v, symbols, summary = made(SMALL, dtype, device_for(backend), kv_density=1.0)
    loud = Summary(summary.k * 1e4, summary.v * 1e4, summary.log_n)
    with refusal_skips():
        got = sparse_attention(q, k, v, symbols, summary=loud, backend=backend)
    want = sparse_attention(q, k, v, symbols, backend=backend)
    live = token_masks(symbols)[0].mT
    torch.testing.assert_close(got[live], want[live], atol=1e-5, rtol=2e-2)


@pytest.mark.parametrize("length", [200, 256])
@pytest.mark.parametrize("backend", ATTENTION)
def test_summaries_of_nothing_never_take_part(backend, length):
    """log_n of -inf, whatever k and v hold; nor do blocks that start behind the last valid key."""
    dtype = torch.bfloat16 if backend == "sm90" else torch.float32
    kv_len = torch.tensor([length, 0], dtype=torch.int32)
    shape = (2, 150, 600, 2, 2, 64, 128, 4)
    q, k, v, symbols, summary = made(shape, dtype, device_for(backend), kv_len, 1.0, 0.2)
    absent = (summary.log_n == -torch.inf)[..., None, None]
    assert absent.sum() == 20 - -(-length // 32) + 20
    k_loud, v_loud = (x.masked_fill(absent, 1e4) for x in (summary.k, summary.v))
    out, lse = check(backend, q, k, v, symbols, Summary(k_loud, v_loud, summary.log_n))
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()
    behind = summary.log_n.clone()
    behind[:, 2 * 4 :] = 1.0  # of blocks 2, 3 and 4: they hold no valid key
    same = sparse_attention(
        q, k, v, symbols, summary=Summary(k_loud, v_loud, behind), backend=backend
    )
    assert torch.equal(same, out)


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("first", ["present", "absent"])
def test_rows_that_visit_no_block(backend, first):
    """Symbols that no policy makes: such rows see summaries alone, or nothing at all."""
    dtype = torch.bfloat16 if backend == "sm90" else torch.float32
    q, k, v, symbols, summary = made((1, 150, 4300, 2, 2, 64, 128, 4), dtype, device_for(backend))
    if first == "absent":  # more of them than a tile of keys holds
        summary.log_n[:, :130] = -torch.inf
    symbols = Symbols(symbols.q_bits, torch.zeros_like(symbols.kv_bits), symbols.grid)
    check(backend, q, k, v, symbols, summary)
    none = Summary(summary.k, summary.v, torch.full_like(summary.log_n, -torch.inf))
    out, lse = check(backend, q, k, v, symbols, none)
    rows = token_masks(symbols)[0]
    assert (out[rows.mT] == 0).all() and (lse[rows] == -torch.inf).all()


@pytest.mark.parametrize("backend", ATTENTION)
def test_cached_rows_and_their_forecast_are_as_without(backend):
    """Summaries belong to computed rows alone; bits and strides of k, v and symbols are free."""
    dtype = torch.bfloat16 if backend == "sm90" else torch.float32
    q, k, v, symbols, summary = made(SMALL, dtype, device_for(backend), q_density=0.4)
    wide = torch.stack([summary.k, summary.v], 3)
    summary = Summary(wide[..., 0, :], wide[..., 1, :], summary.log_n)
    terms = [torch.randn_like(q) for _ in range(2)]
    forecast = ForecastTerms(terms, torch.tensor([1.0, 0.5], device=q.device))
    outs = []
    for seen in (summary, None):
        outs.append(torch.full_like(q, POISON))
        with refusal_skips():
            sparse_attention(
                q, k, v, symbols, out=outs[-1], forecast=forecast, summary=seen, backend=backend
            )
    live = token_masks(symbols)[0].mT
    assert torch.equal(outs[0][~live], outs[1][~live])
    assert not torch.equal(outs[0][live], outs[1][live])


@pytest.mark.parametrize("backend", SUMMARISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("seqlen", "block_n", "per_block", "lengths"),
    [
        (1, 128, 4, None),
        (330, 128, 1, [330, 17]),
        (330, 128, 16, [0, 129]),
        (600, 64, 4, [599, 1000]),
        (500, 48, 3, [100, -5]),
        (700, 512, 1, None),
    ],
)
def test_means_of_valid_keys(backend, dtype, seqlen, block_n, per_block, lengths):
    """Against a loop in fp64; keys that do not exist may be NaN."""
    device = device_for(backend)
    k, v = torch.randn(2, 2, seqlen, 3, 80, device=device).to(dtype)
    kv_len = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device)
    if lengths is not None:
        for b, length in enumerate(lengths):
            k[b, max(length, 0) :], v[b, max(length, 0) :] = torch.nan, torch.nan
    fused = torch.stack([k, v], 2)
    grid = Grid(seqlen, seqlen, block_n=block_n)
    with refusal_skips():
        got = summarise(
            fused[:, :, 0], fused[:, :, 1], grid, per_block, kv_len=kv_len, backend=backend
        )
    width, count = block_n // per_block, grid.num_kv_blocks * per_block
    assert got.k.shape == got.v.shape == (2, count, 3, 80) and got.log_n.shape == (2, count)
    assert got.k.dtype == got.v.dtype == dtype and got.log_n.dtype == torch.float32
    for b in range(2):
        valid = seqlen if lengths is None else min(max(lengths[b], 0), seqlen)
        for s in range(count):
            n = min(valid, (s + 1) * width) - s * width
            if n <= 0:
                assert got.log_n[b, s] == -torch.inf
                assert not got.k[b, s].any() and not got.v[b, s].any()
                continue
            assert got.log_n[b, s].item() == pytest.approx(math.log(n), abs=1e-6)
            for mean, x in ((got.k, k), (got.v, v)):
                want = x[b, s * width : s * width + n].double().mean(0)
                torch.testing.assert_close(
                    mean[b, s].double(), want, atol=1e-6, rtol=torch.finfo(dtype).eps
                )


@pytest.mark.slow
def test_compiles_without_graph_breaks_and_passes_opcheck():
    """Both ops: making a summary, and attention that takes it."""
    q, k, v, symbols, _ = made((1, 130, 130, 2, 2, 32, 64, 4), torch.float32, "cpu")

    def run(q, k, v):
        summary = summarise(k * 2, v, symbols.grid, 4)
        return sparse_attention(q, k, v, symbols, out=torch.zeros_like(q), summary=summary) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v))
    summary = summarise(k, v, symbols.grid, 4)
    call = AttentionCall(q, k, v, torch.zeros_like(q), None, symbols, None, 0.1, summary=summary)
    for op, each in (("attention", call), ("summarise", SummariseCall(k, v, None, 16, 12))):
        overload = getattr(torch.ops.flashomni, op).default
        torch.library.opcheck(overload, dispatch.arguments(op, each))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ATTENTION)
def test_never_synchronises_and_replays_in_a_cuda_graph(backend):
    """A replay reads the keys, symbols and valid lengths that are there then."""
    if backend in ("cpu", "reference"):
        pytest.skip(f"{backend} is not for a GPU")
    shape = (1, 1000, 1000, 2, 2, 128, 128, 4)
    kv_len = torch.tensor([900], dtype=torch.int32)
    q, k, v, symbols, _ = made(shape, torch.bfloat16, "cuda", kv_len)

    def run(out):
        summary = summarise(k, v, symbols.grid, 4)
        return sparse_attention(q, k, v, symbols, out=out, summary=summary, backend=backend)

    out = torch.full_like(q, POISON)
    with refusal_skips():
        run(out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(out)
    for density, length in ((0.1, 333), (0.8, 1000)):
        other = random_symbols(Grid(1000, 1000), 1, 2, 0.7, density)
        symbols.q_bits.copy_(other.q_bits)
        symbols.kv_bits.copy_(other.kv_bits)
        symbols.grid.kv_len.fill_(length)
        k.add_(0.25)
        expected = run(torch.full_like(q, POISON))
        out.fill_(POISON)
        graph.replay()
        assert torch.equal(out, expected)


K = torch.zeros(1, 12, 2, 64)
LOG_N = torch.zeros(1, 12)


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        ((K, K, LOG_N), "summary must be a Summary, got tuple"),
        (Summary(None, K, LOG_N), "summary.k must be a tensor, got None"),
        (Summary(K[:, :2], K, LOG_N), r"summary.k must be \[1, r \* 3, 2, 64\] .*, got \[1, 2, 2"),
        (Summary(K[:, :10], K, LOG_N), r"summary.k must be \[1, r \* 3, 2, 64\] with r dividing"),
        (Summary(K[:, :9], K, LOG_N), "dividing block_n, 128, got"),
        (Summary(K[..., :32], K, LOG_N), r"summary.k must be \[1, 12, 2, 64\], got \[1, 12, 2, 32"),
        (Summary(K.half(), K, LOG_N), "summary.k must be float32, got float16"),
        (Summary(K, K[:, :9], LOG_N), r"summary.v must be \[1, 12, 2, 64\]"),
        (Summary(K, K.to("meta"), LOG_N), r"summary.v must be on cpu, got meta"),
        (Summary(K, K, LOG_N[:, :3]), r"summary.log_n must be \[1, 12\], got \[1, 3\]"),
        (Summary(K, K, LOG_N.double()), "summary.log_n must be float32, got float64"),
        (Summary(K.clone().requires_grad_(), K, LOG_N), "summary.k requires grad"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(summary, message):
    """What was given and what is allowed."""
    q, k = torch.zeros(1, 200, 2, 64), torch.zeros(1, 330, 2, 64)
    with pytest.raises(ValueError, match=message):
        sparse_attention(q, k, k, Symbols.dense(Grid(200, 330), 1, 2), summary=summary)


def test_out_that_overlaps_a_summary_and_a_summary_without_symbols():
    """Refused by name."""
    q, k = torch.zeros(1, 12, 2, 64), torch.zeros(1, 330, 2, 64)
    summary = Summary(K, K.clone(), LOG_N)
    with pytest.raises(ValueError, match=r"out must not overlap summary\.k"):
        sparse_attention(q, k, k, Symbols.dense(Grid(12, 330), 1, 2), summary=summary, out=K)
    with pytest.raises(ValueError, match="summary needs symbols"):
        sparse_attention(q, k, k, summary=summary)


KEYS, GRID = torch.zeros(1, 330, 2, 64), Grid(330, 330)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (330, 330)}, "grid must be a Grid, got tuple"),
        ({"k": KEYS[:, :300]}, r"k must be \[B, 330, Hkv, D\], got \[1, 300, 2, 64\]"),
        ({"k": KEYS.double()}, "k must be float32 or .*, got float64"),
        ({"v": KEYS[..., :32]}, r"v must be \[1, 330, 2, 64\]"),
        ({"v": KEYS.half()}, "v must be float32, got float16"),
        ({"v": KEYS.to("meta")}, "v must be on cpu, got meta"),
        ({"per_block": 3}, "per_block must divide block_n, 128, got 3"),
        ({"per_block": 0}, "per_block must divide block_n, 128, got 0"),
        ({"per_block": 4.0}, "per_block must be an int, got float"),
        ({"kv_len": torch.zeros(2, dtype=torch.int32)}, r"kv_len must be \[1\], got \[2\]"),
        ({"kv_len": torch.zeros(1)}, "kv_len must be int32, got float32"),
        ({"backend": "abacus"}, "backend must be one of .*reference.* got 'abacus'"),
    ],
)
def test_refusals_of_what_makes_them(change, message):
    """The same for what is summarised."""
    given = {"k": KEYS, "v": KEYS, "grid": GRID, "per_block": 4, **change}
    with pytest.raises(ValueError, match=message):
        summarise(**given)
