"""dB and seconds of a recipe on tuning prompts, through the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashomni.engine import Recipe
from flashomni.lab.fidelity.compare import processor_time
from flashomni.models import accelerate
from flashomni.tuning.drive import Driver
from flashomni.tuning.polish import signal_to_noise


def timed(
    driver: Driver,
    recipe: Recipe,
    prompts: Sequence[tuple[str, int]],
    reference: Callable[[int], Tensor],
    useless: Callable[[list[float], float], bool],
    on_run: Callable[[], None],
) -> dict[str, Any]:
    """Generate with a recipe.

    Args:
        driver: of the pipeline.
        recipe: to measure.
        prompts: texts and the seeds of their noise.
        reference: the latents of the dense run, by place in ``prompts``.
        useless: whether dB and the least seconds so far are of no use; then the other prompts are
            left out.
        on_run: told of each generation.

    Returns:
        JSON values: ``levels``, dB of the final latents by prompt; ``seconds``, the least of a
        generation.
    """
    # Of a CPU that others use as well, a wait for a core is no cost of a recipe.
    compiles = torch.device(driver.pipe._execution_device).type == "cuda"
    clock = time.perf_counter if compiles else processor_time
    levels, seconds = list[float](), list[float]()
    with accelerate(driver.pipe, recipe, graphs=False):
        if compiles:  # and nobody times it
            signal_to_noise(driver.generate(*prompts[0]), reference(0))
            on_run()
        for place, (prompt, seed) in enumerate(prompts):
            dense = reference(place)
            start = clock()
            levels.append(signal_to_noise(driver.generate(prompt, seed), dense))
            seconds.append(clock() - start)
            on_run()
            if useless(levels, min(seconds)):
                break
    return {"levels": levels, "seconds": min(seconds)}
