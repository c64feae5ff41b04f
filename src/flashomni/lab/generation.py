"""Generate with and without acceleration, and compare: what the command line and the demo do."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashomni.engine import Recipe, Summary
from flashomni.lab.clock import clocked
from flashomni.lab.zoo import Loaded
from flashomni.models import accelerate, transformers_of
from flashomni.util.words import one_line

OnStep = Callable[[int, int], None]
Look = Callable[[int, Tensor | None], None]
COMPILE_STEPS = 8
LATENTS = 256 * 2**20  # bytes of a run's latents that may stay on the device
SHORT = 30.0  # seconds: of a generation so short, the first two are left out
OFTEN = {"interval": 2, "warmup": 0.0, "min_steps": 0}


def frames(output: Any) -> Tensor:
    """A pipeline's ``pt`` output as fp32 ``[F, 3, H, W]`` in [0, 1]; F = 1 for a picture."""
    pixels = output.frames[0] if hasattr(output, "frames") else output.images[:1]
    return pixels.detach().float().clamp(0, 1).cpu()


def errors_by_step(reference: list[Tensor], latents: list[Tensor]) -> list[float | None]:
    """How far a run is from another behind each step; empty where they cannot be compared.

    Args:
        reference: latents of the stock pipeline behind each step.
        latents: of the accelerated one.

    Returns:
        The norm of the difference by that of the reference; ``None`` where it is not finite.
    """
    if [x.shape for x in reference] != [x.shape for x in latents]:
        return []
    pairs = zip(reference, latents, strict=True)
    found = [float((y.float() - x.float()).norm() / x.float().norm()) for x, y in pairs]
    return [value if math.isfinite(value) else None for value in found]


class Generation:
    """A pipeline with fixed inputs, to run with and without acceleration.

    Args:
        loaded: the pipeline and its call.
        prompt: what to generate.
        seed: of the initial noise.
        steps: overrides the number of denoising steps.
        ranks: what ``accelerate`` is told of them: ``ulysses`` and ``cfg``.
    """

    def __init__(
        self,
        loaded: Loaded,
        prompt: str | None,
        seed: int,
        steps: int | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        self.pipe, self.seed = loaded.pipe, seed
        self.ranks: dict[str, Any] = dict(ranks or {})
        self.prompt = loaded.prompt if prompt is None else prompt
        self.call = dict(loaded.call)
        if steps is not None:
            self.call["num_inference_steps"] = steps
        self.pipe.set_progress_bar_config(disable=True)
        self.seconds = float("inf")  # of a stock generation, about
        self.look: Look | None = None  # at the latents after each step; its time does not count
        self.latents: list[Tensor] = []  # behind each step of the last run; none if they are large

    @property
    def num_steps(self) -> int:
        return int(self.call.get("num_inference_steps", 50))

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipe._execution_device)

    def run(self, on_step: OnStep) -> tuple[Tensor, float]:
        """Run the pipeline once; return its frames and the seconds it took, all included."""
        aside, latents = 0.0, []  # type: tuple[float, list[Tensor]]
        self.latents = latents

        def callback(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
            nonlocal aside
            now = kwargs.get("latents")
            if now is not None and now.nbytes * self.num_steps <= LATENTS:
                latents.append(now.clone())
            on_step(step + 1, getattr(pipe, "_num_timesteps", None) or self.num_steps)
            if self.look is not None:
                self._wait()
                begun = time.perf_counter()
                self.look(step, kwargs.get("latents"))
                aside += time.perf_counter() - begun
            return kwargs

        self._wait()
        start = time.perf_counter()
        output = self.pipe(
            self.prompt,
            **self.call,
            generator=torch.Generator("cpu").manual_seed(self.seed),
            output_type="pt",
            callback_on_step_end=callback,
        )
        self._wait()
        return frames(output), time.perf_counter() - start - aside

    def discard(self) -> None:
        """Run once, for nothing but what it leaves behind."""
        self.run(lambda step, total: None)

    def warm_up(self) -> None:
        """One step that nobody counts: thread pools, kernels and memory come up.

        Raises:
            ValueError: the stock pipeline fails with this call: a wrong value in it, or a part
                that does not fit the others.
        """
        call = {**self.call, "num_inference_steps": 1}
        try:
            self.pipe(self.prompt, **call, output_type="latent")
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
            raise ValueError(
                f"{type(self.pipe).__name__} fails with call {one_line(self.call, 300)}: "
                f"{type(error).__name__}: {one_line(error, 300)}"
            ) from error

    @property
    def compiles(self) -> bool:
        """Whether kernels are compiled when they are first used."""
        return self.device.type == "cuda"

    def compile_kernels(
        self,
        recipe: Recipe | str | Path,
        watch: Callable[[], OnStep] = lambda: lambda step, total: None,
        backend: str | None = None,
    ) -> float:
        """Run both sides for a few steps, so that nothing compiles while a run is timed.

        Args:
            recipe: what will be timed.
            watch: called once, where there is something to do; gives the callback for its steps.
            backend: kernel backend.

        Returns:
            The seconds it took; 0 where nothing is compiled.
        """
        if not self.compiles:
            return 0.0
        on_step = watch()
        short = copy.copy(self)
        short.call = {**self.call, "num_inference_steps": COMPILE_STEPS}
        # Every second step is an Update, from the first: all kinds of step, with full histories.
        start = time.perf_counter()
        short.run(lambda step, total: on_step(step, 2 * COMPILE_STEPS))
        self.seconds = self.num_steps / COMPILE_STEPS * (time.perf_counter() - start)
        short.accelerated(
            Recipe.of(recipe).replace(**OFTEN),
            lambda step, total: on_step(COMPILE_STEPS + step, 2 * COMPILE_STEPS),
            backend,
        )
        return time.perf_counter() - start

    @property
    def repeats(self) -> int:
        """Accelerated generations in front of the one that counts."""
        short = self.seconds < SHORT and not self.ranks  # which have no graphs
        return 2 if self.compiles and short else 0

    def dense(self, on_step: OnStep) -> tuple[Tensor, float, list[float]]:
        """The stock pipeline: frames, seconds, seconds of each call of its transformers."""
        with clocked(*transformers_of(self.pipe).values(), device=self.device) as watches:
            pixels, seconds = self.run(on_step)
        return pixels, seconds, [watch.seconds() for watch in watches]

    def accelerated(
        self, recipe: Recipe | str | Path, on_step: OnStep, backend: str | None = None
    ) -> tuple[Tensor, float, Summary]:
        """The same pipeline under a recipe: frames, seconds, what was skipped.

        On a GPU a short generation is the third of its kind, as it is for who generates many: steps
        are CUDA graphs by then.
        """
        with accelerate(self.pipe, recipe, backend=backend, **self.ranks) as engine:
            for _ in range(self.repeats):
                self.discard()
            pixels, seconds = self.run(on_step)
            return pixels, seconds, engine.report()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
