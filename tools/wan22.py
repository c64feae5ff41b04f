"""One whole accelerated generation of Wan 2.2 T2V A14B: 720p, 81 frames, both transformers.

``python tools/wan22.py --csv FILE`` on a card: as many blocks of each transformer as its memory
takes (40 as published), guidance in calls of its own, random weights. Stock is the median of a few
calls in the same process, times those of the generation; ``lossless`` is held against it; the
recipe generates as many steps, of those asked for, as the seconds allow. ``--device cpu`` is a try.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import flashomni
from flashomni.engine import Recipe
from flashomni.lab.e2e import models
from flashomni.lab.e2e.run import free, generate, weights_gib
from flashomni.lab.results import Book, origin

BLOCK_GIB = 2 * 0.665  # of both transformers, in bf16
SPARE_GIB = 17.0  # activations of 75,600 tokens, and caches
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, help="of each transformer; as many as fit")
    parser.add_argument("--steps", type=int, default=20, help="at most")
    parser.add_argument("--recipes", nargs="+", default=["fora:interval=6,warmup=0.1"])
    parser.add_argument("--seconds", type=float, default=165)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    start = time.monotonic()
    device = torch.device(args.device)
    if device.type == "cuda":  # whatever hangs: what was printed and written stays
        signal.signal(signal.SIGALRM, lambda *_: (say("out of time"), exit(1)))
        signal.alarm(int(args.seconds))

    def left() -> float:
        return args.seconds - (time.monotonic() - start)

    book, rows = None if args.csv is None else Book(args.csv, Row), list[Row]()
    name = "wan22" if device.type == "cuda" else "tiny-wan22"
    blocks = args.blocks or fitting(device)
    size = models.MODELS[name]
    size = dataclasses.replace(size, config={**size.config, "num_layers": blocks}, note="")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = models.build(name, device, dtype, structure=4.0, size=size)
    say(
        f"{name}: {model.tokens} tokens, {blocks} of the 40 blocks of each transformer, "
        f"{weights_gib(model):.1f} GiB; built in {time.monotonic() - start:.0f} s"
    )

    def latents() -> tuple[Any, Any]:
        """Two steps, one of each transformer: the latents, and the clock's figures."""
        found: list[Any] = []
        call = model.pipe.scheduler.step

        def step(*given: Any, **more: Any) -> Any:
            found.append(call(*given, **more))
            return found[-1]

        model.pipe.scheduler.step = step
        try:
            run = generate(model, 2)
        finally:
            del model.pipe.scheduler.step
        return found[-1][0].float(), run

    stock, run = latents()
    call_s = statistics.median(run.calls[1:])
    say(f"stock: {1e3 * call_s:.0f} ms a call, peak {run.peak_gib or 0:.1f} GiB, {left():.0f} s")
    with flashomni.accelerate(model.pipe, "lossless", graphs=False):
        ours, run = latents()
    error = float((ours - stock).norm() / stock.norm())
    ms = 1e3 * statistics.median(run.calls[1:])
    say(f"lossless: {error:.1e} of stock's latents after 2 steps, {ms:.0f} ms a call")
    del ours, stock
    for text in args.recipes:
        free(device)
        recipe = Recipe.of(text)
        steps, computed = steps_for(model, recipe, args.steps, (left() - 8) / (1.05 * call_s))
        if not steps:
            say(f"{text}: left out, no time")
            continue
        say(f"{text}: {steps} steps, {computed} of {model.calls * steps} calls are computed")

        def watch(done: int, total: int) -> None:
            say(f"  step {done} of {total}, {left():.0f} s left")

        with flashomni.accelerate(model.pipe, recipe, graphs=False) as engine:
            run = generate(model, steps, watch)
            report = engine.report()
        kinds: dict[str, dict[str, list[float]]] = {}
        for each, seconds in zip(report.steps, run.calls, strict=True):
            part = kinds.setdefault(each["transformer"], {})
            part.setdefault(each["kind"], []).append(seconds)
        medians = {
            kind: [
                statistics.median(v)
                for part in kinds.values()
                for k, v in part.items()
                if k == kind
            ]
            for kind in {kind for part in kinds.values() for kind in part}
        }
        whole = model.calls * steps * call_s
        say(
            f"  {run.seconds:.1f} s, stock {whole:.0f} s (median call x calls): "
            f"{whole / run.seconds:.2f}x; FLOPs skipped {report.flops_skipped:.0%}, peak "
            f"{run.peak_gib or 0:.1f} GiB"
        )
        for part, by in kinds.items():
            each = ", ".join(
                f"{len(v)} {kind} {1e3 * statistics.median(v):.1f} ms" for kind, v in by.items()
            )
            say(f"  {part}: {each}")
        for note in report.notes[:3]:
            say(f"  {note}")
        full = max(max(v) for v in medians.values())
        least = min(min(v) for v in medians.values())
        rows.append(
            Row(name, model.tokens, blocks, text, steps, model.calls * steps, computed,
                round(run.seconds, 2), round(1e3 * call_s, 1), round(whole, 1), True,
                round(whole / run.seconds, 3), round(1e3 * full, 1), round(1e3 * least, 2),
                round(report.flops_skipped, 4), run.peak_gib and round(run.peak_gib, 2),
                **origin(device, f"python tools/wan22.py --steps {args.steps} --recipes {text}"))
        )  # fmt: skip
        if book is not None:
            book.write(rows)
    say(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
