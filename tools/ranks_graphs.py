"""What CUDA graphs do for a generation on several cards: the same bits, and milliseconds of a step.

``torchrun --nproc-per-node 2 tools/ranks_graphs.py`` on cards of one host. Each way generates three
pictures that do not count (kernels compile, steps are counted, steps are recorded) and three that
do, from one noise; the slowest rank counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from flashomni.engine import Recipe
from flashomni.lab.e2e.models import Model, build
from flashomni.models import accelerate
from flashomni.parallel.launch import Place, gathered, joined

WARM = TIMED = 3


def picture(model: Model, steps: int) -> torch.Tensor:
    """Latents of one generation."""
    noise = torch.Generator("cpu").manual_seed(model.seed)
    return model.pipe(**model.call, num_inference_steps=steps, generator=noise)[0].float()


def seconds(model: Model, steps: int) -> tuple[float, torch.Tensor]:
    """Wall time of one generation that all ranks begin together; and its latents."""
    dist.barrier()
    start = time.perf_counter()
    latents = picture(model, steps)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start, latents


def measure(model: Model, recipe: str, steps: int, **how: Any) -> tuple[float, int, torch.Tensor]:
    """Median seconds of a generation on the slowest rank, replayed calls, latents."""
    with accelerate(model.pipe, Recipe.of(recipe), **how) as engine:
        for _ in range(WARM):
            picture(model, steps)
        runs = [seconds(model, steps) for _ in range(TIMED)]
        replays = engine._runtime.graphs.replays
    median = statistics.median(each for each, _ in runs)
    return max(gathered(median)), replays, runs[-1][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="flux-1024")
    parser.add_argument("--size", type=int, help="height and width of the picture")
    parser.add_argument("--recipe", default="lossless")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    size = int(os.environ.get("WORLD_SIZE", "1"))  # processes that torchrun started
    with torch.no_grad(), joined(size, torch.device(args.device)) as place:
        compare(args, place)


def compare(args: argparse.Namespace, place: Place) -> None:
    """All four ways; the first rank prints."""
    dtype = torch.bfloat16 if place.device.type == "cuda" else torch.float32
    model = build(args.model, place.device, dtype)
    if args.size:
        size = {"height": args.size, "width": args.size}
        model = dataclasses.replace(model, call={**model.call, **size})
    first: dict[int, torch.Tensor] = {}
    for cards in (1, place.size):
        for graphs in (False, True):
            how = {"ulysses": cards} if cards > 1 else {}
            taken, replays, latents = measure(model, args.recipe, args.steps, graphs=graphs, **how)
            same = torch.equal(latents, first.setdefault(cards, latents))
            alike = all(gathered(float(same)))
            if place.rank == 0:
                print(
                    f"{args.model} {args.recipe}, {cards} cards, graphs {graphs}: "
                    f"{1e3 * taken / args.steps:.1f} ms a step, {replays} calls replayed, the bits "
                    f"of this many cards without graphs: {alike}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
