"""The passes between the products: the Triton kernels against the definitions in fp32.

On the CPU the kernels run in Triton's interpreter (``make interpret``), else on a GPU.
"""

import importlib.util
import os

import pytest
import torch

from flashomni.kernels.elementwise import op as elementwise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = INTERPRETED or torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.triton,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or not RUNS, reason="needs Triton and a GPU"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


@pytest.fixture(scope="module")
def kernels():
    from flashomni.kernels.elementwise import portable

    return portable


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def rows_of_more(batch, rows, width, dtype):
    """A run of tokens of a longer sequence."""
    return randn(batch, rows + 5, width, dtype=dtype)[:, 2 : rows + 2]


def check(got, exact, rounded):
    """Error at most twice that of the definition in the same dtype."""
    floor = 16 * torch.finfo(torch.float32).eps * exact.abs().max()
    limit = 2 * (rounded.float() - exact).abs().max() + floor
    assert got.dtype == rounded.dtype and got.shape == rounded.shape
    assert (got.float() - exact).abs().max() <= limit


def both(run, *args):
    """``(exact, rounded)``: the definition in fp32 and in the dtype of the arguments."""
    on_cpu = [a.cpu() if isinstance(a, torch.Tensor) else a for a in args]
    wide = [a.float() if isinstance(a, torch.Tensor) else a for a in on_cpu]
    return run(*wide), run(*on_cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["one dtype", "modulation in fp32"])
@pytest.mark.parametrize("batch, rows, width", [(1, 7, 48), (2, 130, 192), (3, 1, 3072)])
def test_norm_modulation_gate_and_residual(kernels, dtype, wide, batch, rows, width):
    """LayerNorm with modulation; gate and residual; both in one pass. Rows of more than x."""
    x, y = (rows_of_more(batch, rows, width, dtype) for _ in range(2))
    modulation = randn(batch, 6 * width, dtype=torch.float32 if wide else dtype)
    shift, scale, gate = modulation.chunk(6, dim=1)[:3]
    exact, rounded = both(elementwise.modulated_norm, x, scale, shift, 1e-6)
    check(kernels.modulated_norm(x, scale, shift, 1e-6).cpu(), exact, rounded)
    exact, rounded = both(elementwise.gated_residual, x, y, gate)
    check(kernels.gated_residual(x, y, gate).cpu(), exact, rounded)
    got = kernels.gated_residual_norm(x, y, gate, scale, shift, 1e-6)
    exact, rounded = both(elementwise.gated_residual_norm, x, y, gate, scale, shift, 1e-6)
    for part in range(2):
        check(got[part].cpu(), exact[part], rounded[part])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, rows, width", [(1, 7, 48), (2, 130, 192)])
