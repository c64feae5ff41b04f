"""Which step of which generation a call of the model is, for which branch.

No single source is trusted, the best one that speaks is taken:

1. what the caller announced (``engine.step``);
2. what the pipeline says in diffusers' cache context (``step_index``, ``num_inference_steps``);
3. the pipeline that is calling: how far its scheduler has come, and how many steps it plans;
4. the scheduler of the pipeline that was accelerated, once a loop around it is under way.

None of this needs a tensor's value.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flashomni.engine.callers import StepCounter, calling_pipeline, own_steps, step_index, weakly


@dataclass(frozen=True)
class Position:
    """Where a call of the model stands.

    Args:
        key: of the generation's owner: an announced name, the pipeline that is calling, or the one
            whose scheduler is asked. What calls by itself goes on with no generation of a
            pipeline, which may have been given up in the midst of its steps.
        index: the owner's own count of steps; it grows within a generation.
        step: of the generation, from 0, where the owner says it; ``None`` where it is counted.
        num_steps: of the generation; where transformers share a pipeline's steps, of this one's.
        branch: name of the conditioning branch, if the caller gives one.
        timesteps: the scheduler's, whose identity is that of a run; ``None`` where none is known.
        announced: whether the caller said it in so many words.
        first: step of the owner at which the model's own steps begin.
        scheduler: of the pipeline that is calling; ``None`` where none is known.
    """

    key: Hashable
    index: int
    step: int | None
    num_steps: int
    branch: str | None
    timesteps: Tensor | None = None
    announced: bool = False
    first: int = 0
    scheduler: Any = None


class Clock:
    """Finds the position of each call.

    Args:
        model: the transformer.
        pipe: the pipeline that was accelerated; ``None`` for a bare transformer.
        beside: of another transformer of the pipeline: what is announced is for the one called.
    """

    def __init__(self, model: nn.Module, pipe: Any = None, beside: Clock | None = None) -> None:
        self._model = model
        self._pipe = None if pipe is None else weakly(pipe)
        # Each thread announces its own calls.
        self._said: threading.local = threading.local() if beside is None else beside._said
        self._counters: list[StepCounter] = []
        self._shared: tuple[Tensor | None, range | None] = (None, None)
        if pipe is not None:
            self._watch(getattr(pipe, "scheduler", None))

    def announce(
        self, step: int, num_steps: int, branch: str | None, generation: Hashable = None
    ) -> None:
        """Say the position of this thread's next call.

        Raises:
            ValueError: a number is out of range or of the wrong type.
        """
        for name, value in (("step", step), ("num_steps", num_steps)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        if num_steps < 1 or not 0 <= step < num_steps:
            raise ValueError(f"step must be from 0 to num_steps - 1, got {step} of {num_steps}")
        if branch is not None and not isinstance(branch, str):
            raise ValueError(f"branch must be a string or None, got {branch!r}")
        try:
            hash(generation)
        except TypeError:
            raise ValueError(f"generation must be a name, hashable, got {generation!r}") from None
        key = ("announced", generation)
        self._said.position = Position(key, step, step, num_steps, branch, announced=True)

    def forget(self) -> None:
        """Drop what was announced."""
        self._said.position = None

    def remove(self) -> None:
        """Take the counters off the schedulers."""
        for counter in self._counters:
            counter.release()
        self._counters.clear()

    def locate(self, context: Any) -> Position | None:
        """The position of the call that is about to run.

        Args:
            context: diffusers' cache context: ``None``, a name, or an object with ``name``.

        Returns:
            ``None`` for a call outside of every denoising loop: it belongs to no generation.

        Raises:
            ValueError: a bare transformer, and nothing tells the step.
        """
        name = getattr(context, "name", context)
        said = getattr(self._said, "position", None)
        if said is not None:
            self._said.position = None
            if said.branch is None and name is not None:
                said = Position(said.key, said.index, said.step, said.num_steps, name, None, True)
            return said
        pipe = calling_pipeline(self._model)
        is_calling = pipe is not None
        if pipe is None and self._pipe is not None:
            pipe = self._pipe()
        told, of = getattr(context, "step_index", None), getattr(context, "num_inference_steps", 0)
        if isinstance(told, int) and isinstance(of, int) and 0 <= told < of:
            scheduler = getattr(pipe, "scheduler", None)
            timesteps = getattr(scheduler, "timesteps", None)
            own = self._own(pipe, timesteps, range(of), told)
            at = (told, told - own.start, len(own), name, timesteps)
            return Position(_key(pipe), *at, first=own.start, scheduler=scheduler)
        if pipe is None:
            raise ValueError(
                "nothing tells the engine which step this is: accelerate a pipeline, or call "
                "engine.step(i, num_steps) before each call of the transformer"
            )
        return self._of_scheduler(pipe, name, is_calling)

    def _of_scheduler(self, pipe: Any, name: str | None, is_calling: bool) -> Position | None:
        scheduler = getattr(pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None:
            return None
        self._watch(scheduler)
        begin = getattr(scheduler, "begin_index", None) or 0
        index = step_index(scheduler)
        if not is_calling and (index is None or index >= len(timesteps)):
            return None  # a call by itself, before or after a loop
        planned = getattr(pipe, "_num_timesteps", None) if is_calling else None
        num_steps = planned if isinstance(planned, int) and planned > 0 else len(timesteps) - begin
        index = begin if index is None else index
        steps = range(begin, begin + max(num_steps, 1))
        own = self._own(pipe, timesteps, steps, index)
        at = (index, None, len(own), name, timesteps)
        key = _key(pipe, is_calling)
        return Position(key, *at, first=own.start - begin, scheduler=scheduler)

    def _own(self, pipe: Any, timesteps: Tensor | None, steps: range, index: int) -> range:
        """Which of a pipeline's steps call this model: all, where no other one shares them.

        Args:
            pipe: that is calling.
            timesteps: of its scheduler.
            steps: of this run of it.
            index: where it is now.
        """
        if timesteps is None:
            return steps
        if self._shared[0] is not timesteps:  # read once a generation
            self._shared = (timesteps, own_steps(pipe, self._model))
        own = self._shared[1]
        if own is None:
            return steps
        part = range(max(own.start, steps.start), min(own.stop, steps.stop))
        return part if index in part else steps

    def _watch(self, scheduler: Any) -> None:
        """Count the steps of a scheduler that does not."""
        if hasattr(scheduler, "step_index") or not hasattr(scheduler, "step"):
            return
        counter = StepCounter.on(scheduler)
        if counter not in self._counters:
            counter.acquire()
            self._counters.append(counter)


class _PipelineKey:
    """A pipeline as a key: equal while it lives, and it does not keep it alive.

    Args:
        pipe: the pipeline.
        is_calling: whether it calls itself, or only its scheduler is asked.
    """

    def __init__(self, pipe: Any, is_calling: bool) -> None:
        self._id, self._ref, self._is_calling = id(pipe), weakly(pipe), is_calling

    def __hash__(self) -> int:
        return hash(self._id)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _PipelineKey):
            return False
        pipe, same = self._ref(), self._is_calling is other._is_calling
        return same and pipe is not None and pipe is other._ref()

    def belongs_to(self, pipe: Any) -> bool:
        return self._ref() is pipe

    @property
    def alive(self) -> bool:
        return self._ref() is not None


def _key(pipe: Any, is_calling: bool = True) -> Hashable:
    return "context" if pipe is None else _PipelineKey(pipe, is_calling)
