"""TeaCache (arXiv 2411.19108): how far the first block's modulated input has moved, rescaled.

A polynomial, fitted once a model, turns the relative change of the modulated input into that of the
output. A step that may be left out costs one small wait, in front of the first block; the first
step and the last read nothing. The embedders run in every step, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flashomni.engine.schedules import Schedule, Signals, StepKind, schedule
from flashomni.engine.schedules._late import alike, must_compute, relative_change
from flashomni.policies import check_int, check_range

# FLUX.1-dev, as published with the paper; highest power first.
FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


@schedule("teacache")
@dataclass(frozen=True)
class TeaCache(Schedule):
    """Leave steps out while the accumulated, rescaled change is below a threshold.

    Args:
        coefficients: of the polynomial, highest power first.
        threshold: delta: 0.25 to 0.8 in the paper for FLUX.
        first: steps at the start that are always computed.
    """

    decides: ClassVar[bool] = True
    modulates: ClassVar[bool] = True
    coefficients: tuple[float, ...] = FLUX
    threshold: float = 0.4
    first: int = 1

    def __post_init__(self) -> None:
        given = self.coefficients
        coefficients = tuple(given) if isinstance(given, (list, tuple)) else ()
        if not coefficients:
            raise ValueError(f"coefficients must be a list of numbers, got {given!r}")
        for coefficient in coefficients:
            check_range("coefficients", coefficient, -1e9, 1e9)
        object.__setattr__(self, "coefficients", coefficients)
        check_range("threshold", self.threshold, 0.0, 1e6)
        check_int("first", self.first, 1, 1000)

    def kind(self, step: int, num_steps: int, signals: Signals) -> StepKind:
        """Dispatch, unless the step has to be computed; what follows is decided inside."""
        if must_compute(step, num_steps, self.first, signals.computed):
            return StepKind.UPDATE
        return StepKind.DISPATCH

    def watch(self, layer: int, signals: Signals) -> None:
        """The step computes: the sum starts again."""
        signals.memory["input"], signals.memory["sum"] = _modulated(signals), 0.0

    def decide(self, layer: int, signals: Signals) -> bool:
        """One wait, for the change since the step before."""
        now, before = _modulated(signals), signals.memory.get("input")
        signals.memory["input"] = now
        if alike(before, now):
            change = float(relative_change(now, before))
            rescaled = 0.0
            for coefficient in self.coefficients:
                rescaled = rescaled * change + coefficient
            signals.memory["sum"] += rescaled
            if signals.memory["sum"] < self.threshold:
                return False
        signals.memory["sum"] = 0.0
        return True


def _modulated(signals: Signals) -> Tensor:
    if signals.modulated is None:
        raise NotImplementedError(
            "schedule teacache looks at the first block's modulated input, which nothing gives here"
        )
    return signals.modulated()
