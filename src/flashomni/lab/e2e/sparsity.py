"""Time of a step against sparsity: caching alone (FC), skipping alone (BSS), and both.

The choice of blocks is ``topk``'s, so that sparsity is what was asked for. Each point is a short
run of the real pipeline: one dense step that records, one Update and a few Dispatch steps. They are
divided by our own dense steps (policy ``dense``), run anew before each mode.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.table import Table

from flashomni.engine import Recipe
from flashomni.lab.e2e.methods import attention_shares, grouped, warm_up, work_of
from flashomni.lab.e2e.models import Model
from flashomni.lab.e2e.run import free, generate
from flashomni.lab.results import origin
from flashomni.models import accelerate
from flashomni.policies import make_policy

MODES: dict[str, Callable[[float], tuple[float, float]]] = {
    "FC": lambda density: (density, 1.0),
    "BSS": lambda density: (1.0, density),
    "both": lambda density: (math.sqrt(density), math.sqrt(density)),
}
POINTS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class SparsityRow:
    """One point. Times are medians of calls of the transformer.

    ``sparsity`` was asked for; ``density`` is the computed share of (query, key) pairs that came
    of it: text is always kept, and blocks are whole. ``normalised`` is dispatch_ms / full_ms.
    """

    model: str
    tokens: int
    mode: str
    sparsity: float
    density: float
    full_ms: float
    update_ms: float
    dispatch_ms: float
    normalised: float
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str


@dataclass(frozen=True)
class Point:
    """What is run for one row: ``steps`` planned steps, of which the last, dense, is left out."""

    mode: str
    sparsity: float
    recipe: Recipe
    steps: int


def point_for(mode: str, sparsity: float, dispatch_steps: int) -> Point:
    """A recipe of this sparsity with one Full and one Update step, then Dispatch steps.

    Args:
        mode: one of ``MODES``.
        sparsity: share of (query, key) pairs to leave out, 0 or more and below 1.
        dispatch_steps: how many.

    Raises:
        ValueError: a value is not allowed.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"point must be from 0 to below 1, got {sparsity}")
    if dispatch_steps < 1:
        raise ValueError(f"dispatch-steps must be at least 1, got {dispatch_steps}")
    q_density, kv_density = MODES[mode](1.0 - sparsity)
    steps = dispatch_steps + 3  # and the dense last step, which is not run
    recipe = Recipe.of(
        make_policy("topk", q_density=q_density, kv_density=kv_density),
        name=f"{mode} {sparsity:g}",
        interval=dispatch_steps + 1,
        warmup=1.5 / steps,
        order=1,
    )
    return Point(mode, sparsity, recipe, steps)


def recipes_for(modes: list[str], points: list[float], dispatch_steps: int) -> list[Point]:
    """Every mode at every sparsity.

    Raises:
        ValueError: see ``point_for``.
    """
    return [point_for(mode, point, dispatch_steps) for mode in modes for point in points]


def sweep(
    model: Model, points: list[Point], command: str, backend: str | None = None
) -> Iterator[SparsityRow]:
    """A row for each point, after a run that compiles."""
    model.refuse_shared("a sweep")
    free(model.device)
    warm_up(points[0].recipe, model, backend)
    mode, full_ms = "", 0.0
    for point in points:
        if point.mode != mode:
            mode, full_ms = point.mode, _dense_ms(model, point.steps, backend)
        yield _measure(model, point, full_ms, command, backend)


def tabulate_sparsity(rows: list[SparsityRow]) -> Table:
    """Points for the eye."""
    table = Table(
        "mode", "sparsity", "density", "full ms", "update ms", "dispatch ms", "normalised"
    )
    table.title = f"{rows[0].model}, {rows[0].tokens} tokens, {rows[0].gpu}"
    for row in rows:
        times = (f"{ms:.1f}" for ms in (row.full_ms, row.update_ms, row.dispatch_ms))
        shares = f"{row.sparsity:g}", f"{row.density:.3f}"
        table.add_row(row.mode, *shares, *times, f"{row.normalised:.3f}")
    return table


def _dense_ms(model: Model, steps: int, backend: str | None) -> float:
    """Median of our own dense steps, the first left out."""
    dense = Recipe.of(make_policy("dense"), name="dense", interval=1, warmup=0.0)
    with accelerate(model.pipe, dense, backend=backend):
        return statistics.median(generate(model, steps).calls[1:]) * 1e3


def _measure(
    model: Model, point: Point, full_ms: float, command: str, backend: str | None
) -> SparsityRow:
    with accelerate(model.pipe, point.recipe, backend=backend) as engine:
        run = generate(model, point.steps, stop_after=point.steps - 1)
        summary = engine.report()
    kinds = [work_of(step) for step in summary.steps]
    calls = grouped(kinds, run.calls)
    ms = {kind: statistics.median(values) * 1e3 for kind, values in calls.items()}
    return SparsityRow(
        model=model.name,
        tokens=model.tokens,
        mode=point.mode,
        sparsity=point.sparsity,
        density=round(attention_shares(summary, kinds)["dispatch"], 4),
        full_ms=round(full_ms, 3),
        update_ms=round(ms["update"], 3),
        dispatch_ms=round(ms["dispatch"], 3),
        normalised=round(ms["dispatch"] / full_ms, 4),
        **origin(model.device, command),
    )
