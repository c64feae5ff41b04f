"""Run a pipeline whose transformer answers what we say: compute, replay, or forecast.

A stand-in for the ``forward`` of that instance is put on for one run and taken off again. The
pipeline around it (text encoders, guidance, scheduler) is the user's own, whatever it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.engine import Clock
from flashomni.engine.noise import Noise
from flashomni.engine.state.output import put_together, take_apart
from flashomni.models._stand_in import InsteadOfForward

Compute = Callable[[], Tensor]
# (step, number of the call in the step, compute) -> what the model returns.
Answer = Callable[[int, int, Compute], Tensor]
# (step, latents as the pipeline has them; None if it keeps them to itself)
OnLatents = Callable[[int, Tensor | None], None]
STEP_END = "callback_on_step_end"


@dataclass(frozen=True)
class Outline:
    """What the first step tells of a generation.

    Attributes:
        num_steps: of the generation.
        latents: shape of the argument that carries the latents, ``hidden_states`` if there is one.
        calls: of the model in a step: guidance may make several.
        output_bytes: of what they return.
    """

    num_steps: int
    latents: tuple[int, ...]
    calls: int
    output_bytes: int


class _Seen(Exception):
    """The first step has been seen: nothing more has to run."""


class Driver:
    """A pipeline, driven step by step.

    Args:
        pipe: a diffusers pipeline with a ``transformer``.
        call: arguments of its call, without prompt, generator and output type.
        on_compute: told after each call of the model that computed.

    Attributes:
        computed: calls of the model that computed so far.
        sigmas: noise level of each step of the last run and behind it; none if not known.

    Raises:
        ValueError: there is no transformer.
        NotImplementedError: there are two.
    """

    def __init__(
        self, pipe: Any, call: dict[str, Any], on_compute: Callable[[], None] = lambda: None
    ) -> None:
        model, second = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
        if not isinstance(model, nn.Module):
            raise ValueError(f"pipe must have a transformer, got {type(pipe).__name__}")
        if isinstance(second, nn.Module) and second is not model:
            raise NotImplementedError(
                f"{type(pipe).__name__} has a transformer and a transformer_2 that share its "
                "steps: plans for two are not tuned yet"
            )
        self.model = model
        self.pipe, self.call, self.computed = pipe, dict(call), 0
        self.sigmas: tuple[float, ...] = ()
        self._on_compute = on_compute
        self._shapes: dict[int, Any] = {}  # of outputs, by the number of the call in its step

    def run(
        self, prompt: str, seed: int, answer: Answer, on_latents: OnLatents | None = None
    ) -> Tensor:
        """The latents at the end of one generation, flat and in fp32, on the device.

        Args:
            prompt: what to generate.
            seed: of the initial noise.
            answer: called for each call of the model.
            on_latents: given the latents behind each step, if the pipeline hands them out.
        """
        told: dict[str, Any] = {}
        if on_latents is not None and STEP_END in inspect.signature(self.pipe.__call__).parameters:

            def tell(pipe: Any, step: int, timestep: Any, values: dict) -> dict:
                on_latents(step, values.get("latents"))
                return values

            told = {STEP_END: tell}
        return self._latents(self._pipeline(prompt, seed, answer, output_type="latent", **told))

    def generate(self, prompt: str, seed: int) -> Tensor:
        """The latents of the pipeline as it is, or as it is accelerated; see :meth:`run`."""
        return self._latents(self._call(prompt, seed, output_type="latent"))

    def _latents(self, output: Any) -> Tensor:
        found: list[Tensor] = []
        take_apart(list(output.values()) if isinstance(output, dict) else output, found)
        if not found:
            raise NotImplementedError(
                f"{type(self.pipe).__name__} gives no tensor for output_type='latent', which a "
                "tuner compares"
            )
        return found[0].detach().float().flatten()

    def outline(self, prompt: str) -> Outline:
        """What a generation would look like, of its first step; the others are not run."""
        about: list[tuple[int, tuple[int, ...]]] = []
        sizes: list[int] = []

        def look(values: dict[str, Any], num_steps: int) -> None:
            tensors = [x for x in values.values() if isinstance(x, Tensor)]
            latents = values.get("hidden_states", max(tensors, key=lambda x: x.numel()))
            about.append((num_steps, tuple(latents.shape)))

        def answer(step: int, call: int, compute: Compute) -> Tensor:
            if step > 0:
                raise _Seen
            value = compute()
            sizes.append(value.nbytes)
            return value

        with suppress(_Seen):
            self._pipeline(prompt, 0, answer, look, output_type="latent")
        return Outline(*about[0], len(sizes), sum(sizes))

    def _pipeline(
        self, prompt: str, seed: int, answer: Answer, look: Any = None, **kwargs: Any
    ) -> Any:
        standing = _Forward(self, _Place(), answer, look)
        try:
            return self._call(prompt, seed, **kwargs)
        finally:
            standing.take_off()
            standing.clock.remove()

    def _call(self, prompt: str, seed: int, **kwargs: Any) -> Any:
        self.pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator("cpu").manual_seed(seed)
        with torch.no_grad():
            return self.pipe(prompt, **self.call, generator=noise, **kwargs)


@dataclass
class _Place:
    """Where a run stands."""

    index: int | None = None
    step: int = -1
    call: int = 0

    def advance(self, index: int) -> None:
        if index != self.index:
            self.index, self.step, self.call = index, self.step + 1, 0
        else:
            self.call += 1


class _Forward(InsteadOfForward):
    """Stands in for a transformer's forward during one run."""

    def __init__(self, driver: Driver, place: _Place, answer: Answer, look: Any) -> None:
        super().__init__(driver.model)
        self.clock = Clock(driver.model, driver.pipe)
        self._driver, self._place, self._answer, self._look = driver, place, answer, look

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        driver, place = self._driver, self._place
        position = self.clock.locate(None)
        if position is None:
            return self.original(*args, **kwargs)
        place.advance(position.index)
        if place.step == place.call == 0:
            noise = Noise.of(position.scheduler)
            driver.sigmas = () if noise is None else noise.levels()
        if self._look is not None:
            values = {str(i): value for i, value in enumerate(args)} | kwargs
            self._look(values, position.num_steps)

        def compute() -> Tensor:
            found: list[Tensor] = []
            driver._shapes[place.call] = take_apart(self.original(*args, **kwargs), found)
            if len(found) != 1:
                raise NotImplementedError(
                    f"{type(self.module).__name__} returns {len(found)} tensors; a tuner takes "
                    "models that return one"
                )
            driver.computed += 1
            driver._on_compute()
            return found[0]

        if place.call not in driver._shapes and self._look is None:
            compute()  # nobody has seen yet what the answer must look like
        value = self._answer(place.step, place.call, compute)
        return put_together(driver._shapes[place.call], iter([value]))
