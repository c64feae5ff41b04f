"""Dense warm-up, then one Update and N - 1 Dispatch steps in turn, dense end.

arXiv 2509.25401, section 3.2; the schedule of FORA (2407.01425) and TaylorSeer (2503.06923). With
``growth`` the intervals lengthen as in Spectrum (2603.01623).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flashomni.engine.schedules import Plan, Schedule, schedule
from flashomni.policies import check_int, check_range


@schedule("interval")
@dataclass(frozen=True)
class Interval(Schedule):
    """One Update every N steps after a dense warm-up.

    Args:
        interval: N, the distance between two Updates.
        warmup: share of the steps that run dense first; the last of them is the first Update.
        min_steps: runs of fewer steps compute everything; 0 never protects a run.
        growth: by how much each interval is longer than the one before, rounded down.
    """

    interval: int = 6
    warmup: float = 0.16
    min_steps: int = 0
    growth: float = 0.0

    def __post_init__(self) -> None:
        check_int("interval", self.interval, 1, 1000)
        check_range("warmup", self.warmup, 0.0, 1.0)
        check_int("min_steps", self.min_steps, 0, 1000)
        check_range("growth", self.growth, 0.0, 1000.0)

    def plan(self, num_steps: int, order: int) -> Plan:
        """Warm-up, then every N-th step (with growth, ever fewer), and the last."""
        if num_steps < self.min_steps:
            return Plan.of(range(num_steps), num_steps, order)
        first = max(math.ceil(self.warmup * num_steps) - 1, 0)
        later, at = [], first
        while at < num_steps:
            later.append(at)
            at += math.floor(self.interval + self.growth * (len(later) - 1) + 1e-9)
        return Plan.of({*range(first), *later, num_steps - 1}, num_steps, order)
