"""Several transformers that share the steps of one pipeline, held as one engine.

Wan 2.2 A14B has two: one for the noisy steps, and ``transformer_2`` for the rest. Each has a
runtime, caches and a schedule of its own, over the steps that it runs; what its caches hold is
freed when its last step is done, before the other one begins.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashomni.engine.engine import Engine
from flashomni.engine.recipe import Recipe
from flashomni.engine.trace import Summary, seconds_by_kind
from flashomni.util.words import in_bytes


class Experts(Engine):
    """The engines of one pipeline: what is asked of it is asked of all of them.

    Args:
        engines: by the names of the pipeline's components, in the order in which they run.

    Attributes:
        engines: likewise.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = dict(engines)

    @property
    def recipe(self) -> Recipe:
        """Of the first one."""
        return next(iter(self.engines.values())).recipe

    def report(self) -> Summary:
        """What the last generation computed in all of them; each step says in which."""
        reports = {name: engine.report() for name, engine in self.engines.items()}
        return merged(reports, {name: e.finished for name, e in self.engines.items()})

    def remove(self) -> None:
        """Take all of them off the pipeline, which is bit for bit what it was before."""
        for engine in self.engines.values():
            engine.remove()

    def reset(self) -> None:
        """Drop all caches; the next call of any of them starts a generation."""
        for engine in self.engines.values():
            engine.reset()

    def step(
        self,
        step: int,
        num_steps: int,
        branch: str | None = None,
        generation: Hashable = None,
    ) -> None:
        """As :meth:`Engine.step`, for whichever transformer is called next.

        Args:
            step: from 0, counted for each transformer alone, as ``num_steps`` is.
            num_steps: that the transformer runs of this generation.
            branch: name of the conditioning branch, if there are several.
            generation: any name.
        """
        next(iter(self.engines.values())).step(step, num_steps, branch, generation)

    def save_symbols(self, path: str | Path) -> None:
        """Each transformer has symbols of its own, for a recipe of its own.

        Raises:
            NotImplementedError: always; the message says whom to ask instead.
        """
        names = " and ".join(f"engine.engines[{n!r}].save_symbols(...)" for n in self.engines)
        raise NotImplementedError(f"symbols of several transformers are a file each: {names}")

    @property
    def attached(self) -> bool:
        """Whether all of them are installed on what the pipeline uses."""
        return all(engine.attached for engine in self.engines.values())

    @property
    def running(self) -> bool:
        """Whether a call of one of them is under way in this thread."""
        return any(engine.running for engine in self.engines.values())

    @property
    def finished(self) -> bool:
        """Whether no generation is under way in any of them."""
        return all(engine.finished for engine in self.engines.values())


def merged(reports: Mapping[str, Summary], finished: Mapping[str, bool]) -> Summary:
    """One summary of several transformers, whose steps follow one another.

    Args:
        reports: of each, by the name of its component.
        finished: whether its last step is done, so that its caches are freed.
    """
    first, *rest = reports.values()
    steps = [{**s, "transformer": name} for name, r in reports.items() for s in r.steps]
    steps.sort(key=lambda step: step["step"])
    dense, executed = ({}, {})  # type: tuple[dict[str, float], dict[str, float]]
    for report in reports.values():
        for op in report.flops_dense:
            dense[op] = dense.get(op, 0.0) + report.flops_dense[op]
            executed[op] = executed.get(op, 0.0) + report.flops_executed[op]
    total = sum(dense.values())
    apart = all(finished[name] for name in list(reports)[:-1])
    together = max if apart else sum
    when = "never at the same time" if apart else "at the same time"
    sizes = (f"{name} {in_bytes(r.cache_bytes)}" for name, r in reports.items())
    return replace(
        first,
        model=" and ".join(f"{name} {r.model}" for name, r in reports.items()),
        recipe=first.recipe if all(r.recipe == first.recipe for r in rest) else _both(reports),
        steps=steps,
        layers=max((r.layers for r in reports.values()), key=len),
        seconds_by_kind=seconds_by_kind(steps),
        flops_dense=dense,
        flops_executed=executed,
        flops_skipped=1 - sum(executed.values()) / total if total else 0.0,
        cache_bytes=together(r.cache_bytes for r in reports.values()),
        cache_bytes_host=together(r.cache_bytes_host for r in reports.values()),
        notes=[
            f"caches, {when}: {', '.join(sizes)}",
            *_left_out(reports),
            *(f"{name}: {note}" for name, r in reports.items() for note in r.notes),
        ],
        generation=max(r.generation for r in reports.values()),
        tier=first.tier if all(r.tier == first.tier for r in rest) else _tiers(reports),
        groups=[
            {**group, "transformer": name} for name, r in reports.items() for group in r.groups
        ],
    )


def _both(reports: Mapping[str, Summary]) -> dict[str, Any]:
    recipes = {name: report.recipe for name, report in reports.items()}
    return {"name": " and ".join(dict.fromkeys(r["name"] for r in recipes.values())), **recipes}


def _left_out(reports: Mapping[str, Summary]) -> list[str]:
    """A note, where a generation had steps of one transformer alone."""
    counts = {name: report.generation for name, report in reports.items()}
    if len(set(counts.values())) == 1:
        return []
    numbers = ", ".join(f"{name} {count}" for name, count in counts.items())
    return [f"not all took part in each generation, figures are of the last one of each: {numbers}"]


def _tiers(reports: Mapping[str, Summary]) -> str:
    return " and ".join(report.tier for report in reports.values())
