"""The authors' two projections on our ops, against torch's linear layer."""

import pytest
import torch
from compat_cases import blocks, close, gpu, int32, numpy_packed
from torch.nn.functional import linear

import flashomni

BACKENDS = ["reference", "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Projection:
    """A stream of tokens inside a longer sequence, heads cached at random."""

    def __init__(
        self, dtype, offset, tail, rows=200, heads=5, k=96, n=80, block=64, batch=2, device="cpu"
    ):
        self.offset, self.rows, self.heads, self.block = offset, rows, heads, block
        self.device = device
        self.A = torch.randn(batch, rows, k, dtype=dtype, device=device)
        self.B = torch.randn(n, k, dtype=dtype, device=device) / k**0.5
        self.bias = torch.randn(n, dtype=dtype, device=device)
        shape = (blocks(offset + rows + tail, block), heads)
        self.masks = [torch.rand(shape) < 0.5 for _ in range(batch)]

    def symbols(self):
        return numpy_packed(self.masks, self.device)

    def live(self):
        """Bool ``[B, M, H]``."""
        per_token = torch.stack(self.masks).to(self.device).repeat_interleave(self.block, 1)
        return per_token[:, self.offset : self.offset + self.rows]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("offset", "tail"), [(0, 0), (128, 0), (0, 90), (77, 20)])
def test_gemm_projects_the_computed_tiles(backend, dtype, offset, tail):
    """Whole sequence, text first, text last, text that ends inside a block; bias or none."""
    problem = Projection(dtype, offset, tail)
    live = problem.live()[..., None].expand(-1, -1, -1, 16).flatten(2)
    for bias in (problem.bias, None):
        arguments = (problem.A, problem.B, problem.heads, *problem.symbols(), offset, bias)
        wide = None if bias is None else bias.double()
        exact = linear(problem.A.double(), problem.B.double(), wide)
        plain = linear(problem.A, problem.B, bias)
        got = flashomni.flashomni_gemm(*arguments, sparse_q_size=64, backend=backend)
        close(got, exact, plain, live)
        assert (got[~live] == 0).all()
        out = torch.full_like(got, float("nan"))
        arguments = (*arguments, out, 64)
        assert flashomni.flashomni_gemm(*arguments, backend=backend) is out
        close(out, exact, plain, live)
        assert out[~live].isnan().all()
        out.fill_(float("nan"))
        flashomni.flashomni_gemm(
            problem.A, problem.B, problem.heads, bias=bias, out=out, is_full=True, backend=backend
        )
        close(out, exact, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("offset", "tail"), [(0, 0), (128, 0), (0, 90), (77, 20)])
def test_gemm_reduction_sums_cached_or_computed_heads(backend, dtype, offset, tail):
    """The linear bias enters with the cached heads; both passes add up to the dense layer."""
    problem = Projection(dtype, offset, tail, k=5 * 24, n=56)
    live = problem.live().repeat_interleave(24, -1)
    A, B = problem.A, problem.B

    def run(A, bias, is_for_cache):
        return flashomni.flashomni_gemm_reduction(
            A,
            B,
            problem.heads,
            *problem.symbols(),
            offset,
            bias,
            is_for_cache,
            64,
            backend=backend,
        )

    def expected(heads, bias, dtype):
        kept = A.to(dtype).masked_fill(~heads, 0.0)
        y = linear(kept, B.to(dtype))
        return y if bias is None else y + bias.to(dtype)

    for bias in (problem.bias, None):
        cached = run(A.masked_fill(live, float("nan")), bias, True)
        close(cached, expected(~live, bias, torch.float64), expected(~live, bias, dtype))
        computed = run(A.masked_fill(~live, float("nan")), cached, False)
        dense = linear(A.double(), B.double(), None if bias is None else bias.double())
        plain = expected(live, expected(~live, bias, dtype), dtype)  # rounds between the passes
        close(computed, dense, plain)
        alone = run(A, None, False)
        close(alone, expected(live, None, torch.float64), expected(live, None, dtype))


