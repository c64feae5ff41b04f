"""Weights that calibration found, kept in the recipe: what TCC (2605.24870) and ScalingCache fit.

The recipe's ``forecast.fitted`` holds one list of weights for each pair of anchors and step::

    "forecast": {"name": "fitted", "layer_order": 2, "fitted": {
        "num_steps": 28, "base": "hermite",
        "weights": [[[2, 4, 6], 7, [0.1, -0.6, 1.5]], ...]}}

A pair that is not listed, and a generation of another number of steps, take the forecast ``base``.
"""

from __future__ import annotations

from collections.abc import Sequence

from flashomni.engine.forecasts import FORECASTS, Known, forecast


@forecast("fitted")
def weights(times: Sequence[int], t: int, known: Known | None = None) -> list[float]:
    """As listed, or as the base says."""
    table = None if known is None else known.fitted
    if table is None:
        raise ValueError("forecast fitted needs the weights that a calibration found: fitted={...}")
    if known is not None and known.num_steps == table.num_steps:
        for anchors, step, found in table.weights:
            if step == t and anchors == tuple(times):
                return list(found)
    return FORECASTS.get(table.base)(times, t, known)
