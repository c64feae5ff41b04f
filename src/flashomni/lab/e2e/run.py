"""One generation with clocks: seconds of the whole and of each call of the transformer."""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from flashomni.lab.clock import clocked
from flashomni.lab.e2e.models import Model

OnStep = Callable[[int, int], None]


def silent(step: int, steps: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Clocked:
    """What one call of a pipeline took.

    Args:
        seconds: wall time of the call, from an idle device to an idle device.
        calls: seconds of each call of the transformer, by CUDA events on a GPU.
        peak_gib: most memory that torch held on the GPU, weights included; ``None`` on a CPU.
    """

    seconds: float
    calls: list[float]
    peak_gib: float | None


def generate(
    model: Model,
    steps: int,
    on_step: OnStep = silent,
    stop_after: int | None = None,
    by_call: bool = True,
) -> Clocked:
    """Call the pipeline once.

    Args:
        model: what to call, with whatever is attached to it.
        steps: denoising steps that the scheduler plans.
        on_step: told ``(steps done, steps)`` after each.
        stop_after: leave out the steps after this many.
        by_call: time each call of the transformer, by hooks, which keep CUDA graphs away.

    Raises:
        RuntimeError: the latents are not finite: nothing that was timed counts.
    """
    count = steps if stop_after is None else min(stop_after, steps)

    def done(step: int) -> None:
        on_step(step, count)
        if step == count:
            model.pipe._interrupt = True

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        done(step + 1)
        return kwargs

    gc.collect()
    _wait(model.device)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    told = "callback_on_step_end" in inspect.signature(type(model.pipe).__call__).parameters
    given = {"callback_on_step_end": callback} if told else {}
    counted = nullcontext() if told else _counted(model, done)
    with counted, clocked(*(model.transformers if by_call else ()), device=model.device) as watches:
        start = time.perf_counter()
        latents = model.pipe(
            **model.call,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(model.seed),
            **given,
        )[0]
        _wait(model.device)
        seconds = time.perf_counter() - start
    calls = [watch.seconds() for watch in watches]
    peak = peak_gib(model.device)
    if not bool(torch.isfinite(latents).all()):
        raise RuntimeError("the latents are not finite")
    return Clocked(seconds, calls, peak)


@contextmanager
def _counted(model: Model, done: Callable[[int], None]) -> Iterator[None]:
    """Tell of the steps of a pipeline that takes no callback, behind the last call of each."""
    calls = [0]

    def called(*_: Any) -> None:
        calls[0] += 1
        if calls[0] % model.calls == 0:
            done(calls[0] // model.calls)

    handles = [each.register_forward_hook(called) for each in model.transformers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def free(device: torch.device) -> None:
    """Give back what earlier methods left to torch's allocator."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_gib(device: torch.device) -> float | None:
    """Most memory since it was last reset, in GiB; ``None`` on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30


def weights_gib(model: Model) -> float:
    """Memory of the transformers' weights, in GiB."""
    parameters = (parameter for each in model.transformers for parameter in each.parameters())
    return sum(x.numel() * x.element_size() for x in parameters) / 2**30


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