def test_projections_read_nothing_on_the_host():
    """One graph without breaks, symbols included: nothing waits for a value."""
    problem = Projection(torch.float32, 77, 20, k=80)

    def run(A, *symbols):
        q = flashomni.flashomni_gemm(
            A * 2, problem.B, problem.heads, *symbols, 77, sparse_q_size=64
        )
        arguments = (q, problem.B, problem.heads, *symbols, 77)
        cached = flashomni.flashomni_gemm_reduction(*arguments, None, True, 64)
        return flashomni.flashomni_gemm_reduction(*arguments, cached, False, 64)

    inputs = (problem.A, *problem.symbols())
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), run(*inputs))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_projections_on_a_gpu(device):
    """In bf16 at the authors' block, without a wait."""
    problem = Projection(torch.bfloat16, 128, 0, 384, 4, 256, 256, 128, device=device)
    live = problem.live().repeat_interleave(64, -1)
    arguments = (problem.A, problem.B, problem.heads, *problem.symbols(), 128)

    def run():
        q = flashomni.flashomni_gemm(*arguments, problem.bias)
        cached = flashomni.flashomni_gemm_reduction(*arguments, problem.bias, True)
        return q, cached, flashomni.flashomni_gemm_reduction(*arguments, cached)

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        q, cached, dense = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wide = [x.double() for x in (problem.A, problem.B, problem.bias)]
    exact, plain = linear(*wide), linear(problem.A, problem.B, problem.bias)
    close(q, exact, plain, live)
    assert (q[~live] == 0).all()
    part = linear(wide[0].masked_fill(live, 0.0), *wide[1:])
    close(cached, part, part.bfloat16())
    rest = linear(problem.A.masked_fill(~live, 0.0), problem.B) + part.bfloat16()
    close(dense, exact, rest)


GEMM = {
    "A": torch.zeros(2, 90, 24),
    "B": torch.zeros(32, 24),
    "num_qo_heads": 2,
    "sparse_info": torch.zeros(2, dtype=torch.uint8),
    "sparse_info_indptr": int32(0, 1, 2),
    "num_text_tokens": 0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(90, 24)}, r"A must be \[B, M, K\]"),
        ({"A": torch.zeros(2, 90, 24).double()}, "A must be float32 or float16 or bfloat16"),
        ({"B": torch.zeros(24, 32)}, r"B must be \[N, 24\], got \[24, 32\]"),
        ({"B": torch.zeros(32, 24).half()}, "B must be float32, got float16"),
        ({"num_qo_heads": 5}, "num_qo_heads must divide the .* got 5"),
        ({"bias": torch.zeros(31)}, r"bias must be .*, got \[31\]"),
        ({"sparse_info": None}, "sparse_info must be a tensor, got None"),
        ({"sparse_info": torch.zeros(1, dtype=torch.uint8)}, "sparse_info must .* 2 bytes"),
        ({"sparse_info_indptr": int32(0, 1)}, r"sparse_info_indptr must be \[3\]"),
        ({"num_text_tokens": 512}, r"sparse_info must .* 4 bytes .*num_text_tokens .* 512 \+ 90"),
        ({"num_text_tokens": -1}, "num_text_tokens must be at least 0, got -1"),
        ({"sparse_q_size": 100}, "sparse_q_size must be a positive multiple of 16, got 100"),
        ({"backend": "abacus"}, "backend must be one of .*reference"),
    ],
)
@pytest.mark.parametrize("name", ["flashomni_gemm", "flashomni_gemm_reduction"])
def test_projections_are_checked(name, change, message):
    """What was given and what is allowed; a default of the authors that would read too far."""
    with pytest.raises(ValueError, match=message):
        getattr(flashomni, name)(**{**GEMM, **change})


def test_the_bias_of_each_pass_is_checked():
    """A vector for the cached heads, the result of that pass for the computed ones."""
    vector, full = torch.zeros(32), torch.zeros(2, 90, 32)
    for is_for_cache, good, bad in ((True, vector, full), (False, full, vector)):
        call = {**GEMM, "is_for_cache": is_for_cache}
        assert flashomni.flashomni_gemm_reduction(**call, bias=good).shape == (2, 90, 32)
        with pytest.raises(ValueError, match="bias must be "):
            flashomni.flashomni_gemm_reduction(**call, bias=bad)
    with pytest.raises(ValueError, match=r"out must be \[2, 90, 32\]"):
        flashomni.flashomni_gemm(**GEMM, out=torch.zeros(2, 90, 2, 16))
