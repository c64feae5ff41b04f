"""Gaps by the error of the forecasts, measured at every Update; a soft budget.

The step-size law of codes for differential equations: an error e after a gap g is allowed to be
``tolerance``, and grows like ``g ** (order + 1)``. SpeCa (arXiv 2509.11628) verifies its forecasts
too; the soft budget is SoftCap's PI law: the tolerance follows the steps computed beyond the plan.

No wait: the error is read one step after the Update that measured it, which by then has been left
out already. Hence no gap below 2 behind the first steps. Measuring reads each history once more in
an Update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from flashomni.engine.schedules import Schedule, Signals, StepKind, schedule
from flashomni.engine.schedules._late import must_compute
from flashomni.policies import check_int, check_range

GAIN, MEMORY = 20.0, 10.0  # of the PI law, per share of the generation beyond the plan


@schedule("adaptive")
@dataclass(frozen=True)
class Adaptive(Schedule):
    """Compute when the forecast is expected to be off by the tolerance.

    Args:
        tolerance: of the norm of the error over the norm of what is forecast.
        first: steps at the start that are always computed.
        max_gap: largest distance of two computed steps.
        order: of the forecast: how fast its error grows with the gap.
        budget: share of the steps that should be computed; 0 sets none. It is no limit: the
            tolerance moves until it holds.
    """

    measures: ClassVar[bool] = True
    tolerance: float = 0.05
    first: int = 3
    max_gap: int = 7
    order: int = 1
    budget: float = 0.0

    def __post_init__(self) -> None:
        check_range("tolerance", self.tolerance, 0.0, 1e6)
        check_int("first", self.first, 1, 1000)
        check_int("max_gap", self.max_gap, 2, 1000)
        check_int("order", self.order, 0, 3)
        check_range("budget", self.budget, 0.0, 1.0)

    def kind(self, step: int, num_steps: int, signals: Signals) -> StepKind:
        """No wait: what is read was measured before the last step."""
        memory, computed = signals.memory, signals.computed
        if must_compute(step, num_steps, self.first, computed):
            return StepKind.UPDATE
        gap = step - computed[-1]
        if gap < 2:
            return StepKind.DISPATCH
        if memory.get("anchor") != computed[-1]:
            memory["anchor"], memory["gap"] = computed[-1], self._next(signals)
        return StepKind.UPDATE if gap >= memory["gap"] else StepKind.DISPATCH

    def _next(self, signals: Signals) -> int:
        """The gap behind the last computed step."""
        computed = signals.computed
        gap = computed[-1] - computed[-2] if len(computed) > 1 else 1
        wanted = float(gap)
        if signals.error is not None:
            error = max(signals.error(), 1e-12)
            wanted *= (self._allowed(signals) / error) ** (1 / (self.order + 1))
        return max(min(math.floor(wanted), 2 * gap + 1, self.max_gap), 2)

    def _allowed(self, signals: Signals) -> float:
        """The tolerance, moved by the steps that were computed beyond the budget."""
        if self.budget == 0:
            return self.tolerance
        step, num_steps = signals.step, signals.num_steps
        later = max(self.budget * num_steps - self.first, 0.0) / max(num_steps - self.first, 1)
        planned = self.first + later * (step - self.first)
        beyond = (len(signals.computed) - planned) / num_steps
        signals.memory["beyond"] = signals.memory.get("beyond", 0.0) + beyond
        return self.tolerance * math.exp(GAIN * beyond + MEMORY * signals.memory["beyond"])
