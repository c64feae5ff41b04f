"""One whole accelerated generation of Wan 2.2 T2V A14B: 720p, 81 frames, both transformers.

``python tools/wan22.py --csv FILE`` on a card: as many blocks of each transformer as its memory
takes (40 as published), guidance in calls of its own, random weights. Stock is the median of two
warm calls of each transformer in the same process, times those of the generation; ``lossless`` is
held against it; recipes generate as many steps, of those asked for, as the seconds allow, the one
that comes to most of them first. ``--device cpu`` is a try.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flashomni
from flashomni.engine import Recipe
from flashomni.lab.e2e import models
from flashomni.lab.e2e.run import Clocked, free, generate, weights_gib
from flashomni.lab.results import Book, origin

BLOCK_GIB = 2 * 0.665  # of both transformers, in bf16
SPARE_GIB = 17.0  # activations of 75,600 tokens, and caches
FEWER = 4  # blocks that go where the memory is out all the same
STEPS = (40, 30, 20, 16, 12, 10, 8, 6)


@dataclass(frozen=True)
class Row:
    """A generation. ``full_ms`` is the median computed call of the recipe, ``least_ms`` that of the
    cheapest kind; ``stock_s`` is stock's median call times the calls, which ``estimated`` says."""

    model: str
    tokens: int
    blocks: int
    recipe: str
    steps: int
    calls: int
    computed: int
    seconds: float
    stock_ms: float
    stock_s: float
    estimated: bool
    speedup: float
    full_ms: float
    least_ms: float
    flops_skipped: float
    peak_gib: float | None
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str


def fitting(device: torch.device) -> int:
    """Blocks of each transformer that the card takes."""
    if device.type != "cuda":
        return 2
    total = torch.cuda.mem_get_info(device)[0] / 2**30
    return max(1, min(40, int((total - SPARE_GIB) / BLOCK_GIB)))


def steps_for(model: models.Model, recipe: Recipe, most: int, calls: float) -> tuple[int, int]:
    """The most steps whose computed calls are no more than ``calls``, and how many those are."""
    scheduler = model.pipe.scheduler
    boundary = model.pipe.config.boundary_ratio * scheduler.config.num_train_timesteps
    for steps in (each for each in STEPS if each <= most):
        scheduler.set_timesteps(steps)
        first = int((scheduler.timesteps >= boundary).sum())
        count = 0
        for part in (first, steps - first):
            plan = recipe.plan(part) if part else None
            kinds = [] if plan is None else [kind.value for kind in plan.kinds]
            count += model.calls * sum(kind != "dispatch" for kind in kinds)
        if count <= calls:
            return steps, count
    return 0, 0


def say(text: str) -> None:
    print(text, flush=True)


def built(device: torch.device, blocks: int) -> models.Model:
    """The pipeline, with so many blocks in each transformer; a small one where there is no card."""
    name = "wan22" if device.type == "cuda" else "tiny-wan22"
    size = models.MODELS[name]
    size = dataclasses.replace(size, config={**size.config, "num_layers": blocks}, note="")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return models.build(name, device, dtype, structure=4.0, size=size)


def two_steps(model: models.Model) -> tuple[Tensor, Clocked]:
    """One step of each transformer: the latents behind them, and the clock's figures."""
    found: list[Any] = []
    scheduler = model.pipe.scheduler
    call = scheduler.step

    def step(*given: Any, **more: Any) -> Any:
        found.append(call(*given, **more))
        return found[-1]

    scheduler.step = step
    try:
        run = generate(model, 2)
    finally:
        del scheduler.step
    return found[-1][0].float(), run


def anchored(model: models.Model) -> tuple[float, float]:
    """Seconds of a call of stock, and of ``lossless``; says how far that is from stock."""
    generate(model, 2, stop_after=1)  # both of what it may call first
    stock, run = two_steps(model)
    call_s = statistics.median(run.calls)
    each = ", ".join(f"{1e3 * seconds:.0f}" for seconds in run.calls)
    say(f"stock: {1e3 * call_s:.0f} ms a call ({each}), peak {run.peak_gib or 0:.1f} GiB")
    with flashomni.accelerate(model.pipe, "lossless", graphs=False):
        ours, run = two_steps(model)
    error = float((ours - stock).norm() / stock.norm())
    least = min(run.calls)
    each = ", ".join(f"{1e3 * seconds:.0f}" for seconds in run.calls)
    say(f"lossless: {error:.1e} of stock's latents after 2 steps, {each} ms; peak "
        f"{run.peak_gib or 0:.1f} GiB")  # fmt: skip
    return call_s, least


