"""The forecast of sparse_attention: what cached rows get, by each backend; live rows untouched."""

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
from flashomni.kernels import ForecastTerms, backends, sparse_attention
from flashomni.kernels.attention.op import AttentionCall
from flashomni.symbols import Grid, Symbols

BACKENDS = with_gpu_marks(backends("attention"))
POISON = 7.0


def takes(backend):
    """``(dtype, block_m ...)`` where a test needs one dtype only."""
    if backend == "sm90":
        return torch.bfloat16, [128]
    return torch.float32, [16, 48, 64, 128]


# (batch, seqlen_q, seqlen_kv, heads, key heads, head_dim, block_m): ragged, GQA, padded head_dim
SHAPES = [
    (1, 128, 128, 1, 1, 64, 128),
    (2, 300, 200, 4, 2, 64, 128),
    (1, 515, 130, 2, 2, 128, 128),
    (2, 200, 330, 2, 1, 64, 64),
    (1, 260, 90, 2, 2, 72, 128),
    (1, 130, 70, 2, 1, 32, 48),
]


def inputs(shape, dtype, device):
    batch, seqlen_q, seqlen_kv, heads, kv_heads, head_dim, _ = shape
    q = torch.randn(batch, seqlen_q, heads, head_dim, device=device).to(dtype)
    k, v = torch.randn(2, batch, seqlen_kv, kv_heads, head_dim, device=device).to(dtype)
    return q, k, v


def make_forecast(q, span, count, dtype, layout="own"):
    """Terms of ``count`` tensors over the rows of ``span``, and more coefficients than terms."""
    batch, _, heads, head_dim = q.shape
    shape = (batch, span[1] - span[0], heads, head_dim)
    if layout == "heads first":
        shape = (shape[0], shape[2], shape[1], shape[3])
    if layout == "wide":
        shape = (*shape[:3], 2 * head_dim)
    if layout == "dim first":
        shape = (shape[3], *shape[:3])
    terms = [torch.randn(shape, device=q.device).to(dtype) for _ in range(count)]
    view = {
        "own": lambda x: x,
        "heads first": lambda x: x.transpose(1, 2),
        "wide": lambda x: x[..., ::2],
        "dim first": lambda x: x.movedim(0, -1),
    }[layout]
    coefficients = torch.randn(count + 2, device=q.device)
    coefficients[count:] = float("nan")  # never read
    return ForecastTerms([view(term) for term in terms], coefficients, span[0])


def check_covered(got, forecast, cached):
    """The sum in fp32, rounded once to the dtype of ``got``, where ``cached`` ``[B, R, H]``."""
    products = [
        weight * term.double()
        for weight, term in zip(forecast.coefficients.double(), forecast.terms, strict=False)
    ]
    exact, size = sum(products), sum(product.abs() for product in products)
    once = torch.finfo(got.dtype).eps / 2 * exact.abs() + torch.finfo(got.dtype).tiny
    limit = 1.01 * once + 4 * torch.finfo(torch.float32).eps * size
    error = (got.double() - exact).abs()
    assert (error <= limit)[cached].all()


def check(backend, shape, symbols, forecast_of, dtype):
    """Covered rows are forecast, other cached rows poisoned as before, live rows as without."""
    device = device_for(backend)
    q, k, v = inputs(shape, dtype, device)
    symbols, forecast = symbols.to(device), forecast_of(q)
    live = token_masks(symbols)[0].mT  # [B, M, H]
    lse = torch.full(live.mT.shape, POISON, device=device)
    out, plain = torch.full_like(q, POISON), torch.full_like(q, POISON)
    with refusal_skips():
        sparse_attention(q, k, v, symbols, out=plain, backend=backend)
        got = sparse_attention(
            q, k, v, symbols, out=out, lse=lse, forecast=forecast, backend=backend
        )
        again = sparse_attention(
            q, k, v, symbols, out=torch.full_like(q, float("nan")), forecast=forecast,
            backend=backend,
        )  # fmt: skip
    assert got is out
    assert (lse[~live.mT] == POISON).all()
    start, rows = forecast.row_offset, forecast.terms[0].shape[1]
    covered = torch.zeros_like(live)
    covered[:, start : start + rows] = True
    assert torch.equal(again[live], plain[live])  # lse may change the path of a backend
    assert torch.equal(again[~live & covered], out[~live & covered])
    assert (out[~live & ~covered] == POISON).all() and again[~live & ~covered].isnan().all()
    check_covered(out[:, start : start + rows], forecast, ~live[:, start : start + rows])


