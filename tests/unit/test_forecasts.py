"""Forecasts: weights of anchors, fitted ones among them, and what they are exact for."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashomni.engine import Recipe
from flashomni.engine.forecasts import (
    FORECASTS,
    Fitted,
    Known,
    difference_weights,
    forecast,
    forecasts,
    from_differences,
    to_differences,
)
from flashomni.engine.forecasts.fitted import fit
from flashomni.engine.state.cache import History
from flashomni.engine.state.storage import Storage

ANCHORS = st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True).map(sorted)


def old_taylor(order, x):
    return [x**i / math.factorial(i) for i in range(order + 1)]


def old_hermite(order, x, sigma=0.5):
    """The formula of version 0.1: scaled physicists' polynomials without their constants."""

    def hermite(n, y):
        return [1.0, 2 * y, 4 * y**2 - 2, 8 * y**3 - 12 * y][n]

    rises = [hermite(i, sigma * x) - hermite(i, 0.0) for i in range(order + 1)]
    return [1.0, *(sigma**i * rises[i] / math.factorial(i) for i in range(1, order + 1))]


def fp32(values):
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(("name", "old"), [("taylor", old_taylor), ("hermite", old_hermite)])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_equal_gaps_give_the_coefficients_of_before(name, old, order):
    """Bit for bit in fp32, for gaps of 1 to 40 and 1 to 40 steps behind the last anchor."""
    for gap in range(1, 41):
        for x in range(1, 41):
            times = tuple(5 + gap * i for i in range(order + 1))
            got = difference_weights(name, times, times[-1] + x)
            assert torch.equal(fp32(got), fp32(old(order, x))), (gap, x, got)


TIMES = [(4,), (1, 4), (0, 1, 4), (0, 2, 3, 9), (0, 1, 2), (3, 4, 6, 11)]
PUBLISHED = ["chebyshev", "foca", "hermite", "quadrature", "reuse", "taylor"]
# The highest degree that a forecast continues exactly, by the number of anchors.
DEGREES = {
    "reuse": (0, 0, 0, 0),
    "taylor": (0, 1, 1, 1),
    "hermite": (0, 0, 0, 0),
    "foca": (0, 1, 1, 1),
    "quadrature": (0, 0, 0, 0),  # hermite's, where nothing is known of the noise
    "chebyshev": (0, 0, 0, 0),
}


def test_every_published_forecast_is_tested():
    assert sorted(set(forecasts()) - {"fitted"}) == PUBLISHED


@pytest.mark.parametrize("known", [None, Known(28), Known(60)])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_forecasts_keep_what_does_not_change(name, times, known):
    """A finite weight for each anchor, whatever the gaps; constants stay."""
    for x in (1, 3, 11):
        weights = forecasts()[name](times, times[-1] + x, known)
        assert len(weights) == len(times) and all(map(math.isfinite, weights))
        assert sum(weights) == pytest.approx(1.0)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(
    "name", sorted({*PUBLISHED} - {"chebyshev"})
)  # a regression meets no point
def test_forecasts_start_at_the_value(name, times):
    """At the last anchor they give its value."""
    weights = forecasts()[name](times, times[-1])
    assert weights == pytest.approx([0.0] * (len(times) - 1) + [1.0])


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_class_that_is_exact(name, times):
    """Polynomials up to that degree are continued; those of the next are not."""
    degree = DEGREES[name][len(times) - 1]
    for n in range(degree + 2):
        worst = 0.0
        for x in (1, 2, 7):
            weights = forecasts()[name](times, times[-1] + x, Known(28))
            got = sum(w * (t - 5.0) ** n for w, t in zip(weights, times, strict=True))
            worst = max(worst, abs(got - (times[-1] + x - 5.0) ** n))
        assert (worst < 1e-8) == (n <= degree), (n, worst)