def shortened(model: models.Model, blocks: int) -> int:
    """Leave out some more blocks of each transformer: how many are left."""
    blocks -= FEWER
    if blocks < 1:
        raise MemoryError("not even a block of each transformer fits")
    for transformer in model.transformers:
        del transformer.blocks[blocks:]
    free(model.device)
    say(f"out of memory: {blocks} blocks of each from here on")
    return blocks


def generated(
    model: models.Model, blocks: int, recipe: str, steps: int, computed: int, call_s: float
) -> dict[str, Any]:
    """The columns of a whole generation, said too, but for where they come from."""
    start = time.monotonic()

    def progress(done: int, total: int) -> None:
        say(f"  step {done} of {total}, {time.monotonic() - start:.1f} s")

    with flashomni.accelerate(model.pipe, recipe, graphs=False) as engine:
        run = generate(model, steps, progress)
        report = engine.report()
    kinds: dict[str, dict[str, list[float]]] = {}
    for each, seconds in zip(report.steps, run.calls, strict=True):
        kinds.setdefault(each["transformer"], {}).setdefault(each["kind"], []).append(seconds)
    whole = model.calls * steps * call_s
    say(
        f"  {run.seconds:.1f} s, stock {whole:.0f} s (median call x calls): "
        f"{whole / run.seconds:.2f}x; FLOPs skipped {report.flops_skipped:.0%}, peak "
        f"{run.peak_gib or 0:.1f} GiB"
    )
    for part, by in kinds.items():
        ms = (f"{len(v)} {kind} {1e3 * statistics.median(v):.1f} ms" for kind, v in by.items())
        say(f"  {part}: {', '.join(ms)}")
    for note in report.notes[:3]:
        say(f"  {note}")
    medians = [1e3 * statistics.median(v) for by in kinds.values() for v in by.values()]
    return {
        "model": model.name,
        "tokens": model.tokens,
        "blocks": blocks,
        "recipe": recipe,
        "steps": steps,
        "calls": model.calls * steps,
        "computed": computed,
        "seconds": round(run.seconds, 2),
        "stock_ms": round(1e3 * call_s, 1),
        "stock_s": round(whole, 1),
        "estimated": True,
        "speedup": round(whole / run.seconds, 3),
        "full_ms": round(max(medians), 1),
        "least_ms": round(min(medians), 2),
        "flops_skipped": round(report.flops_skipped, 4),
        "peak_gib": None if run.peak_gib is None else round(run.peak_gib, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, help="of each transformer; as many as fit")
    parser.add_argument("--steps", type=int, default=40, help="at most")
    parser.add_argument("--recipes", nargs="+", default=["balanced", "fast"])
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    start, device = time.monotonic(), torch.device(args.device)
    if device.type == "cuda":  # whatever hangs: what was printed and written stays
        signal.signal(signal.SIGALRM, lambda *_: (say("out of time"), sys.exit(1)))
        signal.alarm(int(args.seconds))
    book, rows = None if args.csv is None else Book(args.csv, Row), list[Row]()
    blocks = args.blocks or fitting(device)
    with torch.no_grad():
        model = built(device, blocks)
        say(
            f"{model.name}: {model.tokens} tokens, {blocks} of the 40 blocks of each transformer, "
            f"{weights_gib(model):.1f} GiB; built in {time.monotonic() - start:.0f} s"
        )
        left, speeds = list(args.recipes), None

        def fit(text: str) -> tuple[int, int]:
            """Steps, and how many calls of them are computed, in the seconds that are left."""
            seconds = args.seconds - (time.monotonic() - start) - 12
            return steps_for(model, Recipe.of(text), args.steps, seconds / (1.1 * speeds[1]))

        out = False
        while left:
            if out:  # not where the error is handled, which holds what the call had
                speeds, blocks, out = None, shortened(model, blocks), False
            try:
                free(device)
                speeds = speeds or anchored(model)
                text = max(left, key=lambda each: fit(each)[0])
                steps, computed = fit(text)
                if not steps or (rows and steps < args.steps):
                    say(f"{', '.join(left)}: left out, no time")
                    break
                say(f"{text}: {steps} steps, {computed} of {model.calls * steps} calls computed")
                found = generated(model, blocks, text, steps, computed, speeds[0])
            except torch.OutOfMemoryError:
                out = True
                continue
            left.remove(text)
            command = f"python tools/wan22.py --steps {args.steps} --recipes {text}"
            rows.append(Row(**found, **origin(device, command)))
            if book is not None:
                book.write(rows)
    say(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
