"""Taylor series in the step index (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flashomni.engine.forecasts import Known, forecast, from_differences


@forecast("taylor")
def weights(times: Sequence[int], t: int, known: Known | None = None) -> list[float]:
    """The differences taken for derivatives: ``sum_i x ** i / i! f_i``, x steps behind the last.

    One anchor is reuse, two continue a line exactly whatever their distance. From three on it is
    the paper's formula, no interpolation: a parabola is met but for ``x f_2 gap / 2``.
    """
    x = t - times[-1]
    return from_differences(times, [x**i / math.factorial(i) for i in range(len(times))])
