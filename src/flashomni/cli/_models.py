"""What ``bench`` does with a real-size model: build it, time generations, profile steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashomni.cli._common import (
    bar_name,
    command_line,
    console,
    pick_dtype,
    progress_bars,
    quiet,
    say,
    status,
)

if TYPE_CHECKING:
    import torch

    from flashomni.engine import Recipe
    from flashomni.lab.e2e.breakdown import PartRow, Step
    from flashomni.lab.e2e.methods import Measure, Plan
    from flashomni.lab.e2e.models import Model
    from flashomni.lab.e2e.run import OnStep
    from flashomni.lab.e2e.session import Results
    from flashomni.lab.e2e.stock import Stock
    from flashomni.lab.results import Book


def built(name: str, device: torch.device, dtype: str, seed: int, structure: float) -> Model:
    from flashomni.lab.e2e.models import build
    from flashomni.lab.e2e.run import weights_gib

    with status(f"building {name}"):
        quiet()
        model = build(name, device, pick_dtype(dtype, device), seed, structure)
    note = f"; {model.note}" if model.note else ""
    console.print(
        f"{name}: {model.tokens} tokens, random weights of {weights_gib(model):.1f} GiB{note}",
        highlight=False,
    )
    return model


def timed(
    model: Model,
    baselines: dict[str, Stock],
    methods: dict[str, Measure],
    plan: Plan,
    book: Book | None,
) -> None:
    from flashomni.lab.e2e.session import Session
    from flashomni.lab.e2e.table import drifts, rows_of, tabulate_generations

    with progress_bars() as progress:

        def watch(name: str) -> OnStep:
            task = progress.add_task(bar_name(name), total=None)
            return lambda step, total: progress.update(task, completed=step, total=total)

        def changed(results: Results) -> None:
            if book is not None:
                book.write(rows_of(results, model, plan.steps, command_line()))

        results = Session(model, baselines, methods, plan, watch, changed).run()
    console.print(tabulate_generations(results, model))
    for line in drifts(results):
        console.print(line, highlight=False)
    console.print("~: steps x median. A run that compiles came first and does not count.")
    for name, timing in results.methods.items():
        for note in timing.notes:
            console.print(f"{name}: {note}", highlight=False)
    _say_missing(results.missing)


def profile_parts(
    model: Model,
    baselines: dict[str, Stock],
    recipes: dict[str, Recipe],
    backend: str | None,
    book: Book | None,
) -> None:
    from flashomni.lab.e2e.breakdown import part_rows, profile_all, tabulate_parts

    rows: list[PartRow] = []
    with progress_bars() as progress:
        task = progress.add_task("profiled", total=len(baselines) + len(recipes))

        def changed(name: str, found: dict[str, Step]) -> None:
            progress.advance(task)
            rows.extend(part_rows(model, name, found, command_line()))
            if book is not None:
                book.write(rows)
            for kind, step in found.items():
                for kernel, ms in step.unknown[:8]:
                    text = f"other, {name}, {kind}: {ms:.3f} ms {kernel[:120]}"
                    say(text)

        missing = profile_all(model, baselines, recipes, backend, changed)
    if rows:
        console.print(tabulate_parts(rows))
    _say_missing(missing)


def _say_missing(missing: dict[str, str]) -> None:
    for name, why in missing.items():
        say(f"{name} not measured: {why}")
