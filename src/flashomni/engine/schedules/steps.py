"""An explicit list of computed steps, resampled where a generation has another number of them.

Carries every method that plans before: a ramp, MagCache once calibrated, LeMiCa (2511.00090),
BudCache, a step mask of cache-dit.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashomni.engine.schedules import Plan, Schedule, schedule
from flashomni.policies import check_int


@schedule("steps")
@dataclass(frozen=True)
class Steps(Schedule):
    """Compute the listed steps, dispatch the others.

    A list for ``of`` steps serves other counts too: the curve "share of the listed steps that lie
    before this share of the generation" is kept, the first and the last step stay computed, and as
    many steps are computed, in proportion.

    Args:
        steps: computed steps, ascending, beginning with 0.
        of: number of steps that the list is for.
        min_steps: runs of fewer steps compute everything; 0 never protects a run.
    """

    steps: tuple[int, ...] = (0, 1, 2, 4, 6, 9, 13, 18, 22, 25, 27)
    of: int = 28
    min_steps: int = 0

    def __post_init__(self) -> None:
        check_int("of", self.of, 1, 100_000)
        check_int("min_steps", self.min_steps, 0, 1000)
        steps = tuple(self.steps) if isinstance(self.steps, (list, tuple)) else ()
        good = steps and all(isinstance(s, int) and not isinstance(s, bool) for s in steps)
        if not good or steps[0] != 0 or list(steps) != sorted(set(steps)) or steps[-1] >= self.of:
            raise ValueError(
                f"steps must be ascending step numbers from 0 to {self.of - 1} (of = {self.of}), "
                f"beginning with 0, got {self.steps!r}"
            )
        object.__setattr__(self, "steps", steps)

    def plan(self, num_steps: int, order: int) -> Plan:
        """The list, or the list resampled."""
        if num_steps < self.min_steps:
            return Plan.of(range(num_steps), num_steps, order)
        return Plan.of(self.resampled(num_steps), num_steps, order, optimistic=True)

    def resampled(self, num_steps: int) -> list[int]:
        """The computed steps of a generation of ``num_steps``."""
        steps = self.steps
        if num_steps == self.of:
            return list(steps)
        if num_steps == 1:
            return [0]
        count = max(round(len(steps) * num_steps / self.of), min(len(steps), 2))
        count = min(count, num_steps)
        scale = (num_steps - 1) / max(self.of - 1, 1)
        found: list[int] = []
        for i in range(count):
            # Where the list has its share i / (count - 1), interpolated between two of its steps.
            place = i * (len(steps) - 1) / max(count - 1, 1)
            low = min(int(place), len(steps) - 1)
            high = min(low + 1, len(steps) - 1)
            at = (steps[low] + (steps[high] - steps[low]) * (place - low)) * scale
            least = found[-1] + 1 if found else 0
            found.append(min(max(round(at), least), num_steps - count + i))
        return found