@pytest.mark.parametrize("times", [(0, 1, 2), (0, 2, 4), (1, 4, 7), (0, 5, 10)])
def test_foca_follows_the_equations(times):
    """The recursion on values of a random curve, with the paper's equations written out."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(len(times), 6, generator=generator, dtype=torch.float64)
    gap = times[1] - times[0]
    anchored = (3 * values[2] - 4 * values[1] + values[0]) / (2 * gap)  # (6) at the anchors
    curve = (values[2] - 2 * values[1] + values[0]) / gap**2
    past = values[2] - anchored + curve / 2  # the parabola one step back
    now, slope = values[2], anchored
    for x in range(1, 8):
        forecasted = 4 / 3 * now - 1 / 3 * past + 2 / 3 * slope  # (7)
        ahead = (3 * forecasted - 4 * now + past) / 2
        calibrated = now + 1 / 2 * (anchored + ahead)  # (8)
        slope = (3 * calibrated - 4 * now + past) / 2
        past, now = now, calibrated
        weights = torch.tensor(forecasts()["foca"](times, times[-1] + x), dtype=torch.float64)
        torch.testing.assert_close(weights @ values, now)


def test_foca_runs_away_less_than_taylor():
    """What the correction is for: long gaps behind a curved past."""
    for times in [(0, 1, 2), (0, 2, 6), (4, 6, 10)]:
        past = [float(t * t) for t in times]
        foca, taylor = (
            sum(w * v for w, v in zip(forecasts()[name](times, times[-1] + 9), past, strict=True))
            for name in ("foca", "taylor")
        )
        assert past[-1] < foca < taylor


@pytest.mark.parametrize("times", [(0, 1), (0, 1, 3), (2, 3, 5, 9)])
def test_chebyshev_is_half_a_regression(times):
    """The fit by another road: least squares with the ridge's rows below the design."""
    t, num_steps = times[-1] + 3, 28
    tau = 2 * np.array([*times, t]) / (num_steps - 1) - 1
    basis = np.polynomial.chebyshev.chebvander(tau, 4)
    ridge = math.sqrt(0.1) * np.eye(5)[1:]
    values = np.random.default_rng(0).normal(size=(len(times), 4))
    rows, sides = np.vstack([basis[:-1], ridge]), np.vstack([values, np.zeros((4, 4))])
    fit = basis[-1] @ np.linalg.lstsq(rows, sides, rcond=None)[0]
    line = values[-1] + (t - times[-1]) / (times[-1] - times[-2]) * (values[-1] - values[-2])
    weights = np.array(forecasts()["chebyshev"](times, t, Known(num_steps)))
    np.testing.assert_allclose(weights @ values, 0.5 * fit + 0.5 * line, atol=1e-9)


FITTED = {"num_steps": 28, "base": "taylor", "weights": [[[0, 1, 4], 5, [0.25, -1.0, 1.75]]]}


def test_fitted_weights_are_those_of_the_recipe():
    """By anchors and step; what is not listed, and other step counts, are the base's."""
    table, of = Fitted(**FITTED), forecasts()
    assert of["fitted"]((0, 1, 4), 5, Known(28, table)) == [0.25, -1.0, 1.75]
    for times, t, num_steps in [((0, 1, 4), 6, 28), ((1, 4), 5, 28), ((0, 1, 4), 5, 29)]:
        got = of["fitted"](times, t, Known(num_steps, table))
        assert got == of["taylor"](times, t)
    with pytest.raises(ValueError, match="fitted needs the weights that a calibration found"):
        of["fitted"]((0, 1, 4), 5)


def test_fitted_weights_live_in_a_recipe(tmp_path):
    """They go to JSON and come back, and reach the coefficients; another forecast drops them."""
    recipe = Recipe.of("taylorseer", forecast={"name": "fitted", "fitted": FITTED}, layer_order=2)
    recipe.save(tmp_path / "tuned.json")
    again = Recipe.of(tmp_path / "tuned.json")
    assert again == recipe and again.forecast.fitted == Fitted(**FITTED)
    got = again.forecast.coefficients((0, 1, 4), 5, 28)
    assert from_differences((0, 1, 4), got) == pytest.approx([0.25, -1.0, 1.75])
    assert Recipe.of(again, forecast="hermite").forecast.fitted is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"base": "fitted"}, "base must be one of chebyshev, .*, got 'fitted'"),
        ({"weights": [[[0, 1], 5]]}, r"entries \[anchors, step, weights\]"),
        ({"weights": [[[1, 0], 5, [0.0, 1.0]]]}, "anchors ascending before the step"),
        ({"weights": [[[0, 5], 5, [0.0, 1.0]]]}, "anchors ascending before the step"),
        ({"weights": [[[0, 1], 28, [0.0, 1.0]]]}, "the step below 28"),
        ({"weights": [[[0, 1], 5, [1.0]]]}, "one finite weight an anchor"),
        ({"weights": [[[0], 5, [True]]]}, "one finite weight an anchor"),
        ({"weights": [[[0], 5, [1.0]], [[0], 5, [0.9]]]}, "each pair of anchors and step once"),
    ],
)
def test_fitted_weights_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe.of("fora", forecast={"name": "fitted", "fitted": {**FITTED, **change}})


