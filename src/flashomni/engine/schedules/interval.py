"""Which step does what: dense warm-up, one Update and N - 1 Dispatch steps in turn, dense end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class StepKind(Enum):
    """What a step does in every layer."""

    FULL = "full"
    UPDATE = "update"
    DISPATCH = "dispatch"


@dataclass(frozen=True)
class Schedule:
    """Step index and number of steps -> kind (arXiv 2509.25401, section 3.2).

    Args:
        interval: N, the distance between two Updates.
        warmup: share of the steps that run dense first; the last of them is the first Update.
        order: forecast order: as many steps before the first Update record their output, so that
            the first interval already has all its differences.
    """

    interval: int
    warmup: float
    order: int = 0

    def first_update(self, num_steps: int) -> int:
        """Index of the first Update."""
        return max(math.ceil(self.warmup * num_steps) - 1, 0)

    def kind(self, step: int, num_steps: int) -> StepKind:
        """What ``step`` (from 0) of ``num_steps`` does. The last step is always dense."""
        last, since = num_steps - 1, step - self.first_update(num_steps)
        if step >= last or since < 0:
            return StepKind.FULL
        if since % self.interval:
            return StepKind.DISPATCH
        # An Update that no Dispatch step follows would choose symbols for nobody.
        useless = self.interval == 1 or step + 1 >= last
        return StepKind.FULL if useless else StepKind.UPDATE

    def records(self, step: int, num_steps: int) -> bool:
        """Whether a dense warm-up step must add its output to the history."""
        first = self.first_update(num_steps)
        return first - self.order <= step < first

    def probes(self, step: int, num_steps: int) -> bool:
        """Whether a dense warm-up step measures what share of the tiles the policy would compute.

        It lies two steps before the first that records, so that the host finds the number there
        without waiting, and the first interval can cache whole layers already.
        """
        first = self.first_update(num_steps)
        return first > 0 and step == max(first - self.order - 2, 0)
