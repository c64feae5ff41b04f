"""Chebyshev polynomials fitted by ridge regression, blended with a line (Spectrum, 2603.01623).

As published: time mapped to [-1, 1] over the whole generation, polynomials up to degree 4, ridge
0.1; half of the result is the line through the last two values, as the authors advise since. Not as
published: the window is what the cache keeps (``order + 1`` anchors, 4 at most) where Spectrum
keeps ten or all, and the ridge leaves the constant alone, because with so few anchors it would
shrink what does not change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashomni.engine.forecasts import Known, forecast

DEGREE = 4
RIDGE = 0.1
SHARE = 0.5  # of the polynomials; the rest is the line


@forecast("chebyshev")
def weights(times: Sequence[int], t: int, known: Known | None = None) -> list[float]:
    """``SHARE`` of the fit and the rest of the line; one anchor is reuse.

    Where the length of the generation is not known, time is mapped over anchors and ``t``.
    """
    start, stop = (times[0], t) if known is None else (0, known.num_steps - 1)
    design = _basis(times, start, stop)
    penalty = RIDGE * torch.eye(DEGREE + 1, dtype=torch.float64)
    penalty[0, 0] = 0.0
    solved = torch.linalg.solve(design.T @ design + penalty, design.T)
    fitted = (_basis([t], start, stop) @ solved)[0]
    line = torch.zeros(len(times), dtype=torch.float64)
    line[-1] = 1.0
    if len(times) > 1:
        x = (t - times[-1]) / (times[-1] - times[-2])
        line[-1] += x
        line[-2] -= x
    return (SHARE * fitted + (1 - SHARE) * line).tolist()


def _basis(times: Sequence[int], start: int, stop: int) -> torch.Tensor:
    """T_0 .. T_DEGREE at the times, ``[len(times), DEGREE + 1]``."""
    tau = 2 * (torch.tensor(times, dtype=torch.float64) - start) / max(stop - start, 1) - 1
    columns = [torch.ones_like(tau), tau]
    for _ in range(2, DEGREE + 1):
        columns.append(2 * tau * columns[-1] - columns[-2])
    return torch.stack(columns[: DEGREE + 1], dim=1)
