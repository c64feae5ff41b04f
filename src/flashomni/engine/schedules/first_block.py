"""First Block Cache (ParaAttention) and DBCache (cache-dit): what the first blocks add decides.

The first ``front`` blocks run in every step; where what they add to the vision tokens has changed
by little since the last computed step, all others but the last ``back`` come from the cache. A step
that may be left out costs one small wait behind the first blocks; steps that compute anyway read
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flashomni.engine.schedules import Schedule, Signals, StepKind, schedule
from flashomni.engine.schedules._late import alike, must_compute, relative_change
from flashomni.policies import check_int, check_range


@schedule("first_block")
@dataclass(frozen=True)
class FirstBlock(Schedule):
    """Compute the rest where the first blocks' addition has moved.

    Args:
        front: F_n, blocks at the start that are computed in every step.
        back: B_n, blocks at the end, likewise.
        threshold: of ``mean |r - r'| / mean |r'|``, r what the first blocks add now, r' at the last
            computed step: 0.08 to 0.12 for FBCache on FLUX.
        first: steps at the start that are always computed (cache-dit's warm-up).
        max_gap: most steps that are left out in a row; 0 sets no limit.
    """

    decides: ClassVar[bool] = True
    front: int = 1
    back: int = 0
    threshold: float = 0.08
    first: int = 1
    max_gap: int = 0

    def __post_init__(self) -> None:
        check_int("front", self.front, 1, 1000)
        check_int("back", self.back, 0, 1000)
        check_range("threshold", self.threshold, 0.0, 1e6)
        check_int("first", self.first, 1, 1000)
        check_int("max_gap", self.max_gap, 0, 1000)

    def kind(self, step: int, num_steps: int, signals: Signals) -> StepKind:
        """Dispatch, unless the step has to be computed; what follows is decided inside."""
        due = self.max_gap and signals.computed and step - signals.computed[-1] > self.max_gap
        if due or must_compute(step, num_steps, self.first, signals.computed):
            return StepKind.UPDATE
        return StepKind.DISPATCH

    def watch(self, layer: int, signals: Signals) -> None:
        """The step computes: later ones are compared with it."""
        signals.memory["added"] = self._added(signals)

    def decide(self, layer: int, signals: Signals) -> bool:
        """One wait, for the change since the last computed step."""
        now, before = self._added(signals), signals.memory.get("added")
        if alike(before, now) and float(relative_change(now, before)) < self.threshold:
            return False
        signals.memory["added"] = now
        return True

    def _added(self, signals: Signals) -> Tensor:
        behind, before = signals.streams[signals.main], signals.entrance[signals.main]
        if behind.shape != before.shape:
            raise ValueError(
                f"front = {self.front} of schedule first_block reaches beyond the blocks that have "
                f"vision tokens to themselves: {list(before.shape)} became {list(behind.shape)}"
            )
        return behind - before
