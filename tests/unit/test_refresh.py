"""Sparse attention and what dense attention has more, in one call."""

from dataclasses import replace

import pytest
import torch

from conftest import device_for, random_symbols, refusal_skips, with_gpu_marks
from flashomni.kernels import Summary, backends, refresh, sparse_attention, summarise
from flashomni.kernels.refresh.op import live_and_rest
from flashomni.symbols import Grid

BACKENDS = with_gpu_marks([*backends("refresh"), "cpu"])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (batch, seqlen_q, seqlen_kv, heads, key heads, head_dim, block_n, r)
SHAPES = [
    (1, 1, 1, 1, 1, 64, 128, 1),
    (2, 130, 130, 4, 2, 72, 64, 4),
    (1, 300, 1290, 2, 1, 128, 128, 16),
    (2, 257, 260, 2, 2, 128, 128, 0),
    (1, 130, 4300, 1, 1, 64, 128, 4),  # more blocks than a word has bits
]


def given(shape, dtype, device, kv_len=None, kv_density=0.4):
    """``(q, k, v, symbols, summary)``."""
    batch, seqlen_q, seqlen_kv, heads, kv_heads, head_dim, block_n, per_block = shape
    q = torch.randn(batch, seqlen_q, heads, head_dim, device=device).to(dtype)
    k, v = torch.randn(2, batch, seqlen_kv, kv_heads, head_dim, device=device).to(dtype)
    kv_len = None if kv_len is None else torch.tensor(kv_len, dtype=torch.int32, device=device)
    grid = Grid(seqlen_q, seqlen_kv, block_n=block_n, kv_len=kv_len)
    # S_c says nothing here.
    symbols = random_symbols(grid, batch, heads, 0.5, kv_density).to(device)
    summary = summarise(k, v, symbols.grid, per_block, backend="reference") if per_block else None
    return q, k, v, symbols, summary


def exact(q, k, v, symbols, summary):
    """Sparse and dense attention of every tile, fp32."""
    q, k, v = (x.float() for x in (q, k, v))
    if summary is not None:
        summary = Summary(summary.k.float(), summary.v.float(), summary.log_n)
    live, _ = live_and_rest(symbols)
    kv_len = symbols.grid.kv_len
    sparse = sparse_attention(q, k, v, live, summary=summary, backend="reference")
    return sparse, sparse_attention(q, k, v, kv_len=kv_len, backend="reference")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_are_what_they_say(backend, shape, dtype):
    """Ragged ends, rows without a block, batch items without a key; both add up to dense."""
    device = device_for(backend)
    kv_len = [max(1, shape[2] - 70), 0][: shape[0]]
    q, k, v, symbols, summary = given(shape, dtype, device, kv_len)
    mass = torch.full((*q.shape[:1], q.shape[2], q.shape[1]), torch.nan, device=device)
    with refusal_skips():
        out, difference = refresh(q, k, v, symbols, summary=summary, backend=backend)
        refresh(q, k, v, symbols, summary=summary, mass=mass, backend=backend)
    assert ((mass >= 0) & (mass <= 1.0 + 1e-5)).all()
    sparse, dense = exact(q, k, v, symbols, summary)
    limit = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.float(), sparse, atol=limit, rtol=limit)
    torch.testing.assert_close(difference.float(), dense - sparse, atol=limit, rtol=limit)
    together = out.float() + difference.float()
    torch.testing.assert_close(together, dense, atol=limit, rtol=limit)


@pytest.mark.parametrize("kv_density", [0.0, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_skipped_and_nothing_visited(backend, kv_density):
    """Without skipped blocks D is zero to the bit; without others it is dense attention."""
    device = device_for(backend)
    shape = (1, 200, 330, 2, 2, 64, 128, 0)
    q, k, v, symbols, _ = given(shape, torch.bfloat16, device, kv_density=kv_density)
    if not kv_density:
        symbols = replace(symbols, kv_bits=torch.zeros_like(symbols.kv_bits))
    with refusal_skips():
        out, difference = refresh(q, k, v, symbols, backend=backend)
    dense = sparse_attention(q, k, v, backend="reference")
    if kv_density:
        assert not difference.any()
        torch.testing.assert_close(out, dense, atol=3e-2, rtol=3e-2)
    else:
        assert not out.any()
        torch.testing.assert_close(difference, dense, atol=3e-2, rtol=3e-2)


def test_wrong_arguments_are_named():
    q, k, v, symbols, summary = given(SHAPES[1], torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"symbols must be for q"):
        refresh(q[:, :1], k, v, symbols)
    with pytest.raises(ValueError, match=r"heads that divides 4"):
        refresh(q, k.repeat(1, 1, 2, 1)[:, :, :3], v, symbols)
    with pytest.raises(ValueError, match=r"v must be float32"):
        refresh(q, k, v.half(), symbols)
    with pytest.raises(ValueError, match="must be a Summary"):
        refresh(q, k, v, symbols, summary=summary.k)


def test_compiles_without_graph_breaks():
    """One node, summaries and symbols in it."""
    q, k, v, symbols, summary = given(SHAPES[1], torch.float32, "cpu")

    def run(q, k, v):
        return refresh(q, k, v, symbols, summary=summary)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v), atol=0, rtol=0)
