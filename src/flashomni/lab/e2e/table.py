"""Timings as rows, and as a table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from rich.table import Table

from flashomni.lab.e2e.methods import GENERATION, Timing
from flashomni.lab.e2e.models import Model
from flashomni.lab.e2e.session import Results
from flashomni.lab.results import origin
from flashomni.lab.versions import device_name


@dataclass(frozen=True)
class GenerationRow:
    """One kind of step of one method, beside one baseline; ``generation`` is all steps.

    ``density`` is the computed share of (query, key) pairs of attention, empty where a method does
    not say. ``ms`` is the median call of the transformer, for ``generation`` seconds / steps.
    ``generation_s``, ``baseline_s`` and ``speedup``, their ratio, are of complete generations in
    every row; of stock methods, and of recipes where all steps are alike, they are steps x medians,
    otherwise the clock's. ``peak_gib`` is torch's, weights included.
    """

    model: str
    tokens: int
    recipe: str
    density: float | None
    step_kind: str
    ms: float
    generation_s: float
    baseline: str
    baseline_s: float
    speedup: float
    peak_gib: float | None
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str


def rows_of(results: Results, model: Model, steps: int, command: str) -> list[GenerationRow]:
    """A row for each kind of step and for the generation of each method, against each baseline."""
    rows, about = [], origin(model.device, command)
    for name, timing in (*results.baselines.items(), *results.methods.items()):
        times = {kind: statistics.median(calls) for kind, calls in timing.calls.items()}
        times[GENERATION] = timing.generation_s / steps
        for kind, seconds in times.items():
            density = (timing.densities or {}).get(kind)
            for baseline, other in results.baselines.items():
                rows.append(
                    GenerationRow(
                        model=model.name,
                        tokens=model.tokens,
                        recipe=name,
                        density=_rounded(density, 4),
                        step_kind=kind,
                        ms=round(seconds * 1e3, 3),
                        generation_s=round(timing.generation_s, 3),
                        baseline=baseline,
                        baseline_s=round(other.generation_s, 3),
                        speedup=round(other.generation_s / timing.generation_s, 3),
                        peak_gib=_rounded(timing.peak_gib, 2),
                        **about,
                    )
                )
    return rows


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def tabulate_generations(results: Results, model: Model, title: str = "") -> Table:
    """One line a method, for the eye."""
    columns = ["method", "ms a step", "generation"]
    columns += [f"against {name}" for name in results.baselines]
    columns += ["density", "FLOPs skipped", "peak GiB"]
    heading = f"{model.name}, {model.tokens} tokens, {device_name(model.device)}"
    table = Table(*columns, title=title or heading)
    table.columns[0].overflow = "fold"
    for name, timing in (*results.baselines.items(), *results.methods.items()):
        table.add_row(name, *_cells(timing, results))
    return table


def _cells(timing: Timing, results: Results) -> list[str]:
    kinds = [
        f"{len(calls)} {kind} {statistics.median(calls) * 1e3:.1f}"
        for kind, calls in timing.calls.items()
    ]
    densities = timing.densities or {}
    share = densities.get("dispatch", densities.get(GENERATION))
    skipped, peak = timing.flops_skipped, timing.peak_gib
    host = f" + {timing.host_gib:.1f} host" if timing.host_gib else ""
    return [
        "\n".join(kinds),
        f"{'~' if timing.estimated else ''}{timing.generation_s:.2f} s",
        *(f"{x.generation_s / timing.generation_s:.2f}x" for x in results.baselines.values()),
        "" if share is None else f"{share:.3f}",
        "" if skipped is None else f"{skipped:.1%}",
        "" if peak is None else f"{peak:.1f}{host}",
    ]


def drifts(results: Results) -> list[str]:
    """How each baseline's median step changed from before the methods to after them."""
    return [
        f"{name}: {first * 1e3:.1f} ms a step before, {last * 1e3:.1f} after "
        f"({last / first - 1:+.1%})"
        for name, timing in results.baselines.items()
        if len(timing.runs) == 2
        for first, last in [timing.runs]
    ]
