"""Figures that no generation can have: then what counted them read memory of something else."""

from __future__ import annotations

import math
from typing import Any

# Rules of one's own may count a little beyond their share; what is off by half of all is a fault.
MOST_SPENT = 1.5
LEAST_SKIPPED = -0.5


def impossible(figures: Any, num_steps: int | None = None) -> list[str]:
    """What cannot be, in words; empty where all can.

    Args:
        figures: has ``computed``, ``flops_skipped`` and ``attention_spent``; numbers, text of a
            CSV, or ``None`` and ``""`` where nobody knows.
        num_steps: of the generation; no more can be computed.
    """
    most = math.inf if num_steps is None else num_steps
    limits = {
        "computed": (0.0, most),
        "flops_skipped": (LEAST_SKIPPED, 1.0),
        "attention_spent": (0.0, MOST_SPENT),
    }
    found = []
    for name, (low, high) in limits.items():
        value = getattr(figures, name)
        if value not in (None, "") and not low <= float(value) <= high:  # NaN is in no range
            found.append(f"{name} {float(value):g}, which lies from {low:g} to {high:g}")
    return found
