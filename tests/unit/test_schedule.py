"""Steps, forecasts, histories, and the clock that tells them without reading a tensor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashomni.engine import Schedule, StepKind, forecasts
from flashomni.engine.state.cache import History
from flashomni.engine.state.storage import Storage

FULL, UPDATE, DISPATCH = StepKind.FULL, StepKind.UPDATE, StepKind.DISPATCH


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(1, 9), st.floats(0, 1), st.integers(1, 60))
def test_schedule_invariants(interval, warmup, num_steps):
    """Last step dense; a Dispatch follows an Update by less than N; no Update is in vain."""
    schedule = Schedule(interval, warmup)
    kinds = [schedule.kind(step, num_steps) for step in range(num_steps)]
    assert kinds[-1] is FULL
    since = None
    for step, kind in enumerate(kinds):
        since = 0 if kind is UPDATE else None if since is None else since + 1
        if kind is DISPATCH:
            assert since is not None and since < interval
        if kind is UPDATE:
            assert kinds[step + 1] is DISPATCH and step >= schedule.first_update(num_steps)


def test_schedule_of_the_paper():
    """N = 6: warm-up, then one Update and five Dispatch steps in turn, dense end."""
    kinds = [Schedule(6, 0.16).kind(step, 28).value[0] for step in range(28)]
    assert "".join(kinds) == "ffff" + "uddddd" * 3 + "uddddf"


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_few_steps(num_steps):
    """Distilled models: as much as fits."""
    kinds = [Schedule(6, 0.16).kind(step, num_steps) for step in range(num_steps)]
    assert kinds == {1: [FULL], 2: [FULL, FULL], 4: [UPDATE, DISPATCH, DISPATCH, FULL]}[num_steps]


def test_the_last_warm_up_steps_are_recorded():
    """As many as the forecast's order, right before the first Update."""
    schedule = Schedule(4, 0.5, order=2)
    assert [step for step in range(12) if schedule.records(step, 12)] == [3, 4]


def test_the_probe_lies_before_what_it_decides():
    """Two steps before the first recorded one where there is room; never without a warm-up."""
    assert [s for s in range(50) if Schedule(4, 0.25, 2).probes(s, 50)] == [8]
    assert [s for s in range(28) if Schedule(4, 0.16, 2).probes(s, 28)] == [0]
    assert [s for s in range(10) if Schedule(4, 0.16, 2).probes(s, 10)] == [0]
    assert not any(Schedule(4, 0.0, 1).probes(s, 28) for s in range(28))


@pytest.mark.parametrize("name", sorted(forecasts()))
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_forecasts_start_at_the_value(name, order):
    """order + 1 weights, the first 1; at x = 0 the others are 0."""
    basis = forecasts()[name]
    assert basis(order, 0.0) == [1.0] + [0.0] * order
    assert len(basis(order, 2.5)) == order + 1 and basis(order, 2.5)[0] == 1.0


def test_weights_of_the_two_bases():
    """x^i / i! for Taylor; scaled Hermite polynomials without their constant for Hermite."""
    assert forecasts()["taylor"](3, 2.0) == pytest.approx([1, 2, 2, 4 / 3])
    # H1(x/2) = x, H2(x/2) - H2(0) = x^2, H3(x/2) = x^3 - 6x; times 2^-i / i!
    assert forecasts()["hermite"](3, 2.0) == pytest.approx([1, 1, 0.5, (8 - 12) / 48])


def test_taylor_is_exact_on_lines():
    """Order 1 continues a linear quantity exactly, with unequal distances too."""
    history = History(1, 2, Storage())
    slope, start = torch.randn(5), torch.randn(5)
    for step in (1, 2, 8):
        history.push(start + step * slope, step)
    weights = torch.tensor(forecasts()["taylor"](1, 4.0))
    torch.testing.assert_close(history.predict(weights), start + 12 * slope)


@pytest.mark.parametrize("dtype", ["compute", "bfloat16", "float16"])
def test_history_is_the_backward_difference(dtype):
    """Against a naive computation, over unequal steps; fewer terms at first."""
    values = {step: torch.randn(40) for step in (0, 1, 4, 9)}
    history, old, before = History(2, 2, Storage(dtype)), [], None
    for step, value in values.items():
        terms = [value]
        for difference in old[:2]:
            terms.append((terms[-1] - difference) / (step - before))
        got = history.push(value, step)
        assert len(got) == len(terms)
        for a, b in zip(got, terms, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6 if dtype == "compute" else 0.03, rtol=1e-2)
        old, before = terms, step
    assert len(history) == 2
    assert all(kept.dtype == Storage(dtype).resolve(torch.float32) for kept in history.tensors())


def test_history_copies_what_it_keeps():
    """The caller may overwrite its tensor afterwards."""
    history, value = History(1, 2, Storage()), torch.ones(3)
    history.push(value, 0)
    value.zero_()
    assert history.predict(torch.ones(1)).tolist() == [1, 1, 1]
