"""One open page: its pipeline, its recipe, its results. Pages share pipelines and nothing else."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashomni.engine import Recipe
from flashomni.lab import metrics
from flashomni.lab.generation import Generation
from flashomni.studio import knobs
from flashomni.studio.events import Emit, Event, Progress, Waiting, streamed
from flashomni.studio.outcome import Ask, Dense, Outcome, Row
from flashomni.studio.shelf import Shelf, Shelved
from flashomni.studio.turns import Cancelled
from flashomni.studio.watch import Watch, warm

Work = Callable[[Emit, threading.Event], Any]


class Session:
    """One page.

    Args:
        shelf: where pipelines come from.
        model: to begin with.
        recipe: likewise.

    Attributes:
        recipe: that it generates with.
        base: the recipe that its controls started from.
        num_steps: of the next generation; settings are shown for it.
        outcome: the last result.
        rows: one for each result.
        shown: what the controls of the page show, by their places.
    """

    def __init__(self, shelf: Shelf, model: str, recipe: Recipe | str = "balanced") -> None:
        self.shelf = shelf
        self._model = model
        self._shelved: Shelved | None = shelf.take(model)
        self.recipe = Recipe.of(recipe)
        self._symbols = self.recipe.sparse.symbols  # a file that whoever serves the page named
        self.base, self.num_steps = self.recipe, self.shelved.num_steps
        self.outcome: Outcome | None = None
        self.rows: list[Row] = []
        self.shown: dict[tuple[str, str], knobs.Knob | None] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="flashomni-studio-"))
        # Of pages that are open when the server ends nobody says that they are closed.
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._dense: tuple[str, Dense] | None = None
        self._stops: set[threading.Event] = set()  # of runs: a second one is refused, but begins
        self._busy = threading.Lock()

    # A page that was closed, and comes back after all, finds what it had anew: its machine slept.

    @property
    def shelved(self) -> Shelved:
        """The pipeline that the page has."""
        if self._shelved is None:
            self._shelved = self.shelf.take(self._model)
        return self._shelved

    @property
    def folder(self) -> Path:
        """For files that the page gives out."""
        self._folder.mkdir(exist_ok=True)
        return self._folder

    # The pipeline and the recipe.

    def load(self, model: str) -> Shelved:
        """Take another pipeline; whatever goes wrong, the page keeps the one it has.

        Raises:
            ValueError: there is no such pipeline.
            RuntimeError: the page is generating.
        """
        with self._alone():
            taken = self._shelved = self.shelf.take(model)
            self._model, self.num_steps = taken.name, taken.num_steps
            return taken

    def choose(self, recipe: Recipe | str | Path) -> Recipe:
        """Start from a recipe: a name, a file, or one that was made.

        Raises:
            ValueError: it is none; or it reads a file of this machine, which strangers could so
                find out about, on a page whose models are restricted (see :class:`Shelf`).
        """
        self.recipe = self.base = self._allowed(Recipe.of(recipe))
        return self.recipe

    def _allowed(self, recipe: Recipe) -> Recipe:
        symbols = recipe.sparse.symbols
        if self.shelf.only is not None and symbols not in ("", self._symbols):
            raise ValueError(
                "sparse.symbols must be left out on this page, whose recipes read no files, got "
                f"{symbols!r}"
            )
        return recipe

    def turn(self, key: str, value: Any) -> Recipe:
        """Move a control (see :func:`knobs.turned`); a value that is refused changes nothing.

        Raises:
            ValueError: it is not allowed.
        """
        turned = self._allowed(knobs.turned(self.recipe, key, value, self.num_steps))
        if turned != self.recipe:
            name = self.base.name
            edited = name if name.endswith("-edited") else f"{name}-edited"
            self.recipe = turned.replace(name=edited, tuned=None)
        return self.recipe

    def recipe_file(self) -> Path:
        """The recipe as JSON, named as it is."""
        stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.recipe.name)[:80]
        path = self.folder / f"{stem.strip('.') or 'recipe'}.json"
        self.recipe.save(path)
        return path

    # Runs.

    def cancel(self) -> None:
        """End what runs, at its next step."""
        for stop in tuple(self._stops):
            stop.set()

    def close(self) -> None:
        """The page is gone: its run ends, and what is large is let go."""
        self.cancel()
        self._shelved = self.outcome = self._dense = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def generate(self, ask: Ask) -> Iterator[Event]:
        """Generate, and compare with the stock pipeline if that is asked for.

        Ends with an :class:`Outcome`. The recipe and the pipeline are those of now, whatever
        happens to the page meanwhile.
        """
        recipe, shelved = self.recipe, self.shelved

        def work(emit: Emit, stop: threading.Event) -> Outcome:
            outcome = self._generated(ask, recipe, shelved, emit, stop)
            if stop.is_set():  # behind the last step: a page that is gone keeps nothing
                raise Cancelled
            self.outcome = outcome
            self.rows.append(Row.of(outcome))
            return outcome

        return self.run(work)

    def run(self, work: Work) -> Iterator[Event]:
        """Stream ``work(emit, stop)`` when it is this page's turn."""
        stop, shelved = threading.Event(), self.shelved
        self._stops.add(stop)

        def whole(emit: Emit) -> Any:
            try:
                with (
                    self._alone(),
                    shelved.turns.mine(stop, lambda place: emit(Waiting(place))),
                ):
                    return work(emit, stop)
            finally:
                self._stops.discard(stop)

        return streamed(whole, stop)

    def _alone(self) -> Any:
        return _Alone(self._busy)

    def _generated(
        self, ask: Ask, recipe: Recipe, shelved: Shelved, emit: Emit, stop: threading.Event
    ) -> Outcome:
        loaded = shelved.loaded
        generation = Generation(loaded, ask.prompt, ask.seed, ask.steps)
        generation.call.update(ask.size)
        watch = Watch(generation, ask.live, emit, stop)
        warm(shelved, generation, recipe, watch)
        about = {"model": shelved.name, "prompt": ask.prompt, "seed": ask.seed}
        key = json.dumps({**about, "call": generation.call}, default=str)
        dense, reused = None, False
        if ask.dense:
            if self._dense is not None and self._dense[0] == key:
                dense, reused = self._dense[1], True
            else:
                dense = Dense(*generation.dense(watch.stage("dense")))
                self._dense = (key, dense)
        if generation.repeats:
            emit(Progress("warm-up of CUDA graphs", 0, 0))
        pixels, seconds, summary = generation.accelerated(recipe, watch.stage("accelerated"))
        emit(Progress("measuring", 0, 0))
        distance = flip = None
        if dense is not None:
            distance = metrics.compare(dense.pixels, pixels, ("dense", "accelerated"))
            if distance.psnr_db is not None and metrics.why_no_flip() is None:
                middle = len(pixels) // 2
                flip = metrics.flip(dense.pixels[middle][None], pixels[middle][None])
            elif distance.identical:
                flip = 0.0
        return Outcome(
            shelved.name, ask, dict(generation.call), pixels, seconds, summary, dense, distance,
            flip, reused, watch.why_not,
        )  # fmt: skip


class _Alone:
    """A page does one thing at a time; a second one is refused, not kept waiting."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this page is at work already: cancel, or wait until it is done")

    def __exit__(self, *exc: object) -> None:
        self._lock.release()
