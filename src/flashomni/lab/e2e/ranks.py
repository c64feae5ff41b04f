"""Several cards for one generation, beside one card and beside diffusers' own context parallelism.

Every rank builds the same pipeline from the same seed and runs all of it; one card's figures are
those of the first rank, while the others do the same on theirs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from flashomni.engine import Recipe
from flashomni.lab.e2e.methods import Measure, Plan, Timing, time_recipe
from flashomni.lab.e2e.models import Model
from flashomni.lab.e2e.run import OnStep
from flashomni.lab.e2e.stock import Stock
from flashomni.models._parallel import Theirs
from flashomni.parallel.launch import gathered


@dataclass
class SharedStock(Stock):
    """The stock transformer under diffusers' context parallelism (Ulysses).

    Args:
        ulysses: ranks.
    """

    ulysses: int = 2

    @contextmanager
    def attached(self, *models: Any) -> Iterator[None]:
        """Put it on the transformers of a pipeline, and take it off whatever happens.

        Raises:
            ValueError: diffusers has no plan for a model, and we neither.
        """
        from diffusers import ContextParallelConfig

        with super().attached(*models):
            try:
                for model in models:
                    config = ContextParallelConfig(ulysses_degree=self.ulysses)
                    model.enable_parallelism(config=config, cp_plan=plan_of(model))
                yield
            finally:
                for model in models:
                    Theirs(model).put_aside()
                    model._parallel_config = None


def plan_of(model: Any) -> dict[str, Any] | None:
    """What diffusers splits where; ``None`` for the model's own.

    HunyuanVideo has none. This is ours: with it stock blocks attend to the padding of the text,
    because the model makes their mask of its share of the tokens.
    """
    if type(model).__name__ != "HunyuanVideoTransformer3DModel":
        return None
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    tokens = ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)
    table = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
    return {
        "x_embedder": {0: tokens},
        "context_embedder": {0: tokens},
        "rope": {0: table, 1: table},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


def stocks_on(size: int, attention: str, models: list[Any]) -> dict[str, Stock]:
    """diffusers' context parallelism as a baseline, by the name that tables show.

    Args:
        size: ranks.
        attention: diffusers' name of the attention backend.
        models: the transformers.
    """
    plan = "our plan" if plan_of(models[0]) is not None else "own plan"
    return {f"diffusers ({plan}), {size} cards": SharedStock(attention, ulysses=size)}


def methods_on(
    recipes: Mapping[str, Recipe], ulysses: int, cfg: int, graphs: bool = False
) -> dict[str, Measure]:
    """Each recipe on one card, and on all of them.

    Args:
        recipes: by name.
        ulysses: ranks that share a sequence.
        cfg: branches that run at once.
        graphs: ask for CUDA graphs, on one card and on all; names say so.
    """
    found: dict[str, Measure] = {}
    asked, said = ({"graphs": True}, ", graphs") if graphs else ({}, "")
    ranks = {"ulysses": ulysses, "cfg": cfg, **asked}
    for name, recipe in recipes.items():
        found[name + said] = partial(_time_with, asked, recipe)
        found[f"{name}, {ulysses * cfg} cards{said}"] = partial(_time_shared, ranks, recipe)
    return found


def _time_with(
    asked: Mapping[str, Any], recipe: Recipe, model: Model, plan: Plan, on_step: OnStep
) -> Timing:
    return time_recipe(recipe, model, replace(plan, ranks=asked), on_step)


def _time_shared(
    ranks: Mapping[str, Any], recipe: Recipe, model: Model, plan: Plan, on_step: OnStep
) -> Timing:
    """A recipe on all ranks; the slowest of them counts, and every rank's time is noted."""
    timing = _time_with(ranks, recipe, model, plan, on_step)
    seconds = gathered(timing.generation_s)
    times = ", ".join(f"{each:.2f} s" for each in seconds)
    return replace(
        timing,
        generation_s=max(seconds),
        notes=(*timing.notes, f"seconds of a generation by rank: {times}"),
    )


def exchange_seconds(nbytes: int, device: torch.device, rounds: int = 20) -> float:
    """Median time of one all-to-all.

    Args:
        nbytes: that a rank puts into it, its own part included.
        device: of the rank.
        rounds: of which the median counts; two go before.
    """
    size = dist.get_world_size()
    x = torch.empty(nbytes // size * size, dtype=torch.uint8, device=device)
    out, times = torch.empty_like(x), []
    for _ in range(rounds + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        dist.all_to_all_single(out, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
