"""Forecast, then calibrate (FoCa, arXiv 2508.16211): BDF2 predicts, Heun's rule corrects.

The paper goes on from its own predictions, step by step; every step is linear in the values at the
anchors, so the recursion runs on their weights. What it needs of the time before the last anchor
(a derivative there, and the value one step earlier) is taken from the parabola through the last
three anchors, which also holds where their distances differ: the paper has equal ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashomni.engine.forecasts import Known, forecast, from_differences


@forecast("foca")
def weights(times: Sequence[int], t: int, known: Known | None = None) -> list[float]:
    """The paper's equations 6 to 8 with steps of 1 from the last anchor to ``t``.

    One anchor is reuse, two continue their line. Lines are continued exactly; a parabola is not:
    the average with the slope at the last computed step keeps long gaps from running away. Of more
    than three anchors the last three count.
    """
    recent = times[-3:]
    last = torch.tensor(_at(recent, 0), dtype=torch.float64)
    before = torch.tensor(_at(recent, -1), dtype=torch.float64)
    anchored = torch.tensor(_slope(recent), dtype=torch.float64)
    slope = anchored
    for _ in range(t - times[-1]):
        predicted = (4 * last - before + 2 * slope) / 3
        ahead = (3 * predicted - 4 * last + before) / 2
        corrected = last + (anchored + ahead) / 2
        slope = (3 * corrected - 4 * last + before) / 2
        before, last = last, corrected
    return [0.0] * (len(times) - len(recent)) + last.tolist()


def _at(times: Sequence[int], x: float) -> list[float]:
    """Weights of the parabola through the anchors, x steps behind the last (Newton's form)."""
    gap = times[-1] - times[-2] if len(times) > 1 else 0
    return from_differences(times, [1.0, x, x * (x + gap) / 2][: len(times)])


def _slope(times: Sequence[int]) -> list[float]:
    """Weights of its derivative at the last anchor."""
    gap = times[-1] - times[-2] if len(times) > 1 else 0
    return from_differences(times, [0.0, 1.0, gap / 2][: len(times)])
