"""Scaled Hermite polynomials instead of monomials (HiCache, arXiv 2508.16984).

Contraction by SIGMA keeps high orders from running away over long intervals.
"""

from __future__ import annotations

import math

from flashomni.engine.forecasts import forecast

SIGMA = 0.5


@forecast
def coefficients(order: int, x: float) -> list[float]:
    """``SIGMA ** i * (H_i(SIGMA * x) - H_i(0)) / i!`` with the physicists' H_i; 1 for i = 0.

    The constant H_i(0) is left out, so that the forecast passes through the last value at x = 0.
    """
    weights = [1.0]
    for i in range(1, order + 1):
        rise = _hermite(i, SIGMA * x) - _hermite(i, 0.0)
        weights.append(SIGMA**i * rise / math.factorial(i))
    return weights


def _hermite(n: int, x: float) -> float:
    """H_n by its recurrence H_{n+1} = 2x H_n - 2n H_{n-1}."""
    previous, current = 1.0, 2 * x
    if n == 0:
        return previous
    for i in range(1, n):
        previous, current = current, 2 * x * current - 2 * i * previous
    return current
