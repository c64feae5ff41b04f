"""Taylor series in the step index (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

import math

from flashomni.engine.forecasts import forecast


@forecast
def coefficients(order: int, x: float) -> list[float]:
    """``x ** i / i!``; order 0 reuses the last value."""
    return [x**i / math.factorial(i) for i in range(order + 1)]
