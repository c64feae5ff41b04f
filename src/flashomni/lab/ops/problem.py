"""What a measurement consists of: our call, its definition to check against, and the baselines.

The ideal is the ratio to the baseline if time fell with the work: 1 / density against something
dense, 1 against something that skips the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashomni.lab.ops.shapes import Shape
from flashomni.lab.ops.timing import Run


@dataclass(frozen=True)
class Baseline:
    """Something to compare with.

    Args:
        run: what is timed.
        ideal: the ratio that would be linear.
        check: its relative error against ours, for what is not a library's own dense call.
    """

    run: Run
    ideal: float
    check: Callable[[], float] | None = None


@dataclass(frozen=True)
class Problem:
    """What to time.

    Args:
        backend: that runs ours.
        density: share of the work that is left.
        ours: the call.
        sets: how many sets of inputs the runs take in turn.
        baselines: by name.
        missing: baselines that cannot run here, and why.
        check: relative error of ours against the definition; ``None`` where another problem
            checks the same op.
    """

    backend: str
    density: float
    ours: Run
    sets: int
    baselines: dict[str, Baseline]
    missing: dict[str, str] = field(default_factory=dict)
    check: Callable[[], float] | None = None


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    shape: Shape
    density: float
    device: torch.device
    dtype: torch.dtype
    backend: str | None = None
    baselines: Collection[str] | None = None

    def wants(self, name: str) -> bool:
        """Whether to measure against the baseline of this name; against all if none was named."""
        return self.baselines is None or name in self.baselines

    @property
    def sets(self) -> int:
        """Enough that they do not all stay in the L2 cache of a GPU."""
        return 4 if self.device.type == "cuda" and self.shape.seqlen < 8192 else 1

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def many(self, *shape: int) -> list[Tensor]:
        return [self.randn(*shape) for _ in range(self.sets)]


def relative(got: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm; NaN, which no limit lets pass, if nothing was computed."""
    return ((got.float() - exact.float()).norm() / exact.float().norm()).item()
