"""sparse_attention: each backend against the definition; untouched rows stay untouched."""

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
    when_interpreted,
    with_gpu_marks,
)
from flashomni import dispatch
from flashomni.kernels import backends, sparse_attention
from flashomni.kernels.attention.op import AttentionCall
from flashomni.symbols import Grid, Symbols

BACKENDS = with_gpu_marks(backends("attention"))
# (batch, seqlen_q, seqlen_kv, heads, key heads, head_dim): one block, its edges, both ragged, GQA
SHAPES = [
    (1, 1, 1, 1, 1, 64),
    (1, 127, 129, 2, 2, 64),
    (2, 200, 330, 4, 2, 64),
    (1, 257, 128, 3, 1, 128),
    (1, 600, 600, 2, 2, 72),
]


def tensors(shape, dtype, device):
    batch, seqlen_q, seqlen_kv, heads, kv_heads, head_dim = shape
    q = torch.randn(batch, seqlen_q, heads, head_dim, dtype=dtype, device=device)
    k, v = torch.randn(2, batch, seqlen_kv, kv_heads, head_dim, dtype=dtype, device=device)
    return q, k, v


def torch_attention(q, k, v, pairs, scale=None):
    """torch's own attention under the same mask, ``[B, M, H, D]``."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    o = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=pairs, scale=scale
    )
    return o.transpose(1, 2)


def check(backend, shape, symbols, dtype, out_value=7.0, scale=None):
    """Error at most twice torch's in the same dtype; cached rows keep what they had."""
    device = device_for(backend)
    q, k, v = tensors(shape, dtype, device)
    symbols = symbols.to(device)
    rows, pairs = token_masks(symbols)
    rows = rows.mT[..., None].expand_as(q)
    out = torch.full_like(q, out_value)
    with refusal_skips():
        got = sparse_attention(q, k, v, symbols, out=out, softmax_scale=scale, backend=backend)
    assert got is out
    exact = torch_attention(q.double(), k.double(), v.double(), pairs, scale)
    exact = exact.masked_fill(~pairs.any(-1).mT[..., None], 0.0)  # a row without keys is zero
    plain = torch_attention(q, k, v, pairs, scale).double().nan_to_num(0.0)
    plain = plain.masked_fill(~pairs.any(-1).mT[..., None], 0.0)
    if rows.any():
        # Scores near 10 are rounded in fp32 by everybody; torch may hit the exact value by luck.
        floor = 8 * torch.finfo(torch.float32).eps
        limit = 2 * (plain - exact).abs()[rows].max() + floor
        assert (got.double() - exact).abs()[rows].max() <= limit
    untouched = got[~rows]
    assert (untouched.isnan() if out_value != out_value else untouched == out_value).all()


@when_interpreted(pytest.mark.covering(1))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(backend, dtype, shape):
    """Random symbols at three densities, out poisoned with 7 and with NaN."""
    for density in (0.15, 0.6, 1.0):
        grid = Grid(shape[1], shape[2])
        symbols = random_symbols(grid, shape[0], shape[3], 0.7, density)
        check(backend, shape, symbols, dtype)
        check(backend, shape, symbols, dtype, out_value=float("nan"))