@pytest.mark.parametrize("forecast", [{"name": "fitted"}, {"fitted": FITTED}])
def test_fitted_and_its_weights_come_together(forecast):
    with pytest.raises(ValueError, match="forecast 'fitted' and its weights come together"):
        Recipe.of("fora", forecast=forecast)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(ANCHORS, st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_differences_and_weights_are_two_ways_to_say_it(times, coefficients):
    """There and back; and both give the same value of exact rational data."""
    coefficients = coefficients[: len(times)]
    weights = from_differences(times, coefficients)
    assert to_differences(times, weights) == pytest.approx(coefficients, abs=1e-9)
    values = [Fraction((7 * t * t - 3 * t) % 101, 7) for t in times]
    terms, column = [values[-1]], values
    for i in range(1, len(times)):
        pairs = range(len(column) - 1)
        column = [(column[j + 1] - column[j]) / (times[j + i] - times[j]) for j in pairs]
        terms.append(math.factorial(i) * column[-1])
    by_terms = sum(c * float(f) for c, f in zip(coefficients, terms, strict=True))
    by_values = sum(w * float(v) for w, v in zip(weights, values, strict=True))
    assert by_values == pytest.approx(by_terms, abs=1e-6, rel=1e-6)


def test_taylor_is_exact_on_lines_and_what_it_does_to_a_parabola():
    """Order 1 continues a line. Order 2 misses t^2 by x times the last gap, whatever the others."""
    for times in [(0, 3), (2, 9)]:
        for x in (1, 2, 5):
            weights = forecasts()["taylor"](times, times[-1] + x)
            got = sum(w * (3 * t - 2) for w, t in zip(weights, times, strict=True))
            assert got == pytest.approx(3 * (times[-1] + x) - 2)
    for times in [(0, 1, 2), (0, 1, 5), (0, 4, 5), (3, 9, 11)]:
        for x in (1, 2, 5):
            weights = forecasts()["taylor"](times, times[-1] + x)
            got = sum(w * t * t for w, t in zip(weights, times, strict=True))
            gap = times[-1] - times[-2]
            assert got == pytest.approx((times[-1] + x) ** 2 - x * gap)


@pytest.fixture
def registered():
    """A forecast of the test's own, taken off again."""

    def register(name, function):
        return forecast(name)(function)

    before = FORECASTS.all()
    yield register
    for name in set(FORECASTS.all()) - set(before):
        FORECASTS.remove(name)
    difference_weights.cache_clear()


def test_a_forecast_that_is_no_polynomial(registered):
    """Weights of the anchors' values are what comes out, through the differences that are kept."""

    def blend(times, t, known=None):
        return [0.25] * (len(times) - 1) + [1 - 0.25 * (len(times) - 1)]

    registered("blend", blend)
    values = {0: torch.randn(5), 1: torch.randn(5), 6: torch.randn(5)}
    history = History(2, 3, Storage())
    for step, value in values.items():
        history.push(value, step)
    got = history.predict(fp32(difference_weights("blend", history.times, 8)))
    torch.testing.assert_close(got, 0.25 * values[0] + 0.25 * values[1] + 0.5 * values[6])


@pytest.mark.parametrize("weights", [[1.0], [float("nan"), 1.0], [1.0, 2.0, 3.0]])
def test_a_forecast_that_gives_nonsense(registered, weights):
    """The error names the forecast, the anchors and what came."""
    registered("nonsense", lambda times, t, known=None: weights)
    with pytest.raises(ValueError, match=r"forecast nonsense must give 2 finite weights"):
        difference_weights("nonsense", (1, 2), 3)


def test_a_forecast_that_is_defined_again(registered):
    """The new definition counts (a notebook's cell)."""
    for weight in (0.5, 0.75):

        def cell(times, t, known=None, weight=weight):
            return [weight]

        registered("cell", cell)
        assert difference_weights("cell", (3,), 4) == (weight,)


def test_an_unknown_forecast():
    with pytest.raises(ValueError, match=r"forecast must be one of chebyshev, .*, got 'fourier'"):
        difference_weights("fourier", (1,), 2)


def test_weights_are_fitted_by_least_squares():
    """On random values: what a solver says of the values themselves, from their Gram matrix."""
    values = torch.randn(12, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = values.cumsum(0)
    table = fit(values @ values.T, [0, 1, 4, 8], order=2, ridge=0.0, base="taylor")
    assert [entry[1] for entry in table.weights] == [2, 3, 5, 6, 7, 9, 10, 11]
    assert table.num_steps == 12 and table.base == "taylor"
    for anchors, step, weights in table.weights:
        assert anchors == tuple(a for a in (0, 1, 4, 8) if a < step)[-3:]
        last = values[anchors[-1]]
        design = torch.stack([values[a] - last for a in anchors[:-1]], dim=1)
        best = torch.linalg.lstsq(design, (values[step] - last)[:, None]).solution[:, 0]
        assert weights[:-1] == pytest.approx(best.tolist(), abs=1e-8)
        assert sum(weights) == pytest.approx(1.0)


def test_fitted_weights_meet_what_they_can():
    """Values on a curve of two dimensions are met exactly; a strong ridge is reuse."""
    times = torch.arange(10, dtype=torch.float64)
    values = torch.stack([torch.ones(10).double(), times, times**2], 1)
    gram = values @ values.T
    for anchors, step, weights in fit(gram, [0, 2, 3, 7], 2, ridge=0.0).weights:
        if len(anchors) == 3:
            met = sum(w * values[a] for w, a in zip(weights, anchors, strict=True))
            torch.testing.assert_close(met, values[step])
    for _, _, weights in fit(gram, [0, 2, 3, 7], 2, ridge=1e9).weights:
        assert weights[-1] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "computed", "message"),
    [((4, 5), [0], "gram must be a square matrix"), ((4, 4), [0, 4], "steps from 0 to 3"),
     ((4, 4), [], "steps from 0 to 3")],
)  # fmt: skip
def test_what_cannot_be_fitted(shape, computed, message):
    with pytest.raises(ValueError, match=message):
        fit(torch.zeros(shape), computed, 1)
