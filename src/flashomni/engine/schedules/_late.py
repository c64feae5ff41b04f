"""What schedules that decide while a generation runs have in common."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny  # what is divided by: nothing may have moved, or be there


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """``mean |new - old| / mean |old|`` over everything, batch included: fp32 scalar on the device.

    One number for all items of a batch, so that they, and all branches, do the same.
    """
    return (new.float() - old.float()).abs().mean() / old.float().abs().mean().clamp(min=TINY)


def alike(a: Any, b: Tensor) -> TypeGuard[Tensor]:
    """Whether ``a`` is a tensor that ``b`` can be compared with."""
    return isinstance(a, Tensor) and a.shape == b.shape and a.device == b.device


def must_compute(step: int, num_steps: int, first: int, computed: tuple[int, ...]) -> bool:
    """The first steps, the last, and one before which nothing was computed."""
    return step < first or step == num_steps - 1 or not computed
