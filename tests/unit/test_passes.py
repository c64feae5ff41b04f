"""The small ops on every backend through their public functions, against the definition in fp32.

Ragged sizes, every dtype, runs of rows of longer sequences; on a GPU, or in Triton's interpreter.
"""

import os

import pytest
import torch

from conftest import device_for, with_gpu_marks
from flashomni.dispatch import HELPERS, backends
from flashomni.kernels.elementwise import op as elementwise
from flashomni.symbols import Grid
from flashomni.symbols.choice import op as choice
from flashomni.symbols.choice.op import Rule

BACKENDS = with_gpu_marks(sorted({name for op in HELPERS for name in backends(op)}))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
SIZES = [(1, 1, 17), (2, 37, 48), (1, 131, 1000)]  # batch, rows, features

every = pytest.mark.parametrize("backend", BACKENDS)
typed = pytest.mark.parametrize("dtype", DTYPES, ids=str)
sized = pytest.mark.parametrize("size", SIZES, ids=str)


@pytest.fixture
def randn(backend, dtype):
    """Random tensors where the backend lives."""
    return lambda *shape: torch.randn(shape).to(device_for(backend), dtype)


def run_of_rows(x):
    """A run of rows of a longer sequence, which no pass may read beyond."""
    longer = torch.nn.functional.pad(x, (0, 0, 3, 2), value=float("nan"))
    return longer[:, 3:-2]


def check(op, backend, *args):
    """At most twice the error of the definition in the dtype of the arguments."""

    def each(change):
        return [
            change(a) if isinstance(a, torch.Tensor)
            else [change(t) for t in a] if isinstance(a, list) and isinstance(a[0], torch.Tensor)
            else a
            for a in args
        ]  # fmt: skip

    function = getattr(elementwise, op)
    got = function(*args, backend=backend)
    exact = function(*each(lambda t: t.double()), backend="reference")
    plain = function(*args, backend="reference")
    as_list = (lambda x: [x]) if isinstance(got, torch.Tensor) else list
    for one, true, rounded in zip(*map(as_list, (got, exact, plain)), strict=True):
        floor = 16 * torch.finfo(torch.float32).eps * true.abs().max()
        assert one.dtype == rounded.dtype and one.shape == rounded.shape
        assert (one - true).abs().max() <= 2 * (rounded - true).abs().max() + floor


@every
@typed
@sized
def test_norms_gates_and_residuals(backend, dtype, size, randn):
    """Modulation by slices of one vector, as blocks have it."""
    batch, _, features = size
    x, y = run_of_rows(randn(*size)), run_of_rows(randn(*size))
    gate, scale, shift = randn(batch, 6 * features).chunk(6, dim=1)[1:4]
    check("modulated_norm", backend, x, scale, shift, 1e-6)
    check("gated_residual", backend, x, y, gate)
    check("gated_residual_norm", backend, x, y, gate, scale, shift, 1e-6)


@every
@typed
@sized
@pytest.mark.parametrize("weighted", [False, True], ids=["bare", "weighted"])
def test_rms_norms(backend, dtype, size, weighted, randn):
    """Scaled without a shift; of what is added; a LayerNorm with a weight of its own."""
    batch, _, features = size
    x, y = run_of_rows(randn(*size)), run_of_rows(randn(*size))
    gate, scale, shift = randn(batch, 6 * features).chunk(6, dim=1)[1:4]
    weight = randn(features) if weighted else None
    check("modulated_norm", backend, x, scale, None, 1e-6, weight, "rms")
    check("modulated_norm", backend, x, scale, shift, 1e-6, weight, "rms")
    check("modulated_norm", backend, x, scale, shift, 1e-6, weight, "layer")
    check("gated_residual", backend, x, y, gate, 1e-6, weight)


