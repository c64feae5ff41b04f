"""Weights that calibration found, kept in the recipe: what TCC (2605.24870) and ScalingCache fit.

The recipe's ``forecast.fitted`` holds one list of weights for each pair of anchors and step::

    "forecast": {"name": "fitted", "layer_order": 2, "fitted": {
        "num_steps": 28, "base": "hermite",
        "weights": [[[2, 4, 6], 7, [0.1, -0.6, 1.5]], ...]}}

A pair that is not listed, and a generation of another number of steps, take the forecast ``base``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flashomni.engine.forecasts import FORECASTS, Entry, Fitted, Known, forecast


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


def fit(
    gram: Tensor, computed: Iterable[int], order: int, ridge: float = 1e-3, base: str = "hermite"
) -> Fitted:
    """The weights that would have been best where what is forecast is known: for a tuner.

    Least squares with weights that sum to 1, drawn towards reuse by the ridge.

    Args:
        gram: ``[T, T]``, inner products of the values at all steps of dense runs, summed over runs.
        computed: steps that the schedule computes.
        order: of the forecast: ``order + 1`` anchors.
        ridge: over the mean square of the anchors' differences.
        base: the forecast for what is not listed.

    Raises:
        ValueError: the matrix is not square, or a step lies outside of it.
    """
    gram, ordered = gram.detach().double().cpu(), sorted(set(computed))
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be a square matrix, got shape {list(gram.shape)}")
    num_steps = len(gram)
    if not ordered or ordered[0] < 0 or ordered[-1] >= num_steps:
        raise ValueError(f"computed must be steps from 0 to {num_steps - 1}, got {ordered}")
    entries: list[Entry] = []
    for step in range(ordered[0], num_steps):
        anchors = [anchor for anchor in ordered if anchor < step][-(order + 1) :]
        if step not in ordered:
            entries.append((tuple(anchors), step, _solve(gram, anchors, step, ridge)))
    return Fitted(num_steps, tuple(entries), base)


def _solve(gram: Tensor, anchors: list[int], step: int, ridge: float) -> tuple[float, ...]:
    """Weights of the anchors' values, by those of their differences from the last."""
    *older, last = anchors
    if not older:
        return (1.0,)

    def products(rows: list[int], columns: list[int]) -> Tensor:
        """Of ``v_row - v_last`` and ``v_column - v_last``."""
        part = gram[rows][:, columns] - gram[rows][:, [last]] - gram[[last]][:, columns]
        return part + gram[last, last]

    normal, side = products(older, older), products(older, [step])
    normal = normal + (ridge * normal.diagonal().mean() + 1e-300) * torch.eye(len(older))
    found = torch.linalg.solve(normal, side)[:, 0].tolist()
    return (*found, 1.0 - sum(found))
