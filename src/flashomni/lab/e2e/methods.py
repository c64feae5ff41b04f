"""What is compared: our recipes and other people's caches, each on the same pipeline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flashomni.engine import Recipe, StepKind, Summary
from flashomni.lab.e2e.models import Model
from flashomni.lab.e2e.run import Clocked, OnStep, generate, silent
from flashomni.lab.e2e.stock import Stock
from flashomni.lab.fidelity.named import parse, parse_recipe
from flashomni.lab.fidelity.peers import Peer
from flashomni.models import accelerate

__all__ = ["parse_recipe"]  # beside what is defined here

GENERATION = "generation"
ALIKE = 1.2  # steps of a peer whose times differ by less than this factor are of one kind


@dataclass(frozen=True)
class Plan:
    """How long to run.

    Args:
        steps: of a complete generation.
        stock_steps: of a run where all steps are alike; its first does not count.
        whole: run complete generations also where steps are alike (never of stock methods).
        backend: kernel backend of recipes.
        ranks: what ``accelerate`` is told beside, for recipes: ``ulysses``, ``cfg``, ``graphs``.
        generation: which one of a recipe counts. Steps are timed in one before these, by hooks;
            from the third on CUDA graphs of steps, where recipe and model have some, replay.
    """

    steps: int = 50
    stock_steps: int = 4
    whole: bool = False
    backend: str | None = None
    generation: int = 1
    ranks: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.generation < 1:
            raise ValueError(f"generation must be at least 1, got {self.generation}")
        if self.steps < 4:
            raise ValueError(f"steps must be at least 4, got {self.steps}")
        if not 2 <= self.stock_steps <= self.steps:
            raise ValueError(
                f"stock-steps must be from 2 to steps ({self.steps}), got {self.stock_steps}"
            )


@dataclass(frozen=True)
class Timing:
    """What one method took.

    Args:
        calls: kind of step -> seconds of each call of the transformer that counts.
        generation_s: seconds of a complete generation.
        estimated: whether that is steps times medians, not the clock's.
        densities: kind of step, or ``generation`` -> computed share of (query, key) pairs of
            attention, mean over layers; a layer that was cached whole counts 0. Empty where the
            method does not say.
        flops_skipped: share of the transformer blocks' FLOPs; ``None`` where it does not say.
        peak_gib: see ``Clocked``.
        host_gib: pinned host memory of the caches.
        runs: medians of the stock runs in order: how far the machine drifts.
        notes: what the engine's report said beside its figures.
    """

    calls: dict[str, list[float]]
    generation_s: float
    estimated: bool = False
    densities: dict[str, float] | None = None
    flops_skipped: float | None = None
    peak_gib: float | None = None
    host_gib: float = 0.0
    runs: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


Measure = Callable[[Model, Plan, OnStep], Timing]


def parse_measure(text: str) -> tuple[str, Measure]:
    """Name and measurement of a recipe or a peer (see ``flashomni.lab.fidelity.named``)."""
    name, found = parse(text)
    if isinstance(found, Recipe):
        return name, partial(time_recipe, found)
    return name, partial(time_peer, found)


# ---------------------------------------------------------------- stock


def time_stock(stock: Stock, model: Model, plan: Plan, on_step: OnStep = silent) -> Timing:
    """A few steps of the real pipeline, after one that compiles; the first does not count."""
    with stock.attached(*model.transformers):
        # Not of one step: schedulers that stretch to a last noise level divide by zero there.
        reached = None if model.shared else 1  # of several transformers each has to be
        generate(model, plan.stock_steps, stop_after=reached)
        run = generate(model, plan.stock_steps, on_step)
    calls = run.calls[1:]
    middle = statistics.median(calls)
    return Timing(
        {"full": calls},
        plan.steps * model.calls * middle,
        estimated=True,
        densities={"full": 1.0, GENERATION: 1.0},
        flops_skipped=0.0,
        peak_gib=run.peak_gib,
        runs=(middle,),
    )


def merged(first: Timing, second: Timing, calls_made: int) -> Timing:
    """Two runs of the same stock method, as one.

    Args:
        first: the one.
        second: the other.
        calls_made: of the transformer in a whole generation.
    """
    calls = first.calls["full"] + second.calls["full"]
    peaks = [x.peak_gib for x in (first, second) if x.peak_gib is not None]
    return Timing(
        {"full": calls},
        calls_made * statistics.median(calls),
        estimated=True,
        densities=first.densities,
        flops_skipped=0.0,
        peak_gib=max(peaks, default=None),
        runs=first.runs + second.runs,
    )


# ---------------------------------------------------------------- ours


def time_recipe(recipe: Recipe, model: Model, plan: Plan, on_step: OnStep = silent) -> Timing:
    """One complete generation, after a short one that compiles every kernel.

    Where all steps do the same (policy ``dense``) a few steps of each kind stand for all.
    """
    warm_up(recipe, model, plan.backend, **plan.ranks)
    alike = not recipe.skips and recipe.plan(plan.steps) is not None and not plan.whole
    count = few_steps(recipe, plan) if alike else plan.steps
    with accelerate(model.pipe, recipe, backend=plan.backend, **plan.ranks) as engine:
        run = generate(model, count, on_step)
        summary = engine.report()
        seconds, notes = run.seconds, summary.notes
        if plan.generation > 1:
            for _ in range(plan.generation):
                seconds = generate(model, count, by_call=False).seconds
            notes = engine.report().notes
    kinds = [work_of(step) for step in summary.steps]
    calls = grouped(kinds, run.calls, skip_first=alike)
    planned = kinds
    if alike:
        planned = [kind.value for kind in planned_kinds(recipe, plan.steps)]
        if plan.generation == 1:
            seconds = model.calls * sum(statistics.median(calls[kind]) for kind in planned)
        else:
            seconds *= plan.steps / count
    return Timing(
        calls,
        seconds,
        estimated=alike,
        densities=attention_shares(summary, planned),
        flops_skipped=summary.flops_skipped,
        peak_gib=run.peak_gib,
        host_gib=summary.cache_bytes_host / 2**30,
        notes=tuple(notes),
    )


def short(recipe: Recipe) -> tuple[Recipe, int]:
    """The recipe with as few steps as show all it does, and how many: every kind of step twice.

    The warm-up is as long as the forecasts need, the interval is 2; policy, orders and storage,
    which decide what kernels run, are the recipe's own.
    """
    first = recipe.order
    steps = first + 5
    warmup = (first + 0.5) / steps  # ceil of it x steps is the first Update's index + 1
    return recipe.replace(schedule={"name": "interval", "interval": 2, "warmup": warmup}), steps


def warm_up(recipe: Recipe, model: Model, backend: str | None, **ranks: Any) -> None:
    """Compile what the recipe runs, and let the allocators grow. Nobody counts this."""
    brief, steps = short(recipe)
    with accelerate(model.pipe, brief, backend=backend, **ranks):
        generate(model, steps)
    if recipe.sparse.degrade_below > 0:  # which layers are cached whole may differ in the long run
        with accelerate(model.pipe, brief.replace(degrade_below=0.0), backend=backend, **ranks):
            generate(model, steps, stop_after=steps - 3)  # one Update, one Dispatch step


def planned_kinds(recipe: Recipe, steps: int) -> tuple[StepKind, ...]:
    """What each step of a generation does.

    Raises:
        ValueError: the schedule decides that while it runs, or there are groups of layers.
    """
    if recipe.groups:
        raise ValueError(
            "groups of layers do different things in a step, which is timed as a whole"
        )
    plan = recipe.plan(steps)
    if plan is None:
        raise ValueError(
            f"schedule {recipe.schedule.name} decides at each step, so its steps are not known "
            "before; take a schedule that plans (interval, ramp, ...)"
        )
    return plan.kinds


def few_steps(recipe: Recipe, plan: Plan) -> int:
    """Fewest steps, ``stock_steps`` or more, that have each kind of a whole run after the first."""
    wanted = set(planned_kinds(recipe, plan.steps))
    for steps in range(plan.stock_steps, plan.steps):
        if wanted <= set(planned_kinds(recipe, steps)[1:]):
            return steps
    return plan.steps


def work_of(step: Mapping[str, Any]) -> str:
    """What a step of a report computes: its kind, and where that is known what its columns do.

    Where key blocks are left out, steps of one kind take different times: "full, sparse",
    "update, refresh". A Dispatch step with whole layers cached is none of these.
    """
    if "refreshes" in step["does"]:
        return f"{step['kind']}, refresh"
    visits = [kv for q, kv in zip(step["q_density"], step["kv_density"], strict=True) if q]
    computes = step["kind"] in (StepKind.FULL.value, StepKind.UPDATE.value)
    return f"{step['kind']}, sparse" if computes and min(visits, default=1) < 1 else step["kind"]


def attention_shares(summary: Summary, planned: list[str]) -> dict[str, float]:
    """Computed share of (query, key) pairs: of each kind of step, and of the planned generation."""
    shares: dict[str, list[float]] = {}
    for step in summary.steps:
        pairs = zip(step["q_density"], step["kv_density"], strict=True)
        shares.setdefault(work_of(step), []).append(statistics.fmean(q * kv for q, kv in pairs))
    means = {kind: statistics.fmean(values) for kind, values in shares.items()}
    return {**means, GENERATION: statistics.fmean(means[kind] for kind in planned)}


def grouped(
    kinds: list[str], calls: list[float], skip_first: bool = False
) -> dict[str, list[float]]:
    """Seconds of the calls by their kind; the first may not count, if others are of its kind."""
    found: dict[str, list[float]] = {}
    skip_first = skip_first and kinds[0] in kinds[1:]
    for kind, seconds in list(zip(kinds, calls, strict=True))[skip_first:]:
        found.setdefault(kind, []).append(seconds)
    return found


# ---------------------------------------------------------------- peers


def time_peer(peer: Peer, model: Model, plan: Plan, on_step: OnStep = silent) -> Timing:
    """One complete generation as the peer ships, after a few steps that nobody counts."""

    if model.shared:
        raise NotImplementedError("peers are put on one transformer, and the pipeline has two")

    def once() -> Any:
        return generate(model, plan.steps)

    peer.prepare(model.pipe, plan.steps, once)
    with peer.attached(model.pipe, plan.steps):
        generate(model, plan.steps, stop_after=plan.stock_steps)
    with peer.attached(model.pipe, plan.steps):
        run: Clocked = generate(model, plan.steps, on_step)
    calls = grouped(slow_and_fast(run.calls), run.calls)
    return Timing(calls, run.seconds, peak_gib=run.peak_gib)


def slow_and_fast(calls: list[float]) -> list[str]:
    """A peer does not say what it did in a step: its slow steps and its fast ones.

    They are told apart halfway, in ratio, between the slowest and the fastest; where these differ
    little, all are ``step``.
    """
    low, high = min(calls), max(calls)
    if high < ALIKE * low:
        return ["step"] * len(calls)
    return ["slow" if seconds > math.sqrt(low * high) else "fast" for seconds in calls]