@every
@typed
@pytest.mark.parametrize("rows, num_heads, head_dim", [(1, 1, 16), (37, 3, 72), (131, 5, 128)])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("own", ["", "items", "heads", "items and heads"])
def test_norm_and_rope(backend, dtype, rows, num_heads, head_dim, layout, own, randn):
    """In place; rows beside the run stay as they are. Tables of all, of items, of heads."""
    whole = randn(2, rows + 5, num_heads, head_dim)
    q, before = whole[:, 2 : rows + 2], whole.clone()
    weight = randn(head_dim).abs() + 0.5
    items, heads = 2 if "items" in own else 1, num_heads if "heads" in own else 1
    shape = (items, rows, heads, head_dim // 2) if own else (rows, head_dim // 2)
    angle = torch.rand(shape, device=q.device) * 6
    tables = (angle.cos(), angle.sin())
    results = []
    for kind, how in ((dtype, backend), (torch.float64, "reference"), (dtype, "reference")):
        mine = before.to(kind, copy=True)
        of = weight.to(kind)
        elementwise.norm_rope_(mine[:, 2 : rows + 2], of, 1e-6, tables, layout, backend=how)
        beside = torch.cat([mine[:, :2], mine[:, rows + 2 :]], 1)
        assert torch.equal(beside, torch.cat([before[:, :2], before[:, rows + 2 :]], 1).to(kind))
        results.append(mine.double())
    got, exact, plain = results
    floor = 16 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


@every
@typed
@sized
@pytest.mark.parametrize("order", [0, 3])
def test_differences_of_uneven_gaps(backend, dtype, size, order, randn):
    """With and without what is subtracted; the forecast of the terms, alone and on a base."""
    value, minus = run_of_rows(randn(*size)), randn(*size)
    old, gaps = [randn(*size) for _ in range(order)], [1.0, 2.5, 13 / 3][:order]
    for less in (minus, None):
        exact = elementwise.differences(
            value.double(), None if less is None else less.double(), [t.double() for t in old],
            gaps, backend="reference",
        )  # fmt: skip
        got = elementwise.differences(value, less, old, gaps, backend=backend)
        plain = elementwise.differences(value, less, old, gaps, backend="reference")
        assert len(got) == order + 1
        for one, true, rounded in zip(got, exact, plain, strict=True):
            # Each term is rounded before the next is made of it, or is not: twice is the bound.
            limit = 2 * (rounded - true).abs().max() + 1e-6 * (1 + true.abs().max())
            assert one.dtype == dtype and (one - true).abs().max() <= limit
    coefficients = torch.randn(order + 1, device=value.device)
    for base in (None, value):
        total = elementwise.weighted_sum(got, coefficients, base, dtype, backend=backend)
        same = elementwise.weighted_sum(got, coefficients, base, torch.float32, backend="reference")
        torch.testing.assert_close(total, same.to(dtype), atol=1e-5, rtol=torch.finfo(dtype).eps)


@every
def test_terms_in_fp32_of_fp16_values(backend):
    """A difference out of fp16's range, next to terms that are wide already, at uneven gaps."""
    device = device_for(backend)
    before, after = (torch.full((2, 37, 24), v, device=device).half() for v in (-6e4, 6e4))
    old = [torch.full((2, 37, 24), v, device=device) for v in (2e4, -1e4)]
    got = elementwise.differences(after, before, old, [4.0, 2.5], torch.float32, backend=backend)

    first = 120_000.0  # 60000 is a number of fp16
    second = (first - 2e4) / 4.0
    third = (second + 1e4) / 2.5
    for term, value in zip(got, (first, second, third), strict=True):
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, torch.full_like(term, value), rtol=1e-6, atol=0)
    weights = torch.tensor([1.0, -2.0, 0.5], device=device)
    total = elementwise.weighted_sum(got, weights, before, torch.float16, backend=backend)
    expected = torch.tensor(first - 2 * second + 0.5 * third - 6e4).half()
    assert torch.equal(total, torch.full_like(total, float(expected)))


RULES = {
    "tests": Rule(visit="mass", compute="and", tau_q=0.5, tau_kv=0.3, power=1.0),
    "counts": Rule(visit="count", compute="count", count_q=3, count_kv=2, share_heads=True),
    "gate": Rule(visit="mass", compute="mean", tau_q=0.6, tau_kv=0.4, gate=0.1, center_k=True),
}


@every
@typed
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("seqlen, text", [(130, (0, 17)), (389, (340, 389))])
def test_chosen_symbols(backend, dtype, rule, seqlen, text, randn):
    """Nearly every bit as the definition, which rounds elsewhere; what is counted of them, exactly.

    Valid lengths, ragged blocks of queries and of keys, and fewer heads of keys.
    """
    q, k = randn(2, seqlen, 4, 24), randn(2, seqlen, 2, 24)
    for x in (q, k):  # tokens of a block are alike, as in a picture
        x += 1.5 * randn(2, -(-seqlen // 40), x.shape[2], 24).repeat_interleave(40, 1)[:, :seqlen]
    length = torch.tensor([seqlen, seqlen - 9], dtype=torch.int32, device=q.device)
    grid = Grid(seqlen, seqlen, text, 32, 48, length)
    progress = torch.tensor(0.7, device=q.device)
    got = choice.choose(q, k, grid, rule, progress, backend=backend)
    expected = choice.choose(q, k, grid, rule, progress, backend="reference")
    for name in ("q_mask", "kv_mask"):
        one, other = getattr(got, name)(), getattr(expected, name)()
        assert (one == other).float().mean() > 0.995 and one.shape == other.shape
        assert one.any() and not one.all()
    assert got.q_mask()[..., grid.text_q_mask(q.device)].all()
    for min_skip in (0.0, 0.4):
        mine = choice.measure(got, min_skip, backend=backend)
        same = choice.measure(got, min_skip, backend="reference")
        assert torch.equal(mine[0].kv_bits, same[0].kv_bits)
        torch.testing.assert_close(mine[1:], same[1:], atol=1e-6, rtol=0)
    for rows, offset in ((seqlen, 0), (51, 19), (1, seqlen - 1)):
        share = choice.live_share(got, rows, offset, backend=backend)
        same = choice.live_share(got, rows, offset, backend="reference")
        torch.testing.assert_close(share, same, atol=1e-6, rtol=0)
