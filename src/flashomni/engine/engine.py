"""The engine as users hold it: report, remove, step, reset."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from flashomni.engine.callers import weakly
from flashomni.engine.recipe import Recipe
from flashomni.engine.runtime import Runtime
from flashomni.engine.symbols_file import attention_name, measured, save_symbols
from flashomni.engine.trace import Summary


class Engine:
    """Accelerates one model with one recipe. Made by :func:`flashomni.accelerate`.

    It is a context manager: leaving it removes it. State belongs to a generation and a branch: a
    generation is one run of one caller (a pipeline, or a name given to :meth:`step`), and several
    may be in flight on one model as long as their calls do not overlap in time.
    """

    def __init__(
        self,
        runtime: Runtime,
        pipe: Any,
        detach: Callable[[], None],
        component: str = "transformer",
    ) -> None:
        self._component = component
        self._runtime, self._detach = runtime, detach
        self._pipe = None if isinstance(pipe, nn.Module) else weakly(pipe)
        self._removed = False

    @property
    def recipe(self) -> Recipe:
        """What is computed and what is cached."""
        return self._runtime.recipe

    def report(self) -> Summary:
        """What the last generation computed, skipped, cost and kept. ``print`` it."""
        runtime = self._runtime
        summary = runtime.trace.summary(type(runtime.model).__name__, self.recipe)
        if self.recipe.groups:
            found = runtime.trace.of_groups(runtime.division, runtime.layers)
            summary = replace(summary, groups=found)
        learned = [] if runtime.learner is None else runtime.learner.notes()
        notes = [*summary.notes, *learned, *runtime.graphs.notes(), *runtime.redone.notes()]
        notes += [*runtime.unserved.notes(), *runtime.noted()]
        notes += [note for each in runtime.all_ranks() for note in each.notes()]
        turns = None if runtime.last is None else runtime.last.turns
        notes += [turns.note] if turns is not None and turns.note else []
        room = None if runtime.last is None else runtime.last.room
        notes += [] if room is None else room.notes()
        notes += [] if runtime.budget is None else runtime.budget.notes()
        if self._replaced():
            note = (
                f"the pipeline has another {self._component} by now, which is not accelerated: "
                "these are the figures of the one that was"
            )
            notes = [note, *notes]
        number = 1 if runtime.last is None else runtime.last.number
        return replace(summary, tier=runtime.tier, notes=notes, generation=number)

    def save_symbols(self, path: str | Path) -> None:
        """Write the symbols that the last generation chose last, as safetensors.

        Of a recipe that chooses them anew at each Update, only while the generation runs.
        A recipe with ``sparse.symbols`` uses them instead of a choice. With ``sparse.measure`` the
        attention mass that they hold and the error of the carried difference go with them, by layer
        and step (see :mod:`flashomni.engine.symbols_file`).

        Raises:
            ValueError: there are none.
            NotImplementedError: the sequence is spread over ranks.
        """
        runtime = self._runtime
        if runtime.sharding.ranks is not None:
            raise NotImplementedError("a rank has the symbols of its own heads only: save on one")
        branches = {} if runtime.last is None else runtime.last.branches
        chosen = {
            name: {
                attention_name(runtime.layers[i], number): symbols
                for (i, number), symbols in branch.symbols().items()
            }
            for name, branch in branches.items()
        }
        values = {k: v for name in chosen for k, v in measured(runtime.trace, name).items()}
        about = {"model": type(runtime.model).__name__, "recipe": self.recipe.name}
        save_symbols(path, chosen, values, **about)

    def remove(self) -> None:
        """Take the engine off the pipeline, which is bit for bit what it was before."""
        if not self._removed:
            self._removed = True
            self._detach()
            self._runtime.clock.remove()
        self._runtime.reset()

    def reset(self) -> None:
        """Drop all caches; the next call of the model starts a generation."""
        self._runtime.reset()

    def step(
        self,
        step: int,
        num_steps: int,
        branch: str | None = None,
        generation: Hashable = None,
    ) -> None:
        """Say explicitly which step this thread's next call of the model is.

        Needed only where no pipeline tells it (a loop of your own around a bare transformer).

        Args:
            step: from 0; going back, or step 0 again, starts a new generation.
            num_steps: of this generation.
            branch: name of the conditioning branch, if there are several.
            generation: any name; calls of different names have caches of their own and may
                alternate.

        Raises:
            ValueError: a number is out of range.
        """
        self._runtime.clock.announce(step, num_steps, branch, generation)

    @property
    def attached(self) -> bool:
        """Whether the engine is installed on the model that its pipeline uses."""
        return not self._removed and not self._replaced()

    @property
    def running(self) -> bool:
        """Whether a call of the model is under way in this thread."""
        return self._runtime.running

    @property
    def finished(self) -> bool:
        """Whether no generation is under way: none has begun, or the last one's steps are done."""
        return self._runtime.last is None or self._runtime.last.finished

    def _replaced(self) -> bool:
        """Whether the pipeline was given another transformer."""
        pipe = None if self._pipe is None else self._pipe()
        if pipe is None:
            return False
        now = getattr(pipe, self._component, None)
        return getattr(now, "_orig_mod", now) is not self._runtime.model

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()
