"""sparse_gemm_q: each backend against the definition; dead tiles stay untouched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import device_for, examples, gemm_takes, random_symbols, with_gpu_marks
from flashomni import dispatch
from flashomni.kernels import backends, sparse_gemm_q
from flashomni.kernels.common.rope import pack_rope
from flashomni.kernels.gemm_q.op import GemmQCall
from flashomni.symbols import Grid, Symbols

BACKENDS = with_gpu_marks(backends("gemm_q"))


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
    if dtype not in gemm_takes(backend).dtypes:
        pytest.skip(f"{backend} takes no {dtype}")
    device = device_for(backend)
    symbols, x, weight, bias = problem(2, rows, 77, 20, 3, 64, 96, 128, dtype, device)
    norm, rope = torch.rand(64, dtype=dtype, device=device) + 0.5, rope_of(rows, 64, device)
    check(backend, symbols, x, weight, bias, 77, norm, rope)
    check(backend, symbols, x, weight, None, 77, norm, None, float("nan"))
    check(backend, symbols, x, weight, bias, 77, None, rope)
    check(backend, symbols, x, weight, bias, 77, None, None)


@pytest.mark.parametrize("backend", BACKENDS)
@examples(40)
@given(data=st.data())
def test_properties(backend, data):
    """Random stream positions (not multiples of the block), sizes, heads, blocks."""
    rows, offset, tail = (data.draw(st.integers(low, 300)) for low in (1, 0, 0))
    heads, batch = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    takes, device = gemm_takes(backend), device_for(backend)
    head_dim = data.draw(st.sampled_from(takes.head_dims))
    block, dtype = data.draw(st.sampled_from(takes.block_m)), takes.dtypes[0]
    problem_ = problem(batch, rows, offset, tail, heads, head_dim, 40, block, dtype, device)
    check(backend, *problem_, offset, None, None)


def turned_by_hand(q, angle, layout):
    """Pair by pair: a rotation in the plane of its two dims."""
    half = q.shape[-1] // 2
    for j in range(half):
        a, b = (2 * j, 2 * j + 1) if layout == "interleaved" else (j, j + half)
        c, s = angle[:, j, None].cos(), angle[:, j, None].sin()
        q[..., a], q[..., b] = q[..., a] * c - q[..., b] * s, q[..., b] * c + q[..., a] * s
    return q


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("tables", ["of dims", "of pairs", "packed"])
def test_rope_layouts(backend, layout, tables):
    """Neighbours or halves are pairs; an entry for each dim, each pair, or both in one tensor."""
    device, takes = device_for(backend), gemm_takes(backend)
    dtype, head_dim, rows = takes.dtypes[0], takes.head_dims[-1], 150
    symbols, x, weight, bias = problem(1, rows, 77, 0, 2, head_dim, 64, 128, dtype, device)
    angle = torch.rand(rows, head_dim // 2, device=device) * 6
    if tables == "of pairs":
        rope = angle.cos(), angle.sin()
    elif layout == "interleaved":
        rope = angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)
    else:
        rope = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    if tables == "packed":
        rope = pack_rope(*rope, layout)
        assert torch.equal(rope[0], angle.cos()) and torch.equal(rope[1], angle.sin())
    got = sparse_gemm_q(
        x, weight, bias, symbols, row_offset=77, rope=rope, rope_layout=layout, backend=backend,
        out=x.new_full((1, rows, 2, head_dim), 7.0),
    )  # fmt: skip
    plain = definition(x.double(), weight.double(), bias.double(), 2, None, None)
    exact = turned_by_hand(plain.clone(), angle.double(), layout)
    live = symbols.q_mask().repeat_interleave(128, -1)[..., 77 : 77 + rows].mT[..., None]
    tolerance = 3 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    assert live.any() and (got[~live.expand_as(got)] == 7).all()
    error = ((got.double() - exact).abs() / (1 + exact.abs())).masked_fill(~live, 0.0)
    assert error.max() < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_weight_and_shared_symbols(backend):
    """Rows of a fused QKV weight; symbols with stride 0 over batch and heads."""
    takes = gemm_takes(backend)
    width, block, kind = 4 * takes.head_dims[0], takes.block_m[0], {"device": device_for(backend)}
    kind["dtype"] = takes.dtypes[0]
    fused = torch.randn(3 * width, 80, **kind)[:, :40]
    x = torch.randn(2, 150, 40, **kind)
    symbols = random_symbols(Grid(150, 150, block_m=block), 1, 1, 0.5).expand(2, 4).to(x.device)
    check(backend, symbols, x, fused[width : 2 * width], None, 0, None, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
def test_replays_in_a_cuda_graph_with_other_symbols(backend):
    """Nothing of a call is decided on the host: new bits, same graph."""
    if device_for(backend).type != "cuda":
        pytest.skip(f"{backend} does not run on CUDA here")
    symbols, x, weight, bias = problem(1, 330, 0, 0, 3, 64, 96, 128, torch.float16, "cuda")
    out = x.new_zeros(1, 330, 3, 64)
    sparse_gemm_q(x, weight, bias, symbols, out=out, backend=backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse_gemm_q(x, weight, bias, symbols, out=out, backend=backend)
    for _ in range(3):
        symbols.q_bits.copy_(random_symbols(symbols.grid, 1, 3, 0.5).q_bits)
        expected = sparse_gemm_q(
            x, weight, bias, symbols, out=torch.zeros_like(out), backend=backend
        )
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected) and expected.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("density", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_calls(backend, density):
    """Many pairs; sm90 goes over the heads in two halves where most are computed."""
    if device_for(backend).type != "cuda":
        pytest.skip(f"{backend} does not run on CUDA here")
    rows, offset, heads = 4600, 70, 49
    problem_of = (1, rows, offset, 0, heads, 64, 200, 128, torch.float16, "cuda")
    symbols, x, weight, bias = problem(*problem_of)
    symbols = random_symbols(symbols.grid, 1, heads, density).to("cuda")
    norm, rope = bias.new_ones(64), rope_of(rows, 64, "cuda")
    check(backend, symbols, x, weight, bias, offset, None, None)
    check(backend, symbols, x, weight, bias, offset, norm, rope)
    outs = [
        sparse_gemm_q(
            x, weight, bias, symbols, row_offset=offset, norm_weight=norm, norm_eps=1e-6,
            rope=tables, out=x.new_zeros(1, rows, heads, 64), backend=backend,
        )
        for tables in (rope, pack_rope(*rope))
    ]  # fmt: skip
    torch.testing.assert_close(*outs, atol=2e-3, rtol=2e-3)


def test_compiles_without_graph_breaks_and_passes_opcheck():
    """One opaque node in the graph; schema, fake and functionalisation are right."""
    symbols, x, weight, bias = problem(1, 90, 10, 0, 2, 16, 24, 32, torch.float32, "cpu")
    out = torch.zeros(1, 90, 2, 16)

    def run(x):
        return sparse_gemm_q(x * 2, weight, bias, symbols, row_offset=10, out=out.clone()) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))
    call = GemmQCall(x, weight, bias, out, symbols, 10, None, None, None, "half")
    arguments = dispatch.arguments("gemm_q", call)
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
        ({"rope": (torch.zeros(90, 8), torch.zeros(90, 16))}, r"rope sin must be \[90, 8\]"),
        ({"rope": (torch.zeros(90, 16).half(),) * 2}, "rope cos must be float32"),
        (
            {"rope": (torch.zeros(90, 16),) * 2, "rope_layout": "spiral"},
            "rope_layout must be one of interleaved, half, got 'spiral'",
        ),
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
