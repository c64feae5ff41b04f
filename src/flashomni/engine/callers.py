"""Who calls the model: the pipeline on the stack, and steps of schedulers that count none.

A transformer may be shared by several pipelines (``from_pipe``, image-to-image after
text-to-image), each with a scheduler and a number of steps of its own, so the pipeline that an
engine was put on need not be the one that is calling.
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn


def calling_pipeline(model: nn.Module) -> Any:
    """The pipeline that is calling ``model``: the innermost on the stack that holds it, or None.

    A pipeline is an object with a scheduler that has ``model`` among its attributes; in a method of
    it (or of a block of a modular pipeline) the call is under way.
    """
    frame = sys._getframe(1)
    while frame is not None:
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        if names[:1] == ("self",):
            found = frame.f_locals  # read once: it is a copy
            for name in ("self", "components"):
                if name in names and _holds(found.get(name), model):
                    return found[name]
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _holds(thing: Any, model: nn.Module) -> bool:
    if thing is None or isinstance(thing, nn.Module):
        return False
    if getattr(getattr(thing, "scheduler", None), "timesteps", None) is None:
        return False
    return any(
        part is model or getattr(part, "_orig_mod", None) is model
        for part in getattr(thing, "__dict__", {}).values()
    )


def own_steps(pipe: Any, model: nn.Module) -> range | None:
    """Which of a pipeline's steps call ``model``, where two transformers share them (Wan 2.2).

    The first one runs as long as the noise is at or above ``boundary_ratio`` of the training's, and
    ``transformer_2`` from there on. Reads the scheduler's timesteps, so the host may wait for them.

    Returns:
        ``None`` where ``model`` runs all steps, or nobody knows.
    """
    ratio = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    parts = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    parts = [getattr(part, "_orig_mod", part) for part in parts]
    if ratio is None or None in parts or parts[0] is parts[1] or model not in parts:
        return None
    boundary = ratio * pipe.scheduler.config.num_train_timesteps
    above = (pipe.scheduler.timesteps >= boundary).tolist()
    switch = sum(above)
    if above != sorted(above, reverse=True):
        return None
    return range(switch) if model is parts[0] else range(switch, len(above))


def branches(model: nn.Module, context: Any) -> int:
    """How many calls of ``model`` a step has, as far as its first call tells.

    Args:
        context: of that call: pipelines name it where the branches of guidance are separate calls.
    """
    pipe = calling_pipeline(model)
    guided = bool(getattr(pipe, "do_classifier_free_guidance", context is not None))
    return 2 if context is not None and guided else 1


def weakly(thing: Any) -> Callable[[], Any]:
    """A reference that does not keep ``thing`` alive, where its class allows that."""
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing


def step_index(scheduler: Any) -> int | None:
    """How far a scheduler has come since its timesteps were set; ``None`` before its first step."""
    if hasattr(scheduler, "step_index"):
        return scheduler.step_index
    return StepCounter.on(scheduler).index()


class StepCounter:
    """Counts the calls of ``step`` of one scheduler that has no ``step_index`` (DDIM, DDPM, ...).

    It stands in for the method on that instance; engines that share a scheduler share it.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler, self._inner = scheduler, scheduler.step
        self._timesteps: Any = None
        self._count = 0
        self._users = 0
        self.__signature__ = inspect.signature(self._inner)  # pipelines look for `eta`

    @classmethod
    def on(cls, scheduler: Any) -> StepCounter:
        """The counter of ``scheduler``, installed if there is none."""
        found = scheduler.__dict__.get("step")
        if not isinstance(found, cls):
            found = scheduler.step = cls(scheduler)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._inner(*args, **kwargs)
        self.index()
        self._count += 1
        return out

    def index(self) -> int | None:
        """Calls since the timesteps were set; ``None`` before the first."""
        if self._scheduler.timesteps is not self._timesteps:
            self._timesteps, self._count = self._scheduler.timesteps, 0
        return self._count or None

    def acquire(self) -> None:
        self._users += 1

    def release(self) -> None:
        """The last user takes the counter off, if nothing else was put on top of it."""
        self._users -= 1
        if self._users <= 0 and self._scheduler.__dict__.get("step") is self:
            del self._scheduler.step
            if getattr(self._inner, "__func__", None) is not type(self._scheduler).step:
                self._scheduler.step = self._inner

    def __deepcopy__(self, memo: dict) -> Any:
        """A copy of the scheduler has its class's own method."""
        other = copy.deepcopy(self._scheduler, memo)
        return types.MethodType(type(other).step, other)

    def __reduce__(self) -> Any:
        return getattr, (type(self._scheduler), "step")
