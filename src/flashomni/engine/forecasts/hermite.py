"""Scaled Hermite polynomials instead of monomials (HiCache, arXiv 2508.16984).

Contraction by SIGMA keeps high orders from running away over long intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flashomni.engine.forecasts import Known, forecast, from_differences

SIGMA = 0.5


@forecast("hermite")
def weights(times: Sequence[int], t: int, known: Known | None = None) -> list[float]:
    """``sum_i SIGMA ** i (H_i(SIGMA x) - H_i(0)) / i! f_i`` with the physicists' H_i; 1 for i = 0.

    x counts the steps behind the last anchor. The constant H_i(0) is left out, so that the forecast
    passes through the last value at x = 0.
    """
    x = t - times[-1]
    coefficients = [1.0]
    for i in range(1, len(times)):
        rise = _hermite(i, SIGMA * x) - _hermite(i, 0.0)
        coefficients.append(SIGMA**i * rise / math.factorial(i))
    return from_differences(times, coefficients)


def _hermite(n: int, x: float) -> float:
    """H_n by its recurrence H_{n+1} = 2x H_n - 2n H_{n-1}."""
    previous, current = 1.0, 2 * x
    if n == 0:
        return previous
    for i in range(1, n):
        previous, current = current, 2 * x * current - 2 * i * previous
    return current
