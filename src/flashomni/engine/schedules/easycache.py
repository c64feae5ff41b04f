"""EasyCache (arXiv 2507.02860): the rate at which the output follows the input, held between steps.

No calibration. A step that may be left out costs one small wait: the change of the latents is read
there. The first steps and the last read nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flashomni.engine.schedules import Schedule, Signals, StepKind, schedule
from flashomni.engine.schedules._late import TINY, alike, must_compute
from flashomni.policies import check_int, check_range


@schedule("easycache")
@dataclass(frozen=True)
class EasyCache(Schedule):
    """Leave steps out while the output is expected to have changed by little.

    With k = |v - v'| / |x - x'| of the last two computed steps (mean absolute values; x the
    latents, v the output), each step adds ``k |x - x of the step before| / |v|`` to a sum; it is
    computed, and the sum starts again, once that reaches the threshold.

    Args:
        threshold: tau: 0.025 in the paper for HunyuanVideo, 0.05 for Wan2.1.
        first: R, steps at the start that are always computed.
    """

    learns: ClassVar[bool] = True
    threshold: float = 0.05
    first: int = 5

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0.0, 1e6)
        check_int("first", self.first, 1, 1000)

    def kind(self, step: int, num_steps: int, signals: Signals) -> StepKind:
        """One wait where the step may be left out."""
        memory, x = signals.memory, signals.latents
        before, memory["latents"] = memory.get("latents"), None if x is None else x.clone()
        free = not must_compute(step, num_steps, self.first, signals.computed)
        if x is not None and free and "rate" in memory and alike(before, x):
            change = (x.float() - before.float()).abs().mean()
            memory["sum"] += float(memory["rate"] * change / memory["size"])
            if memory["sum"] < self.threshold:
                return StepKind.DISPATCH
        memory["sum"] = 0.0
        return StepKind.UPDATE

    def learn(self, output: Tensor, signals: Signals) -> None:
        """The rate, of this computed step and the one before."""
        memory, v = signals.memory, output.float()
        x, old_x, old_v = memory.get("latents"), memory.get("x"), memory.get("v")
        if x is None:
            return
        if alike(old_x, x) and alike(old_v, v):
            moved = (x.float() - old_x.float()).abs().mean().clamp(min=TINY)
            memory["rate"] = (v - old_v).abs().mean() / moved
        memory["x"], memory["v"], memory["size"] = x, v, v.abs().mean().clamp(min=TINY)
