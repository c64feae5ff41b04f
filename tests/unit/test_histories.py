"""What caches keep of anchors: differences, at uneven distances and in narrow dtypes."""

import pytest
import torch

from flashomni.engine.state.cache import History
from flashomni.engine.state.storage import Storage
from flashomni.kernels.elementwise.op import differences


def fp32(values):
    return torch.tensor(values, dtype=torch.float32)


def push_all(history, function, times):
    for step in times:
        terms = history.push(torch.tensor([function(step)], dtype=torch.float64).float(), step)
    return [float(term) for term in terms]


@pytest.mark.parametrize("times", [(0, 1, 2, 3), (0, 1, 4, 9), (0, 5, 6, 13)])
def test_differences_of_uneven_gaps_are_right(times):
    """f_i is i! times the leading coefficient of a polynomial of degree i, at any distances."""
    assert push_all(History(2, 3, Storage()), lambda t: 3 * t * t - t, times[1:])[2] == 6.0
    got = push_all(History(3, 4, Storage()), lambda t: 2.0 * t**3 + t * t, times)
    assert got[3] == pytest.approx(12.0, rel=1e-4)


def test_equal_gaps_are_the_backward_differences_of_before():
    """Bit for bit: each difference divided by the number of steps."""
    torch.manual_seed(0)
    for gap in (1, 3, 7):
        history, old = History(3, 3, Storage()), []
        for k in range(5):
            value = torch.randn(64)
            terms = [value]
            for term in old[:3]:
                terms.append((terms[-1] - term) / gap)
            got = history.push(value, k * gap)
            assert len(got) == len(terms)
            assert all(torch.equal(a, b) for a, b in zip(got, terms, strict=True))
            old = terms


def test_a_history_knows_its_anchors():
    """Newest last, as many as terms; an older step starts it again."""
    history = History(2, 3, Storage())
    seen = []
    for step in (2, 3, 7, 11):
        history.push(torch.ones(2), step)
        seen.append(history.times)
    assert seen == [(2,), (2, 3), (2, 3, 7), (3, 7, 11)]
    history.push(torch.ones(2), 4)
    assert history.times == (4,) and len(history) == 1
    only_last = History(0, 1, Storage())
    for step in (1, 5):
        only_last.push(torch.ones(2), step)
    assert only_last.times == (5,)


@pytest.mark.parametrize("dtype", ["float16", "float8"])
def test_sums_out_of_the_range_of_their_storage(dtype):
    """The nearest value that can be kept, and no infinity."""
    history = History(1, 2, Storage(dtype), wide=True)
    for step in (0, 2):
        history.push(torch.full((4, 8), 80_000.0), step)
    got = history.predict(fp32([1.0, 0.0]))
    limit = 65_504.0 if dtype == "float16" else 80_000.0
    torch.testing.assert_close(got, torch.full((4, 8), limit), rtol=0.3, atol=0)


@pytest.mark.parametrize("dtype", ["compute", "bfloat16"])
def test_sums_out_of_the_range_of_fp16(dtype):
    """What a span adds, 80,000 here, is kept wide: the forecast is finite and in fp16."""
    before = torch.full((1, 4, 8), -40_000.0, dtype=torch.float16)
    after = torch.full((1, 4, 8), 40_000.0, dtype=torch.float16)
    history = History(1, 2, Storage(dtype), wide=True)
    for step in (0, 2):
        terms = history.push(after, step, minus=before)
    assert all(term.dtype == torch.float32 and term.isfinite().all() for term in terms)
    got = history.predict(fp32([1.0, 3.0]), before)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, after, rtol=1e-2, atol=0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_differences_of_tiles_stay_in_the_range_of_fp16(order):
    """Values that jump between the ends of the range: halved terms, weights that make up for it."""
    history = History(order, order + 1, Storage(), halved=True)
    exact = History(order, order + 1, Storage())
    for step in range(order + 1):
        value = torch.full((2, 3), 65_000.0 * (-1) ** step)
        terms = history.push(value.half(), step)
        wide = exact.push(value.half().float(), step)
    assert all(term.dtype == torch.float16 and term.isfinite().all() for term in terms)
    for i, (term, other) in enumerate(zip(terms, wide, strict=True)):
        torch.testing.assert_close(term.float() * 2**i, other, rtol=1e-3, atol=0)


def test_other_dtypes_are_not_halved():
    """bf16 and fp32 have the range; and weights of halved terms are exact multiples."""
    for dtype in (torch.float32, torch.bfloat16):
        plain, halved = (History(2, 3, Storage(), halved=h) for h in (False, True))
        for step, value in enumerate(torch.randn(3, 8).to(dtype)):
            pair = [history.push(value, step) for history in (plain, halved)]
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_differences(dtype):
    """By default that of the value, the same bits as asking for it; or another."""
    torch.manual_seed(0)
    value, minus, old = (torch.randn(2, 5, 8).to(dtype) for _ in range(3))
    same = differences(value, minus, [old], [2.0])
    asked = differences(value, minus, [old], [2.0], dtype)
    assert all(a.dtype == dtype and torch.equal(a, b) for a, b in zip(same, asked, strict=True))
    wide = differences(value, minus, [old], [2.0], torch.float32)
    torch.testing.assert_close(wide[0], value.float() - minus.float(), rtol=0, atol=0)
    torch.testing.assert_close(wide[1], (wide[0] - old.float()) / 2.0)
