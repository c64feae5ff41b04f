"""What a schedule and its forecasts cost, in relative square error of the final latents.

At step t a forecast is off by e_t, known from the Gram matrix of a dense run. Errors add up, signs
and all: ``E_k = sum_{t < k} a_t d_t e_t``, with the scheduler's direct effects d and the part a_t
of an error that is left at the end in its own direction. E_T is one part of the result's error. The
other is what the network adds whenever it computes and sees latents that are off: the gain across,
q_t, of an error that stays from step t on. A computed step k adds
``(q(k-1)^2 - q(next computed - 1)^2) |E_k|^2 / a(k-1)^2``.

The sum is a quadratic form of all weights of all forecasts, so the best weights of a schedule are
the solution of one small linear system. They are not those that forecast best: after each computed
step the following forecasts also make good what the earlier ones did wrong, now that its direction
is known, as a corrector does in a multistep method. Weights that only forecast well are the special
case of a network that looks at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashomni.engine.forecasts import FORECASTS, Fitted, Known
from flashomni.engine.forecasts._joint import TINY, anchors_of, joint_weights


class Costs:
    """Predicted costs of plans for one model at one number of steps.

    Args:
        grams: ``[prompts, T, T]``, see :func:`flashomni.tuning.record.gram`.
        effects: ``[T]``, what a unit of the output at a step does to the final latents.
        gains: ``[2, T]``, what the network makes of an error: along it, and across.
        sigmas: noise level of each step and the end, for forecasts that ask; none if not known.
    """

    def __init__(
        self,
        grams: np.ndarray,
        effects: np.ndarray,
        gains: np.ndarray,
        sigmas: Sequence[float] = (),
    ) -> None:
        self.grams, self.gains, self.num_steps = grams, gains, len(effects)
        self.sigmas = tuple(sigmas)
        self._direct = effects
        self.effects = effects * gains[0]
        # What is added cannot be less than what later steps add, but by noise of the measurement.
        self.across = np.maximum.accumulate(gains[1][::-1])[::-1] ** 2

    def forecasts(self, computed: Sequence[int], order: int, name: str) -> np.ndarray:
        """Weights of a named forecast: ``[T, T]``, a row each step, 1 at itself where computed."""
        ahead = (tuple(sorted(computed)), self.sigmas)
        known = Known(self.num_steps, None, order, *ahead)
        weights = np.eye(self.num_steps)
        for step, anchors in anchors_of(computed, order, self.num_steps).items():
            weights[step] = 0.0
            weights[step, anchors] = FORECASTS.get(name)(anchors, step, known)
        return weights

    def masses(self, computed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The computed steps behind the first, and the end; what the error before each counts."""
        looks = np.array([step for step in sorted(computed) if step > 0], dtype=int)
        ends = np.append(looks, self.num_steps)
        before = self.across[ends - 1]
        added = (before[:-1] - before[1:]) / self.gains[0][looks - 1] ** 2
        return ends, np.append(added, 1.0)

    def of(self, computed: Sequence[int], weights: np.ndarray) -> np.ndarray:
        """Cost for each prompt, ``[prompts]``: relative square error of the final latents."""
        errors = np.cumsum(self._errors(weights), axis=0)
        ends, masses = self.masses(computed)
        seen = errors[ends - 1]
        return np.maximum(np.einsum("k,ks,pst,kt->p", masses, seen, self.grams, seen), TINY)

    def _errors(self, weights: np.ndarray) -> np.ndarray:
        """What each step adds to the error of the final latents, by outputs: ``[T, T]``."""
        return self.effects[:, None] * (weights - np.eye(self.num_steps))

    def fit(
        self, computed: Sequence[int], order: int, ridge: float, base: str = "hermite"
    ) -> np.ndarray:
        """The weights that cost least; those of a step sum to 1.

        Every prompt counts by how much worse than the base it is: the mean of logarithms, about.

        Args:
            computed: steps that are computed.
            order: ``order + 1`` anchors.
            ridge: what draws the weights towards reuse, over the diagonal of the system.
            base: the forecast that prompts are weighed by.
        """
        anchors = anchors_of(computed, order, self.num_steps)
        gram = self._weighed(computed, order, base)
        return joint_weights(gram, self.effects, self._later(computed), anchors, ridge)

    def _weighed(self, computed: Sequence[int], order: int, base: str) -> np.ndarray:
        costs = self.of(computed, self.forecasts(computed, order, base))
        return (self.grams / costs[:, None, None]).mean(0)

    def _later(self, computed: Sequence[int]) -> np.ndarray:
        """Sum of the masses that see an error made at each step: ``[T]``."""
        ends, masses = self.masses(computed)
        return np.array([masses[ends > step].sum() for step in range(self.num_steps)])

    def without(self, prompt: int) -> Costs:
        """The costs of all prompts but one."""
        others = np.delete(self.grams, prompt, axis=0)
        return Costs(others, self._direct, self.gains, self.sigmas)

    def only(self, prompt: int) -> Costs:
        """The costs of one prompt."""
        own = self.grams[prompt : prompt + 1]
        return Costs(own, self._direct, self.gains, self.sigmas)


def decibels(costs: np.ndarray) -> float:
    """Mean over prompts, as dB of signal to noise in the final latents."""
    return float(np.mean(-10.0 * np.log10(costs)))


def choose_fit(
    costs: Costs,
    computed: Sequence[int],
    orders: Sequence[int] = (1, 2, 3),
    ridges: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
) -> tuple[int, float]:
    """Order and ridge of the fit that are best on prompts it does not see: one is left out in turn.

    With one prompt there is nothing to choose by: order 2 and the middle of the ridges.
    """
    count = len(costs.grams)
    if count == 1:
        return 2, 1e-2
    best, chosen = -np.inf, (2, 1e-2)
    for order in orders:
        for ridge in ridges:
            found = []
            for prompt in range(count):
                weights = costs.without(prompt).fit(computed, order, ridge)
                found.append(costs.only(prompt).of(computed, weights)[0])
            value = decibels(np.array(found))
            if value > best:
                best, chosen = value, (order, ridge)
    return chosen


def as_fitted(
    weights: np.ndarray, computed: Sequence[int], order: int, base: str = "hermite"
) -> Fitted:
    """Weights as a recipe keeps them."""
    num_steps = len(weights)
    entries = tuple(
        (anchors, step, tuple(float(f"{weights[step, at]:.8g}") for at in anchors))
        for step, anchors in anchors_of(computed, order, num_steps).items()
    )
    return Fitted(num_steps, entries, base)
