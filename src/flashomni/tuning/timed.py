"""dB and seconds of a recipe on tuning prompts, through the engine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashomni.engine import Recipe
from flashomni.engine.trace import Summary
from flashomni.lab.fidelity.compare import processor_time
from flashomni.models import accelerate
from flashomni.tuning.drive import Driver
from flashomni.tuning.sparse import Found, Useless
from flashomni.tuning.validate import WARM


def timed(
    driver: Driver,
    recipe: Recipe,
    prompts: Sequence[tuple[str, int]],
    look: Callable[[int, Tensor], tuple[float, float]],
    useless: Useless,
    on_run: Callable[[], None],
) -> Found:
    """Generate with a recipe.

    Args:
        driver: of the pipeline.
        recipe: to measure.
        prompts: texts and the seeds of their noise.
        look: what latents are against the dense run and the plan, dB, by place in ``prompts``.
        useless: whether dB and the least seconds so far are of no use; then the other prompts are
            left out.
        on_run: told of each generation.
    """
    # Of a CPU that others use as well, a wait for a core is no cost of a recipe.
    compiles = torch.device(driver.pipe._execution_device).type == "cuda"
    clock = time.perf_counter if compiles else processor_time
    levels, apart, seconds = list[float](), list[float](), list[float]()
    with accelerate(driver.pipe, recipe) as engine:  # graphs as they will be
        for _ in range(WARM if compiles else 0):
            look(0, driver.generate(*prompts[0]))
            on_run()
        for place, (prompt, seed) in enumerate(prompts):
            for _ in range(2 if compiles else 1):
                start = clock()
                latents = driver.generate(prompt, seed)
                if compiles:
                    torch.cuda.synchronize(latents.device)
                seconds.append(clock() - start)
                on_run()
            against, own = look(place, latents)
            levels.append(against)
            apart.append(own)
            if useless(levels, min(seconds)):
                break
        skipped = attention_skipped(engine.report())
    return Found(levels, apart, min(seconds), skipped)


def attention_skipped(summary: Summary) -> list[float]:
    """FLOPs of attention that computed steps left out, by layer."""
    found = Counter[int]()
    for step in summary.steps:
        if step["kind"] in ("full", "update"):
            found.update(dict(enumerate(step["attention_skipped"])))
    return [float(found[place]) for place in range(len(summary.layers))]
