"""The small ops on every backend through their public functions, against the definition in fp32.

Ragged sizes, every dtype, runs of rows of longer sequences; on a GPU, or in Triton's interpreter.
"""

import os

import pytest
import torch

from conftest import device_for, with_gpu_marks
from flashomni.dispatch import HELPERS, backends
from flashomni.kernels.elementwise import op as elementwise
from flashomni.symbols.choice import op as choice

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
@pytest.mark.parametrize("rows, num_heads, head_dim", [(1, 1, 16), (37, 3, 72), (131, 5, 128)])
def test_norm_and_rope(backend, dtype, rows, num_heads, head_dim, randn):
    """In place; rows beside the run stay as they are."""
    whole = randn(2, rows + 5, num_heads, head_dim)
    q, before = whole[:, 2 : rows + 2], whole.clone()
    weight = randn(head_dim).abs() + 0.5
    angle = torch.rand(rows, head_dim // 2, device=q.device) * 6
    tables = (angle.cos(), angle.sin())
    results = []
    for kind, how in ((dtype, backend), (torch.float64, "reference"), (dtype, "reference")):
        mine = before.to(kind, copy=True)
        of = weight.to(kind)
        elementwise.norm_rope_(mine[:, 2 : rows + 2], of, 1e-6, tables, backend=how)
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


@every
@typed
@pytest.mark.parametrize("tokens, block", [(1, 16), (130, 48), (517, 128)])
def test_block_means(backend, dtype, tokens, block, randn):
    """Ragged last blocks and valid lengths; of tokens as they are, or of length 1."""
    x = randn(2, tokens, 3, 40)
    lengths = torch.tensor([tokens, (tokens + 1) // 2], dtype=torch.int32, device=x.device)
    for length in (None, lengths):
        for unit in (False, True):
            options = {"unit": unit}
            got = choice.block_means(x, block, length, **options, backend=backend)
            exact = choice.block_means(x.float(), block, length, **options, backend="reference")
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, exact, atol=2e-6, rtol=1e-5)


@every
@pytest.mark.parametrize("columns", [1, 7, 33, 130, 1000])
def test_chosen_bits(backend, columns):
    """The same bits as the definition where no two entries are equal; bits beyond are 0."""
    mass = torch.rand(2, 3, 5, columns, device=device_for(backend)).square()
    num_bytes = -(-columns // 8) + 1
    for tau in (0.0, 0.1, 0.7, 1.0):
        got = choice.heavy_bits(mass, tau, num_bytes, backend=backend)
        assert torch.equal(got, choice.heavy_bits(mass, tau, num_bytes, backend="reference"))
    for count in {0, 1, columns // 3, columns}:
        got = choice.heaviest_bits(mass, count, num_bytes, backend=backend)
        assert torch.equal(got, choice.heaviest_bits(mass, count, num_bytes, backend="reference"))