@when_interpreted(pytest.mark.covering(1))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cached_rows_get_the_sum_rounded_once(backend, dtype, shape):
    """One to three terms in the dtype of q and in fp32, over all rows and over some of them."""
    batch, seqlen_q, seqlen_kv, heads, _, _, block_m = shape
    grid = Grid(seqlen_q, seqlen_kv, block_m=block_m)
    symbols = random_symbols(grid, batch, heads, 0.5, 0.5)
    for count, kept, span in (
        (1, dtype, (0, seqlen_q)),
        (2, torch.float32, (seqlen_q // 3, seqlen_q)),
        (3, dtype, (1, seqlen_q - 1)),
    ):
        check(backend, shape, symbols, lambda q: make_forecast(q, span, count, kept), dtype)  # noqa: B023


@pytest.mark.parametrize("backend", BACKENDS)
@examples(15)
@given(data=st.data())
def test_properties(backend, data):
    """Random shapes, spans (empty ones too), strides, dtypes of terms and shared symbols."""
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    seqlen_q, seqlen_kv = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 200))
    dtype, blocks = takes(backend)
    head_dim = data.draw(st.sampled_from([16, 64, 80]))
    block_m = data.draw(st.sampled_from(blocks))
    start = data.draw(st.integers(0, seqlen_q))
    span = (start, data.draw(st.integers(start, seqlen_q)))
    layout = data.draw(st.sampled_from(["own", "heads first", "wide", "dim first"]))
    kept = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    grid = Grid(seqlen_q, seqlen_kv, block_m=block_m)
    density = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    if data.draw(st.booleans()):
        symbols = random_symbols(grid, 1, 1, density).expand(batch, heads)
    else:
        symbols = random_symbols(grid, batch, heads, density)
    count = data.draw(st.integers(1, 4))
    shape = (batch, seqlen_q, seqlen_kv, heads, heads, head_dim, block_m)
    check(backend, shape, symbols, lambda q: make_forecast(q, span, count, kept, layout), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_of_several_dtypes_and_strides(backend):
    """Each term has its own."""
    dtype, blocks = takes(backend)
    shape = (2, 300, 90, 2, 2, 64, blocks[-1])

    def mixed(q):
        parts = [
            make_forecast(q, (30, 290), 1, kept, layout)
            for kept, layout in (
                (torch.float32, "own"),
                (torch.float16, "wide"),
                (torch.bfloat16, "heads first"),
            )
        ]
        coefficients = torch.tensor([1.0, -0.5, 0.25], device=q.device)
        return ForecastTerms(tuple(part.terms[0] for part in parts), coefficients, 30)

    symbols = random_symbols(Grid(300, 90, block_m=blocks[-1]), 2, 2, 0.4)
    check(backend, shape, symbols, mixed, dtype)


def test_compiles_without_graph_breaks_and_passes_opcheck():
    """One opaque node; its schema takes a list of terms."""
    q, k, v = inputs((1, 130, 130, 2, 2, 32, 64), torch.float32, "cpu")
    symbols = random_symbols(Grid(130, 130, block_m=64, block_n=64), 1, 2, 0.3)
    terms = list(make_forecast(q, (10, 130), 2, torch.bfloat16).terms)
    coefficients = torch.tensor([1.0, 0.5])

    def run(q, out, terms, coefficients):
        forecast = ForecastTerms(terms, coefficients * 2, 10)
        return sparse_attention(q, k, v, symbols, out=out.clone(), forecast=forecast) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    arguments = (q, torch.zeros_like(q), terms, coefficients)
    torch.testing.assert_close(compiled(*arguments), run(*arguments))
    forecast = ForecastTerms(terms, coefficients, 10)
    call = AttentionCall(q, k, v, torch.zeros_like(q), None, symbols, None, 0.1, forecast)
    torch.library.opcheck(
        torch.ops.flashomni.attention.default, dispatch.arguments("attention", call)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
def test_never_synchronises_and_replays_in_a_cuda_graph(backend):
    """A replay reads the symbols, terms and coefficients that are there then."""
    if backend in ("cpu", "reference"):
        pytest.skip(f"{backend} is not for a GPU")
    q, k, v = inputs((1, 1000, 1000, 2, 2, 128, 128), torch.bfloat16, "cuda")
    grid = Grid(1000, 1000)
    symbols, out = random_symbols(grid, 1, 2, 0.5).to("cuda"), torch.full_like(q, POISON)
    forecast = make_forecast(q, (100, 1000), 2, torch.bfloat16)

    def run(out):
        return sparse_attention(q, k, v, symbols, out=out, forecast=forecast, backend=backend)

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
    for density in (0.2, 0.8):
        other = random_symbols(grid, 1, 2, density)
        symbols.q_bits.copy_(other.q_bits)
        symbols.kv_bits.copy_(other.kv_bits)
        forecast.coefficients.mul_(-0.5)
        for term in forecast.terms:
            term.add_(1.0)
        expected = run(torch.full_like(q, POISON))
        out.fill_(POISON)
        graph.replay()
        assert torch.equal(out, expected)


TERM = torch.zeros(1, 100, 2, 64)


@pytest.mark.parametrize(
    ("forecast", "message"),
    [
        (ForecastTerms([], torch.ones(1)), "terms must hold at least one tensor, got none"),
        (
            ForecastTerms([TERM, TERM[:, 1:]], torch.ones(2)),
            r"terms\[1\] must be \[1, 100, 2, 64\], got \[1, 99, 2, 64\]",
        ),
        (ForecastTerms([TERM[..., :32]], torch.ones(1)), r"terms\[0\] must be \[1, 100, 2, 64\]"),
        (ForecastTerms([TERM[0]], torch.ones(1)), r"terms\[0\] must be .* got \[100, 2, 64\]"),
        (ForecastTerms([TERM.double()], torch.ones(1)), r"terms\[0\] must be float32 or .*float64"),
        (ForecastTerms([TERM.to("meta")], torch.ones(1)), r"terms\[0\] must be on cpu, got meta"),
        (
            ForecastTerms([TERM], torch.ones(1), 101),
            "100 rows, which from row_offset=101 on .* 200",
        ),
        (ForecastTerms([TERM], torch.ones(1), -1), "row_offset=-1"),
        (ForecastTerms([TERM, TERM], torch.ones(1)), r"coefficients must be \[T\], T at least 2"),
        (ForecastTerms([TERM], torch.ones(1, 1)), r"coefficients must be \[T\]"),
        (ForecastTerms([TERM], torch.ones(1).half()), "coefficients must be float32, got float16"),
        (
            ForecastTerms([TERM], torch.ones(1, device="meta")),
            "coefficients must be on cpu, got meta",
        ),
    ],
)
def test_refusals_name_the_argument(forecast, message):
    """What was given and what is allowed."""
    q, k, v = inputs((1, 200, 90, 2, 2, 64, 128), torch.float32, "cpu")
    symbols = Symbols.dense(Grid(200, 90), 1, 2)
    with pytest.raises(ValueError, match=message):
        sparse_attention(q, k, v, symbols, forecast=forecast)


def test_a_forecast_needs_symbols():
    """Without them no tile is cached."""
    q, k, v = inputs((1, 200, 90, 2, 2, 64, 128), torch.float32, "cpu")
    with pytest.raises(ValueError, match="forecast needs symbols"):
        sparse_attention(q, k, v, forecast=ForecastTerms([TERM], torch.ones(1)))
