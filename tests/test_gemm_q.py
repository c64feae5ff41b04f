"""sparse_gemm_q: each backend against the definition; dead tiles stay untouched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import device_for, random_symbols
from flashomni.kernels import backends, sparse_gemm_q
from flashomni.symbols import Grid, Symbols

BACKENDS = backends("gemm_q")


def problem(batch, rows, offset, tail, heads, head_dim, features, block_m, dtype, device):
    """A stream of ``rows`` tokens inside a longer sequence, its weights and symbols."""
    seqlen = offset + rows + tail
    symbols = random_symbols(Grid(seqlen, seqlen, block_m=block_m), batch, heads, 0.5).to(device)
    x = torch.randn(batch, rows, features, dtype=dtype, device=device)
    weight = torch.randn(heads * head_dim, features, dtype=dtype, device=device)
    bias = torch.randn(heads * head_dim, dtype=dtype, device=device)
    return symbols, x, weight / features**0.5, bias


def definition(x, weight, bias, heads, norm, rope):
    """Plain torch in the dtype of its inputs."""
    q = torch.nn.functional.linear(x, weight, bias).unflatten(-1, (heads, -1))
    if norm is not None:
        q = torch.nn.functional.rms_norm(q, q.shape[-1:], norm.to(q.dtype), 1e-6)
    if rope is not None:
        cos, sin = (table.to(q.dtype)[:, None] for table in rope)
        turned = torch.stack((-q[..., 1::2], q[..., ::2]), dim=-1).flatten(-2)
        q = q * cos + turned * sin
    return q


def check(backend, symbols, x, weight, bias, offset, norm, rope, out_value=7.0):
    heads, rows = symbols.num_heads, x.shape[1]
    out = x.new_full((x.shape[0], rows, heads, weight.shape[0] // heads), out_value)
    options = {"row_offset": offset, "rope": rope}
    if norm is not None:
        options |= {"norm_weight": norm, "norm_eps": 1e-6}
    got = sparse_gemm_q(x, weight, bias, symbols, out=out, backend=backend, **options)
    assert got is out
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    exact = definition(*wide, heads, norm, rope)
    plain = definition(x, weight, bias, heads, norm, rope).double()
    per_token = symbols.q_mask().repeat_interleave(symbols.grid.block_m, -1)
    live = per_token[..., offset : offset + rows].mT[..., None].expand_as(got)
    floor = 8 * torch.finfo(torch.float32).eps  # torch may hit the exact value by luck
    if live.any():
        limit = 2 * (plain - exact).abs()[live].max() + floor
        assert (got.double() - exact).abs()[live].max() <= limit
    dead = got[~live]
    assert (dead.isnan() if out_value != out_value else dead == out_value).all()


def rope_of(rows, head_dim, device):
    angle = torch.rand(rows, head_dim // 2, device=device) * 6
    return angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 330])
def test_matches_the_definition(backend, dtype, rows):
    """Norm and RoPE each on and off, bias or none, out poisoned with 7 and with NaN."""
    device = device_for(backend)
    symbols, x, weight, bias = problem(2, rows, 77, 20, 3, 64, 96, 128, dtype, device)
    norm, rope = torch.rand(64, dtype=dtype, device=device) + 0.5, rope_of(rows, 64, device)
    check(backend, symbols, x, weight, bias, 77, norm, rope)
    check(backend, symbols, x, weight, None, 77, norm, None, float("nan"))
    check(backend, symbols, x, weight, bias, 77, None, rope)
    check(backend, symbols, x, weight, bias, 77, None, None)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(data=st.data())
def test_properties(backend, data):
    """Random stream positions (not multiples of the block), sizes, heads, blocks."""
    rows, offset, tail = (data.draw(st.integers(low, 300)) for low in (1, 0, 0))
    heads, batch = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    head_dim, block = data.draw(st.sampled_from([16, 72])), data.draw(st.sampled_from([16, 128]))
    device = device_for(backend)
    problem_ = problem(batch, rows, offset, tail, heads, head_dim, 40, block, torch.float32, device)
    check(backend, *problem_, offset, None, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_weight_and_shared_symbols(backend):
    """Rows of a fused QKV weight; symbols with stride 0 over batch and heads."""
    device = device_for(backend)
    fused = torch.randn(3 * 64, 2 * 40, device=device)[:, ::2]  # rows strided, columns too
    fused = torch.randn(3 * 64, 80, device=device)[:, :40]
    x = torch.randn(2, 150, 40, device=device)
    symbols = random_symbols(Grid(150, 150, block_m=32), 1, 1, 0.5).expand(2, 4).to(device)
    check(backend, symbols, x, fused[64:128], None, 0, None, None)


def test_compiles_without_graph_breaks_and_passes_opcheck():
    """One opaque node in the graph; schema, fake and functionalisation are right."""
    symbols, x, weight, bias = problem(1, 90, 10, 0, 2, 16, 24, 32, torch.float32, "cpu")
    out = torch.zeros(1, 90, 2, 16)

    def run(x):
        return sparse_gemm_q(x * 2, weight, bias, symbols, row_offset=10, out=out.clone()) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))
    bits = (symbols.q_bits, symbols.kv_bits, 100, 100, 32, 128, 10)
    arguments = (x, weight, bias, out, *bits, None, None, None, None, None)
    torch.library.opcheck(torch.ops.flashomni.gemm_q.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 90, 24).double()}, "x must be float32 or float16 or bfloat16"),
        ({"x": torch.zeros(90, 24)}, r"x must be \[B, R, K\]"),
        ({"weight": torch.zeros(33, 24)}, r"weight must be \[2 \* D, 24\]"),
        ({"weight": torch.zeros(32, 24).half()}, "weight must be float32, got float16"),
        ({"bias": torch.zeros(31)}, r"bias must be \[32\]"),
        ({"row_offset": 11}, "from row_offset=11 on do not fit in the 100 query tokens"),
        ({"row_offset": -1}, "do not fit"),
        ({"symbols": Symbols.dense(Grid(100, 100), 3, 2)}, "symbols are for batch 3"),
        ({"norm_weight": torch.ones(16)}, "norm_weight needs norm_eps"),
        ({"rope": (torch.zeros(90, 16), torch.zeros(80, 16))}, r"rope sin must be \[90, 16\]"),
        ({"rope": (torch.zeros(90, 16).half(),) * 2}, "rope cos must be float32"),
        ({"out": torch.zeros(1, 90, 32)}, r"out must be \[1, 90, 2, 16\]"),
        ({"backend": "abacus"}, "backend must be one of .*reference"),
    ],
)
def test_refusals_name_the_argument(change, message):
    """What was given and what is allowed."""
    call = {
        "x": torch.zeros(1, 90, 24),
        "weight": torch.zeros(32, 24),
        "bias": None,
        "symbols": Symbols.dense(Grid(100, 100), 1, 2),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        sparse_gemm_q(**call)
