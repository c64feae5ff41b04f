"""Dense at first, then ever larger gaps, smaller ones again at the end; no calibration.

What the presets use. Planned schedules (LeMiCa, 2511.00090; DPCache, 2602.22654; BudCache) found
this shape on one model after another: early steps lay out the picture, late ones finish it.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashomni.engine.schedules import Plan, Schedule, schedule
from flashomni.engine.schedules.steps import Steps
from flashomni.policies import check_int, check_range

POWER = 1.5  # how gaps grow towards the largest one


@schedule("ramp")
@dataclass(frozen=True)
class Ramp(Schedule):
    """Compute so many steps, with gaps that grow to a peak and shrink again.

    The i-th of n gaps is in proportion to ``low + (1 - low) x ** 1.5``, where x rises from 0 at the
    start to 1 at the peak with ``low = start``, and falls to 0 at the end with ``low = end``; no
    gap is less than a step. Other step counts resample that list, as ``steps`` does.

    Args:
        computed: steps that are computed, the first and the last among them.
        of: number of steps that this is for.
        start: first gap over the largest.
        end: last gap over the largest.
        peak: share of the gaps that lie before the largest.
        min_steps: runs of fewer steps compute everything; 0 never protects a run.
    """

    computed: int = 10
    of: int = 28
    start: float = 0.1
    end: float = 0.6
    peak: float = 0.65
    min_steps: int = 0

    def __post_init__(self) -> None:
        check_int("of", self.of, 2, 100_000)
        check_int("computed", self.computed, 2, self.of)
        check_range("start", self.start, 0.0, 1.0)
        check_range("end", self.end, 0.0, 1.0)
        check_range("peak", self.peak, 0.0, 1.0)
        check_int("min_steps", self.min_steps, 0, 1000)

    def plan(self, num_steps: int, order: int) -> Plan:
        """The ramp, or the ramp resampled."""
        return Steps(self.steps(), self.of, self.min_steps).plan(num_steps, order)

    def steps(self) -> tuple[int, ...]:
        """The computed steps of a generation of ``of`` steps."""
        count = self.computed - 1
        gaps = [self._gap((i + 0.5) / count) for i in range(count)]
        total, done, found = sum(gaps), 0.0, [0]
        for i, gap in enumerate(gaps):
            done += gap
            place = round(done / total * (self.of - 1)) if total > 0 else 0
            latest = self.of - count + i  # so that one step is left for each further one
            found.append(min(max(place, found[-1] + 1), latest))
        return tuple(found)

    def _gap(self, at: float) -> float:
        """The gap at this share of all gaps, over the largest."""
        rises = at < self.peak
        low = self.start if rises else self.end
        x = at / self.peak if rises else (1 - at) / max(1 - self.peak, 1e-9)
        return low + (1 - low) * min(x, 1.0) ** POWER