@pytest.mark.parametrize("weighted", [False, True], ids=["bare", "weighted"])
def test_rms_norms(kernels, dtype, batch, rows, width, weighted):
    """Scaled without a shift; of what is added; a LayerNorm with a weight of its own."""
    x, y = (rows_of_more(batch, rows, width, dtype) for _ in range(2))
    shift, scale, gate = randn(batch, 6 * width, dtype=dtype).chunk(6, dim=1)[:3]
    weight = randn(width, dtype=dtype) if weighted else None
    for norm in ((scale, None, 1e-6, weight, "rms"), (scale, shift, 1e-6, weight, "layer")):
        exact, rounded = both(elementwise.modulated_norm, x, *norm)
        check(kernels.modulated_norm(x, *norm).cpu(), exact, rounded)
    exact, rounded = both(elementwise.gated_residual, x, y, gate, 1e-6, weight)
    check(kernels.gated_residual(x, y, gate, 1e-6, weight).cpu(), exact, rounded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_heads, head_dim", [(3, 16), (5, 80), (24, 128)])
@pytest.mark.parametrize(
    "has_norm, has_weight, has_rope, layout",
    [
        (*has, layout)
        for layout in ("interleaved", "half")
        for has in [(1, 1, 1), (1, 0, 0), (0, 0, 1)]
    ],
)
@pytest.mark.parametrize("own", [False, True], ids=["shared tables", "own tables"])
def test_norm_and_rope_in_place(
    kernels, dtype, num_heads, head_dim, has_norm, has_weight, has_rope, layout, own
):
    """On rows of a longer sequence, whose other rows stay as they are."""
    batch, rows = 2, 37
    whole = randn(batch, rows + 5, num_heads, head_dim, dtype=dtype)
    before, q = whole.clone(), whole[:, 2 : rows + 2]
    weight = randn(head_dim, dtype=dtype) if has_weight else None
    eps = 1e-6 if has_norm else None
    rope = None
    if has_rope:
        tables = (batch, rows, num_heads) if own else (rows,)
        angles = torch.rand(*tables, head_dim // 2, 1).mul(6).to(DEVICE)
        rope = torch.cat([angles.cos(), angles.sin()], -1).unbind(-1)  # packed, stride 2

    def defined(q, weight):
        q = q.clone()
        elementwise.norm_rope_(q, weight, eps, rope and tuple(t.cpu() for t in rope), layout)
        return q

    exact, rounded = both(defined, q, weight)
    kernels.norm_rope_(q, weight, eps, rope, layout)
    check(q.cpu(), exact, rounded)
    assert torch.equal(whole[:, :2], before[:, :2]) and torch.equal(whole[:, -3:], before[:, -3:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("has_minus", [False, True], ids=["value", "difference"])
def test_differences_and_their_sum(kernels, dtype, order, batch, has_minus):
    """Terms of every order, and the forecast that they give, alone and on top of a base."""
    rows, width = 67, 40
    value = rows_of_more(batch, rows, width, dtype)
    minus = randn(batch, rows, width, dtype=dtype) if has_minus else None
    old = [randn(batch, rows, width, dtype=dtype) for _ in range(order)]
    gaps = [3, 2.5, 4][:order]

    def defined(value, minus, *old):
        return elementwise.differences(value, minus, old, gaps)

    exact, rounded = both(defined, value, minus, *old)
    got = kernels.differences(value, minus, old, gaps, dtype)
    assert len(got) == order + 1
    for part in range(order + 1):
        check(got[part].cpu(), exact[part], rounded[part])
    assert all(got[0].data_ptr() != t.data_ptr() for t in [value, *old])
    coefficients = randn(4)
    for base in (None, value):
        exact = sum((c * t.float() for c, t in zip(coefficients, got, strict=False)), 0.0)
        exact = exact if base is None else exact + base.float()
        total = kernels.weighted_sum(got, coefficients, base, dtype)
        check(total.cpu(), exact.cpu(), exact.to(dtype).cpu())


def test_differences_in_another_dtype(kernels):
    """fp16 values whose difference is out of its range, in fp32."""
    value, minus = (
        torch.full((2, 5, 8), x, dtype=torch.float16, device=DEVICE) for x in (4e4, -4e4)
    )
    old = torch.full((2, 5, 8), 1e4, device=DEVICE)
    got = kernels.differences(value, minus, [old], [2.0], torch.float32)
    assert [term.unique().tolist() for term in got] == [[80_000.0], [35_000.0]]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[:, 3:],
        lambda x: x[:1, 3:9],
        lambda x: x[:, :, 1:],
        lambda x: x[1:, 2:3],
        lambda x: x.transpose(1, 2),
        lambda x: x[::2, 1:4, ::2],
    ],
    ids=["whole", "rows", "one", "inner", "row", "turned", "steps"],
)
def test_views_are_read_as_they_lie(kernels, view):
    """What a view shows is what is used, however it lies."""
    x = view(randn(3, 10, 4, 8))
    assert torch.equal(kernels.differences(x, None, [], [], x.dtype)[0], x)
    zero = torch.zeros_like(x).contiguous()
    assert torch.equal(kernels.weighted_sum([zero], torch.ones(1, device=DEVICE), x, x.dtype), x)
