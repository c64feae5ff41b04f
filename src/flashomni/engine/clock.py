"""Which step of which generation this is, for which branch. No single source is trusted.

Most pipelines name no step, and many name no branch. What every pipeline does: it sets the
timesteps anew for each generation, it advances its scheduler once a step, and it calls the model
for its branches in the same order at every step. None of this needs a tensor's value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Tick:
    """One call of the model.

    Args:
        step: index in this generation, from 0.
        num_steps: of this generation.
        branch: key of the conditioning branch.
        new_run: whether this is the first call of a generation.
    """

    step: int
    num_steps: int
    branch: str
    new_run: bool


class Clock:
    """Counts the calls of a model.

    Args:
        pipe: the pipeline whose scheduler tells the steps; ``None`` for a bare model, which needs
            :meth:`announce` before each call.
    """

    def __init__(self, pipe: Any = None) -> None:
        self._pipe = pipe
        self._announced: tuple[int, int, str | None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the current generation: the next call starts one."""
        self._timesteps: Tensor | None = None
        self._index: int | None = None
        self._step = -1
        self._calls: dict[str, int] = {}

    def announce(self, step: int, num_steps: int, branch: str | None) -> None:
        """Say the position of the next call explicitly."""
        if num_steps < 1 or not 0 <= step < num_steps:
            raise ValueError(f"step must be from 0 to num_steps - 1, got {step} of {num_steps}")
        self._announced = (step, num_steps, branch)

    def tick(self, context: str | None) -> Tick:
        """Position of the call that is about to run.

        Args:
            context: the branch's name, where the pipeline gives one.

        Raises:
            ValueError: nothing tells the step.
        """
        if self._announced is not None:
            index, num_steps, branch = self._announced
            self._announced = None
            new_run = self._step < 0 or index < self._step
            new_step, self._index = new_run or index > self._step, None
            self._step = index
            return self._count(branch or context, num_steps, new_run, new_step)
        scheduler = getattr(self._pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if scheduler is None or timesteps is None or not hasattr(scheduler, "step_index"):
            raise ValueError(
                "nothing tells the engine which step this is: accelerate a pipeline whose "
                "scheduler has step_index, or call engine.step(i, num_steps) before each model call"
            )
        begin = getattr(scheduler, "begin_index", None) or 0
        index = begin if scheduler.step_index is None else scheduler.step_index
        new_run = timesteps is not self._timesteps or self._index is None or index < self._index
        new_step = new_run or index != self._index
        self._timesteps, self._index = timesteps, index
        self._step = 0 if new_run else self._step + new_step
        num_steps = getattr(self._pipe, "_num_timesteps", None) or len(timesteps) - begin
        return self._count(context, max(num_steps, self._step + 1), new_run, new_step)

    def _count(self, context: str | None, num_steps: int, new_run: bool, new_step: bool) -> Tick:
        """Name the branch: its context, and which call with it in this step."""
        if new_step:
            self._calls = {}
        name = context or "call"
        seen = self._calls.get(name, 0)
        self._calls[name] = seen + 1
        return Tick(self._step, num_steps, f"{name}#{seen}" if seen else name, new_run)
