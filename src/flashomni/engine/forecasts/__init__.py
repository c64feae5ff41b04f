"""Forecasts: how values of the past combine into a value now. One file each.

A forecast is a function ``weights(times, t, signals=None) -> list of floats``: the weights of the
values at the anchors ``times`` (steps, oldest first, at most order + 1 of them), at step ``t``
behind the last. Caches keep, instead of the values, f_i = i! times the divided difference over the
newest i + 1 anchors; the weights of these follow here, on the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from flashomni.registry import Registry

Weights = Callable[..., list[float]]

FORECASTS: Registry[Weights] = Registry("forecast", __name__, "flashomni.forecasts")


def forecast(name: str) -> Callable[[Weights], Weights]:
    """Register a function as the forecast ``name``."""

    def keep(function: Weights) -> Weights:
        FORECASTS.add(name, function)
        difference_weights.cache_clear()  # it may replace an older definition of its own
        return function

    return keep


def forecasts() -> dict[str, Weights]:
    """Every forecast by name."""
    return FORECASTS.all()


def to_differences(times: Sequence[int], weights: Sequence[float]) -> list[float]:
    """Weights of f_0, f_1, ... that give what ``weights`` give of the values.

    By Newton's form a value at an anchor is v(t_j) = sum_i f_i / i! prod_{l < i} (t_j - t_{k-l}),
    k the newest anchor.
    """
    newest = list(reversed(times))
    behind = list(reversed(weights))
    result = []
    for i in range(len(newest)):
        total = 0.0
        for t, weight in zip(newest, behind, strict=True):
            total += weight * math.prod(t - anchor for anchor in newest[:i])
        result.append(total / math.factorial(i))
    return result


def from_differences(times: Sequence[int], coefficients: Sequence[float]) -> list[float]:
    """Weights of the values that give what ``coefficients`` give of f_0, f_1, ...

    f_i = i! sum_{j <= i} v(t_{k-j}) / prod_{m <= i, m != j} (t_{k-j} - t_{k-m}).
    """
    newest = list(reversed(times))
    result = [0.0] * len(newest)
    for i, coefficient in enumerate(coefficients[: len(newest)]):
        for j in range(i + 1):
            gaps = math.prod(newest[j] - newest[m] for m in range(i + 1) if m != j)
            result[j] += coefficient * math.factorial(i) / gaps
    return list(reversed(result))


@functools.lru_cache(maxsize=4096)
def difference_weights(name: str, times: tuple[int, ...], t: int) -> tuple[float, ...]:
    """Weights of f_0, f_1, ... of the forecast ``name`` at step ``t``.

    Raises:
        ValueError: the forecast is unknown, or does not give a finite weight for each anchor.
    """
    weights = FORECASTS.get(name)(times, t)
    if len(weights) != len(times) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(
            f"forecast {name} must give {len(times)} finite weights for anchors {times} at step "
            f"{t}, got {weights!r}"
        )
    return tuple(_nearest(value) for value in to_differences(times, weights))


def _nearest(value: float) -> float:
    """Drop what rounding in double precision left behind an exact value."""
    return float(f"{value:.12g}")
