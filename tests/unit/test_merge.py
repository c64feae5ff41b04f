"""What dense attention has more than sparse attention, of parts that together are both."""

import pytest
import torch

from conftest import device_for, random_symbols, refusal_skips, with_gpu_marks
from flashomni.engine.state.columns import Columns
from flashomni.kernels import Part, backends, difference_, sparse_attention, summarise
from flashomni.symbols import Grid

BACKENDS = with_gpu_marks(backends("difference"))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (batch, seqlen, heads, key heads, head_dim, block, r)
SHAPES = [
    (1, 1, 1, 1, 64, 128, 1),
    (2, 130, 4, 2, 72, 64, 4),
    (1, 300, 2, 1, 16, 16, 16),
    (2, 257, 2, 2, 128, 128, 4),
    (2, 200, 3, 3, 80, 32, 0),
]


def given(shape, dtype, kv_len=None, kv_density=0.5):
    """``(q, k, v, symbols, summary)`` on the CPU."""
    batch, seqlen, heads, kv_heads, head_dim, block, per_block = shape
    q = torch.randn(batch, seqlen, heads, head_dim).to(dtype)
    k, v = torch.randn(2, batch, seqlen, kv_heads, head_dim).to(dtype)
    grid = Grid(seqlen, seqlen, block_m=block, block_n=block, kv_len=kv_len)
    symbols = Columns.of(random_symbols(grid, batch, heads, 1.0, kv_density), False).symbols
    return q, k, v, symbols, summarise(k, v, grid, per_block) if per_block else None


def parts(q, k, v, symbols):
    """Over the visited blocks and over the others, by the definition."""
    found = []
    for each in (symbols, Columns.of(symbols, False).rest()):
        o, lse = q.new_empty(q.shape), q.new_empty(*q.shape[:1], q.shape[2], q.shape[1]).float()
        sparse_attention(q, k, v, each, out=o, lse=lse, backend="reference")
        found.append(Part(o, lse))
    return found


def moved(value, device):
    if value is None or isinstance(value, torch.Tensor):
        return None if value is None else value.to(device)
    return type(value)(*(moved(getattr(value, name), device) for name in vars(value)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_and_what_dense_has_more(backend, shape, dtype):
    """Against attention over each union of keys; ragged ends and rows without keys among them."""
    kv_len = torch.tensor([shape[1], 0][: shape[0]], dtype=torch.int32)
    q, k, v, symbols, summary = given(shape, dtype, kv_len)
    wide = [x.float() for x in (q, k, v)]
    more = None if summary is None else moved(summary, "cpu")
    if more is not None:
        more = type(more)(more.k.float(), more.v.float(), more.log_n)
    dense = sparse_attention(*wide, kv_len=kv_len, backend="reference")
    sparse = sparse_attention(*wide, symbols, summary=more, backend="reference")
    device = device_for(backend)
    live, rest = (moved(part, device) for part in parts(q, k, v, symbols))
    options = {}
    if summary is not None:
        options = {"q": q.to(device), "symbols": symbols.to(device)}
        options["summary"] = moved(summary, device)
    with refusal_skips():
        difference_(live, rest, **options, backend=backend)
    # Of parts that were rounded once, and rounded again.
    limit = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(live.o.cpu().float(), sparse, atol=limit, rtol=limit)
    torch.testing.assert_close(rest.o.cpu().float(), dense - sparse, atol=limit, rtol=limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_without_keys_has_no_weight(backend):
    """All blocks visited: D is zero to the bit, whatever lies in the rest; and the other way."""
    q, k, v, symbols, summary = given((2, 130, 2, 2, 64, 64, 4), torch.float32, kv_density=1.0)
    device = device_for(backend)
    live, rest = (moved(part, device) for part in parts(q, k, v, symbols))
    before = live.o.clone()
    rest.o.fill_(torch.nan)
    more = {"q": q.to(device), "symbols": symbols.to(device), "summary": moved(summary, device)}
    with refusal_skips():
        difference_(live, rest, **more, backend=backend)
    assert torch.equal(live.o, before) and not rest.o.any()
    nothing = Part(torch.full_like(before, torch.nan), torch.full_like(live.lse, -torch.inf))
    rest = Part(before.clone(), live.lse.clone())
    with refusal_skips():
        difference_(nothing, rest, backend=backend)
    assert torch.equal(rest.o, before) and not nothing.o.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_apart(backend):
    """Scores in the thousands of either sign: weights are relative to the largest."""
    q, k, v, symbols, _ = given((1, 130, 2, 2, 32, 32, 0), torch.float32)
    device = device_for(backend)
    for shift in (-3e3, 3e3):
        live, rest = (moved(part, device) for part in parts(q, k, v, symbols))
        o, other = live.o.clone(), rest.o.clone()
        both = (live.lse > -torch.inf) & (rest.lse > -torch.inf)
        assert both.any()
        with refusal_skips():
            difference_(live, Part(rest.o, rest.lse + shift), backend=backend)
        expected = other - o if shift > 0 else torch.zeros_like(o)
        seen = both.mT[..., None]
        torch.testing.assert_close(rest.o * seen, expected * seen, atol=1e-5, rtol=1e-5)


def test_wrong_arguments_are_named():
    q, k, v, symbols, summary = given((1, 130, 2, 2, 32, 32, 4), torch.float32)
    live, rest = parts(q, k, v, symbols)
    with pytest.raises(ValueError, match=r"rest\.lse must be \[1, 2, 130\]"):
        difference_(live, Part(rest.o, rest.lse[:, :1]))
    with pytest.raises(ValueError, match="a summary needs q and symbols"):
        difference_(live, rest, summary=summary)
    more = {"q": q, "symbols": symbols, "summary": summary}
    with pytest.raises(ValueError, match=r"kv_len must be \[1\], got \[2\]"):
        difference_(live, rest, **more, kv_len=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="kv_len must be int32, got int64"):
        difference_(live, rest, **more, kv_len=torch.zeros(1, dtype=torch.int64))
    for name, value in (("q", q), ("symbols", symbols), ("softmax_scale", 0.1)):
        with pytest.raises(ValueError, match=f"{name} is of summaries, and there is none"):
            difference_(live, rest, **{name: value})
    with pytest.raises(ValueError, match=r"rest\.o must not overlap live\.o"):
        difference_(live, Part(live.o, rest.lse))
    with pytest.raises(ValueError, match="q must be float32"):
        difference_(live, rest, q=q.half(), symbols=symbols, summary=summary)


def test_compiles_without_graph_breaks():
    """One node, summaries and symbols in it."""
    q, k, v, symbols, summary = given((2, 130, 4, 2, 64, 64, 4), torch.float32)
    live, rest = parts(q, k, v, symbols)

    def run(o, lse, other, other_lse):
        mine, others = Part(o.clone(), lse), Part(other.clone(), other_lse)
        difference_(mine, others, q=q, symbols=symbols, summary=summary)
        return mine.o, others.o

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    tensors = live.o, live.lse, rest.o, rest.lse
    torch.testing.assert_close(compiled(*tensors), run(*tensors), atol=0, rtol=0)
