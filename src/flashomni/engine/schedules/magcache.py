"""MagCache (arXiv 2506.09045): skip while the magnitudes say that the error is small.

The ratio gamma_t of the mean magnitudes of what the model adds at two steps in a row hardly depends
on the prompt. A reused addition is off by about ``|1 - product of the ratios since|``; steps are
left out while the sum of that stays below a threshold. All of it is known before the first step, so
nothing is read from the device.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashomni.engine.schedules import Plan, Schedule, schedule
from flashomni.policies import check_int, check_range

# FLUX.1-dev, 28 steps, as published with the paper.
FLUX = (
    1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344,
    0.98047, 1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047,
    0.98828, 0.96484, 0.95703, 0.93359, 0.89062,
)  # fmt: skip


@schedule("magcache")
@dataclass(frozen=True)
class MagCache(Schedule):
    """Leave steps out while the accumulated error of the magnitudes is below a threshold.

    Args:
        ratios: gamma_t of each step, 1 for the first; measured on the model with one prompt. Other
            step counts take the nearest.
        threshold: of the accumulated error; the paper's 0.24 is fast, 0.06 to 0.12 careful.
        max_skip: K, most steps that are left out in a row.
        retention: share of the steps, at the start, that always compute.
    """

    ratios: tuple[float, ...] = FLUX
    threshold: float = 0.24
    max_skip: int = 5
    retention: float = 0.1

    def __post_init__(self) -> None:
        ratios = tuple(self.ratios) if isinstance(self.ratios, (list, tuple)) else ()
        if not ratios:
            raise ValueError(f"ratios must be a list of numbers, got {self.ratios!r}")
        for ratio in ratios:
            check_range("ratios", ratio, 0.0, 1e6)
        object.__setattr__(self, "ratios", ratios)
        check_range("threshold", self.threshold, 0.0, 1e6)
        check_int("max_skip", self.max_skip, 0, 1000)
        check_range("retention", self.retention, 0.0, 1.0)

    def plan(self, num_steps: int, order: int) -> Plan:
        """The rule of the paper, run through before the first step."""
        first = max(int(self.retention * num_steps + 0.5), 1)
        computed, ratio, error, skipped = list(range(min(first, num_steps))), 1.0, 0.0, 0
        for step in range(first, num_steps):
            ratio *= self._ratio(step, num_steps)
            error += abs(1.0 - ratio)
            skipped += 1
            if error > self.threshold or skipped > self.max_skip:
                computed.append(step)
                ratio, error, skipped = 1.0, 0.0, 0
        return Plan.of(computed, num_steps, order, optimistic=True)

    def _ratio(self, step: int, num_steps: int) -> float:
        last = len(self.ratios) - 1
        return self.ratios[round(step * last / max(num_steps - 1, 1))]
