"""The weights of all forecasts of a generation at once, of least squares.

What a forecast is off by at step t is a weighted sum of outputs, and so is the error of the latents
before step k, ``E_k = sum_{t < k} effect_t error_t``. Where each computed step, and the end, counts
``mass_k |E_k|^2``, their sum is one quadratic form of all weights: an error made at t counts, and
with it its products with every other, as much as all that comes behind it sees of it,
``later_t = sum_{k > t} mass_k``. The least of it is one small linear system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

TINY = 1e-300


def anchors_of(computed: Sequence[int], order: int, num_steps: int) -> dict[int, tuple[int, ...]]:
    """The anchors of each step that is left out: the last ``order + 1`` computed ones before it."""
    ordered = sorted(computed)
    return {
        step: tuple([at for at in ordered if at < step][-(order + 1) :])
        for step in range(num_steps)
        if step not in ordered
    }


def joint_weights(
    gram: np.ndarray,
    effects: np.ndarray,
    later: np.ndarray,
    anchors: Mapping[int, tuple[int, ...]],
    ridge: float,
) -> np.ndarray:
    """The weights that cost least; those of a step sum to 1.

    Args:
        gram: ``[T, T]``, inner products of the outputs.
        effects: ``[T]``, what a unit of the output at a step does to the latents.
        later: ``[T]``, how much an error counts that is made at a step; not rising.
        anchors: of each step that is left out, oldest first, see :func:`anchors_of`.
        ridge: what draws the weights towards reuse, over the diagonal of the system.

    Returns:
        ``[T, T]``, a row each step, 1 at itself where it is computed.
    """
    weights = np.eye(len(effects))
    unknowns, steps, pairs = [], [], []
    for step, (*older, last) in anchors.items():
        weights[step] = 0.0
        weights[step, last] = 1.0
        for anchor in older:
            direction = np.zeros(len(effects))
            direction[anchor], direction[last] = effects[step], -effects[step]
            unknowns.append(direction)
            steps.append(step)
            pairs.append((step, anchor, last))
    if not unknowns:
        return weights
    directions, at = np.array(unknowns), np.array(steps)
    products = directions @ gram
    system = products @ directions.T * later[np.maximum.outer(at, at)]
    together = later[np.maximum.outer(at, np.arange(len(effects)))]
    errors = effects[:, None] * (weights - np.eye(len(effects)))
    side = (products @ errors.T * together).sum(1)
    diagonal = system.diagonal()
    system = system + np.diag(ridge * diagonal + 1e-12 * diagonal.max() + TINY)
    found = np.linalg.solve(system, -side)
    for value, (step, anchor, last) in zip(found, pairs, strict=True):
        weights[step, anchor] += value
        weights[step, last] -= value
    return weights