@pytest.mark.parametrize("backend", BACKENDS)
@examples(40)
@given(data=st.data())
def test_properties(backend, data):
    """Random shapes, blocks, GQA ratios, valid lengths, densities and scales."""
    heads, ratio = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    seqlen_q, seqlen_kv = (data.draw(st.integers(1, 400)) for _ in range(2))
    batch, head_dim = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([16, 64, 80]))
    block_m, block_n = (data.draw(st.sampled_from([16, 64, 128])) for _ in range(2))
    kv_len = None
    if data.draw(st.booleans()):
        lengths = data.draw(st.lists(st.integers(0, seqlen_kv), min_size=batch, max_size=batch))
        kv_len = torch.tensor(lengths, dtype=torch.int32)
    grid = Grid(seqlen_q, seqlen_kv, block_m=block_m, block_n=block_n, kv_len=kv_len)
    density = data.draw(st.sampled_from([0.05, 0.3, 0.95]))
    symbols = random_symbols(grid, batch, heads * ratio, 0.6, density)
    shape = (batch, seqlen_q, seqlen_kv, heads * ratio, heads, head_dim)
    scale = data.draw(st.sampled_from([None, 0.3]))
    check(backend, shape, symbols, torch.float32, scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_more_than_one_word(backend):
    """81 key blocks: three words of bits a row, the last partly used."""
    grid = Grid(40, 1290, block_m=16, block_n=16)
    check(backend, (1, 40, 1290, 2, 1, 32), random_symbols(grid, 1, 2, 1.0, 0.5), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_and_empty_rows(backend):
    """lse is the natural log of the softmax sum; a row without keys is 0 and -inf."""
    device = device_for(backend)
    kv_len = torch.tensor([300, 0], dtype=torch.int32)
    grid = Grid(200, 300, block_m=64, block_n=64, kv_len=kv_len)
    symbols = random_symbols(grid, 2, 2).to(device)
    q, k, v = tensors((2, 200, 300, 2, 2, 32), torch.float32, device)
    lse = torch.full((2, 2, 200), 5.0, device=device)
    out = torch.full_like(q, 7.0)
    with refusal_skips():
        sparse_attention(q, k, v, symbols, lse=lse, out=out, backend=backend)
    rows, pairs = token_masks(symbols)
    score = torch.einsum("bmhd,bnhd->bhmn", q, k) * 32**-0.5
    expected = score.masked_fill(~pairs, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, torch.where(rows, expected, 5.0), atol=1e-4, rtol=1e-4)
    assert (lse[1][rows[1]] == -torch.inf).all()
    assert (out[1][rows[1].T] == 0).all() and (out[1][~rows[1].T] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_shared_symbols(backend):
    """q, k, v as slices of one fused tensor; symbols shared by batch and heads with stride 0."""
    device = device_for(backend)
    fused = torch.randn(2, 260, 3, 4, 32, device=device)
    q, k, v = fused.unbind(2)
    grid = Grid(260, 260, block_m=64, block_n=64)
    shared = random_symbols(grid, 1, 1).expand(2, 4)
    copied = Symbols(shared.q_bits.contiguous(), shared.kv_bits.contiguous(), grid)
    with refusal_skips():
        out = [
            sparse_attention(*inputs, symbols.to(device), out=torch.zeros_like(q), backend=backend)
            for inputs, symbols in (
                ((q, k, v), shared),
                ((q.contiguous(), k.contiguous(), v.contiguous()), copied),
            )
        ]
    torch.testing.assert_close(*out, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_symbols_it_is_dense(backend, scale):
    """None computes everything; kv_len and the scale still count."""
    device = device_for(backend)
    q, k, v = tensors((2, 130, 200, 4, 2, 64), torch.float32, device)
    kv_len = torch.tensor([200, 77], dtype=torch.int32, device=device)
    with refusal_skips():
        got = sparse_attention(q, k, v, kv_len=kv_len, softmax_scale=scale, backend=backend)
    valid = torch.arange(200, device=device) < kv_len[:, None, None, None]
    expected = torch_attention(q, k, v, valid.expand(2, 4, 130, 200), scale)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiles_without_graph_breaks_and_passes_opcheck():
    """One opaque node in the graph; schema, fake and functionalisation are right."""
    q, k, v = tensors((1, 130, 130, 2, 2, 32), torch.float32, "cpu")
    symbols = random_symbols(Grid(130, 130, block_m=64, block_n=64), 1, 2)
    out = torch.zeros_like(q)

    def run(q, k, v, out):
        return sparse_attention(q * 2, k, v, symbols, out=out.clone()) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, out), run(q, k, v, out))
    call = AttentionCall(q, k, v, out, None, symbols, None, 0.1)
    arguments = dispatch.arguments("attention", call)
    torch.library.opcheck(torch.ops.flashomni.attention.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 200, 2, 64).double()}, "q must be float32 or float16 or bfloat16"),
        ({"q": torch.zeros(200, 2, 64)}, r"q must be \[B, M, H, D\]"),
        ({"k": torch.zeros(1, 330, 2, 32)}, r"k must be \[1, N, Hkv, 64\]"),
        ({"k": torch.zeros(1, 330, 3, 64)}, "number of heads that divides 2, got 3"),
        ({"v": torch.zeros(1, 320, 2, 64)}, r"v must be \[1, 330, 2, 64\]"),
        ({"v": torch.zeros(1, 330, 2, 64).half()}, "v must be float32, got float16"),
        ({"symbols": Symbols.dense(Grid(200, 300), 1, 2)}, "k has 330 tokens"),
        ({"symbols": Symbols.dense(Grid(200, 330), 1, 4)}, "batch 1 and 4 heads"),
        ({"out": torch.zeros(1, 200, 2, 32)}, r"out must be \[1, 200, 2, 64\]"),
        ({"out": torch.zeros(1, 200, 2, 64, device="meta")}, "out must be on cpu, got meta"),
        ({"lse": torch.zeros(1, 200, 2)}, r"lse must be \[1, 2, 200\]"),
        ({"kv_len": torch.zeros(1)}, "kv_len must be int32"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be finite, got nan"),
        ({"backend": "abacus"}, "backend must be one of .*reference.* got 'abacus'"),
    ],
)
def test_refusals_name_the_argument(change, message):
    """What was given and what is allowed."""
    q, k, v = tensors((1, 200, 330, 2, 2, 64), torch.float32, "cpu")
    call = {"q": q, "k": k, "v": v, "symbols": Symbols.dense(Grid(200, 330), 1, 2), **change}
    with pytest.raises(ValueError, match=message):
        sparse_attention(**call)


def test_if_nobody_accepts_every_reason_is_given(monkeypatch):
    """And an explicit backend never falls back to another."""
    for name, kept in (("_registry", dict(dispatch._registry)), ("_sorted", {}), ("_usable", {})):
        monkeypatch.setattr(dispatch, name, kept)
    dispatch.register("attention", "picky", rank=99, refuses=lambda call: ["it is Friday"])(print)
    dispatch.register("attention", "absent", rank=98, available=lambda: ["no such card"])(print)
    q, k, v = tensors((1, 20, 20, 1, 1, 32), torch.float32, "cpu")
    for name, why in (("picky", "it is Friday"), ("absent", "no such card")):
        with pytest.raises(NotImplementedError, match=f"{name}: {why}"):
            sparse_attention(q, k, v, backend=name)
    assert sparse_attention(q, k, v).isfinite().all()  # the next best accepts
    assert "absent" not in backends("attention") and "picky" in backends("attention")
    for name in set(backends("attention")) - {"picky"}:
        monkeypatch.delitem(dispatch._registry, ("attention", name))
    dispatch.forget_choices()
    with pytest.raises(NotImplementedError) as error:
        sparse_attention(q, k, v)
    for word in ("sparse_attention", "picky: it is Friday", "absent: no such card"):
        assert word in str(error.value)
