"""What a step is made of: torch's profiler on one step of each kind, in runs that are not timed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from flashomni.engine import Recipe
from flashomni.lab.e2e.methods import planned_kinds, short, warm_up
from flashomni.lab.e2e.models import Model
from flashomni.lab.e2e.parts import IDLE, OTHER, PARTS, part_of
from flashomni.lab.e2e.run import free, generate
from flashomni.lab.e2e.stock import Stock, check_restored
from flashomni.lab.results import origin
from flashomni.models import accelerate

WAITS = ("Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event")  # no kernels
Interval = tuple[float, float]


@dataclass(frozen=True)
class PartRow:
    """Milliseconds of one part of one step; ``idle`` is when no kernel ran, profiler on."""

    model: str
    method: str
    step_kind: str
    part: str
    ms: float
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str


@dataclass(frozen=True)
class Step:
    """One profiled step.

    Args:
        ms: milliseconds by part.
        unknown: kernels of the part ``other`` and their milliseconds, the longest first.
    """

    ms: dict[str, float]
    unknown: list[tuple[str, float]]


def profile_stock(stock: Stock, model: Model) -> dict[str, Step]:
    """One step of a stock method, after two that compile."""
    model.refuse_shared("a profile")
    with stock.attached(model.pipe.transformer):
        generate(model, 2)
        with _profiled(model, {1: "full"}) as found:
            generate(model, 2)
    return found


def profile_recipe(recipe: Recipe, model: Model, backend: str | None = None) -> dict[str, Step]:
    """The last step of each kind of a short run (see ``methods.short``), compiled before."""
    model.refuse_shared("a profile")
    warm_up(recipe, model, backend)
    brief, steps = short(recipe)
    kinds = planned_kinds(brief, steps)
    chosen = {i: kind.value for i, kind in enumerate(kinds) if kind not in kinds[i + 1 :]}
    with accelerate(model.pipe, brief, backend=backend), _profiled(model, chosen) as found:
        generate(model, steps)
    return found


def part_rows(model: Model, method: str, found: dict[str, Step], command: str) -> list[PartRow]:
    """A row for each part of each kind of step, parts that took nothing left out."""
    about = origin(model.device, command)
    return [
        PartRow(model.name, method, kind, part, round(step.ms[part], 4), **about)
        for kind, step in found.items()
        for part in PARTS
        if step.ms.get(part, 0.0) > 0
    ]


def tabulate_parts(rows: list[PartRow]) -> Table:
    """One line a method and kind of step, for the eye; milliseconds."""
    parts = [part for part in PARTS if any(row.part == part for row in rows)]
    table = Table("method", "step", *parts, title=f"{rows[0].model}, {rows[0].gpu}")
    for method, kind in dict.fromkeys((row.method, row.step_kind) for row in rows):
        ms = {r.part: r.ms for r in rows if (r.method, r.step_kind) == (method, kind)}
        table.add_row(method, kind, *(f"{ms.get(part, 0.0):.2f}" for part in parts))
    return table


def profile_all(
    model: Model,
    baselines: dict[str, Stock],
    recipes: dict[str, Recipe],
    backend: str | None,
    changed: Callable[[str, dict[str, Step]], None],
) -> dict[str, str]:
    """Profile each method in turn; returns those that could not be, and why.

    Args:
        model: on what.
        baselines: stock methods by name.
        recipes: ours by name.
        backend: kernel backend of recipes.
        changed: told the name and the steps of each method as it is done.

    Raises:
        RuntimeError: a method did not leave the model as it was.
    """
    missing: dict[str, str] = {}
    work: dict[str, Callable[[], dict[str, Step]]] = {}
    for name, stock in baselines.items():
        work[name] = partial(profile_stock, stock, model)
    for name, recipe in recipes.items():
        work[name] = partial(profile_recipe, recipe, model, backend)
    for name, run in work.items():
        free(model.device)
        try:
            changed(name, run())
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
        for each in model.transformers:
            check_restored(name, each)
    return missing


@contextmanager
def _profiled(model: Model, chosen: dict[int, str]) -> Iterator[dict[str, Step]]:
    """Profile the calls of the transformer with these numbers; filled in as they run."""
    found: dict[str, Step] = {}
    state: dict[str, Any] = {"call": -1, "profiler": None}
    on_gpu = model.device.type == "cuda"

    def start(*_: Any) -> None:
        state["call"] += 1
        if state["call"] in chosen:
            if on_gpu:
                torch.cuda.synchronize(model.device)
            kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
            state["profiler"] = profile(activities=[kind])
            state["profiler"].__enter__()

    def stop(*_: Any) -> None:
        if state["profiler"] is None:
            return
        if on_gpu:
            torch.cuda.synchronize(model.device)
        state["profiler"].__exit__(None, None, None)
        found[chosen[state["call"]]] = _read(state["profiler"], on_gpu)
        state["profiler"] = None

    transformer = model.pipe.transformer
    handles = [
        transformer.register_forward_pre_hook(start, prepend=True),
        transformer.register_forward_hook(stop, always_call=True),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _read(profiler: Any, on_gpu: bool) -> Step:
    if not on_gpu:
        totals = [(x.key, x.self_cpu_time_total / 1e3) for x in profiler.key_averages()]
        return classify(totals)
    events = [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
        and event.name not in WAITS
        and not getattr(event, "is_user_annotation", False)
    ]
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    totals = [(e.name, b - a) for e, (a, b) in zip(events, spans, strict=True)]
    return classify([(name, us / 1e3) for name, us in totals], idle(spans) / 1e3)


def classify(kernels: Sequence[tuple[str, float]], idle_ms: float = 0.0) -> Step:
    """Sum ``(name, milliseconds)`` by part."""
    ms: defaultdict[str, float] = defaultdict(float)
    unknown: defaultdict[str, float] = defaultdict(float)
    for name, time in kernels:
        part = part_of(name)
        ms[part] += time
        if part == OTHER:
            unknown[name] += time
    if idle_ms > 0:
        ms[IDLE] += idle_ms
    return Step(dict(ms), sorted(unknown.items(), key=lambda item: -item[1]))


def idle(spans: Sequence[Interval]) -> float:
    """Time between the first start and the last end in which nothing ran, in the spans' unit."""
    total, reached = 0.0, min((a for a, _ in spans), default=0.0)
    for start, end in sorted(spans):
        total += max(start - reached, 0.0)
        reached = max(reached, end)
    return total
