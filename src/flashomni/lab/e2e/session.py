"""All methods on one model, the stock baselines before and after them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from flashomni.lab.e2e.methods import Measure, Plan, Timing, merged, time_stock
from flashomni.lab.e2e.models import Model
from flashomni.lab.e2e.run import OnStep, free, silent
from flashomni.lab.e2e.stock import Stock, check_restored

Watch = Callable[[str], OnStep]


@dataclass
class Results:
    """What has been measured so far.

    Args:
        baselines: stock methods by name.
        methods: the others by name.
        missing: what could not be measured, and why.
    """

    baselines: dict[str, Timing] = field(default_factory=dict)
    methods: dict[str, Timing] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


class Session:
    """Measures baselines, methods, and the baselines again.

    Args:
        model: on what.
        baselines: stock methods by name.
        methods: how to measure the others, by name.
        plan: how long to run.
        watch: ``watch(name)`` shows the progress of one method.
        changed: called whenever there are more results: they can be saved before the end.
    """

    def __init__(
        self,
        model: Model,
        baselines: dict[str, Stock],
        methods: dict[str, Measure],
        plan: Plan,
        watch: Watch = lambda name: silent,
        changed: Callable[[Results], None] = lambda results: None,
    ) -> None:
        self.model, self.plan, self.watch, self.changed = model, plan, watch, changed
        self._baselines, self._methods = baselines, methods
        self.results = Results()

    def run(self) -> Results:
        """Measure everything.

        Raises:
            RuntimeError: no baseline could be measured, or a method did not leave the model as it
                was.
        """
        found = self.results
        for name, stock in self._baselines.items():
            timing = self._try(name, partial(self._stock, stock, name))
            if timing is not None:
                found.baselines[name] = timing
        if not found.baselines:
            raise RuntimeError(f"no baseline could be measured: {found.missing}")
        self.changed(found)
        for name, measure in self._methods.items():
            step = self.watch(name)
            timing = self._try(name, partial(measure, self.model, self.plan, step))
            if timing is not None:
                found.methods[name] = timing
                self.changed(found)
        for name, before in list(found.baselines.items()):
            stock = self._baselines[name]
            after = self._try(name, partial(self._stock, stock, name))
            if after is not None:
                found.baselines[name] = merged(before, after, self.plan.steps * self.model.calls)
        self.changed(found)
        return found

    def _stock(self, stock: Stock, name: str) -> Timing:
        return time_stock(stock, self.model, self.plan, self.watch(name))

    def _try(self, name: str, measure: Callable[[], Timing]) -> Timing | None:
        """A method that cannot run here must not cost the results of the others."""
        free(self.model.device)
        timing = None
        try:
            timing = measure()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = (str(error).strip() or "no message").splitlines()[0]
            self.results.missing[name] = (
                f"{type(error).__name__}: {text} ({where.name}, line {where.lineno})"
            )
        for each in self.model.transformers:
            check_restored(name, each)
        return timing
