"""The engine: knows the step, holds the caches, hands each layer its run. Knows no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashomni.engine.clock import Clock, Tick
from flashomni.engine.forecasts import forecasts
from flashomni.engine.layer import LayerRun, StepPlan
from flashomni.engine.recipe import Recipe
from flashomni.engine.schedules.interval import StepKind
from flashomni.engine.state.branch import Branch
from flashomni.engine.state.span import Streams
from flashomni.engine.state.storage import Lane, Storage
from flashomni.engine.trace import LayerRecord, StepRecord, Summary, Trace
from flashomni.symbols import Grid


class Engine:
    """Accelerates one model with one recipe. Made by :func:`flashomni.accelerate`.

    It is a context manager: leaving it removes it. State belongs to a generation and a branch;
    a new generation, another shape or another number of steps starts from nothing.

    Args:
        model: class name of the transformer, for reports.
        recipe: what to compute and what to cache.
        layers: names of the attention layers, in order.
        clock: tells the step.
        backend: take exactly this backend in every op; by default the best that accepts.
    """

    def __init__(
        self,
        model: str,
        recipe: Recipe,
        layers: list[str],
        clock: Clock,
        backend: str | None = None,
    ) -> None:
        self.recipe = recipe
        self._model, self._layers, self._clock, self._backend = model, layers, clock, backend
        self._branches: dict[str, Branch] = {}
        self._trace = Trace()
        self._tick: Tick | None = None
        self._plan: StepPlan | None = None
        self._record: StepRecord | None = None
        self._memo: dict[Any, Any] = {}
        self._lane: Lane | None = None
        self._detach: Callable[[], None] | None = None

    # What users call.

    def report(self) -> Summary:
        """What the last generation computed, skipped, cost and kept. ``print`` it."""
        return self._trace.summary(self._model, self.recipe.to_dict())

    def remove(self) -> None:
        """Take the engine off the pipeline, which is bit for bit what it was before."""
        if self._detach is not None:
            self._detach()
            self._detach = None
        self.reset()

    def reset(self) -> None:
        """Drop all caches; the next call of the model starts a generation."""
        self._clock.reset()
        self._branches.clear()
        self._tick = self._plan = self._record = None
        self._memo.clear()

    def step(self, step: int, num_steps: int, branch: str | None = None) -> None:
        """Say explicitly which step the next call of the model is.

        Needed only where no pipeline tells it (a bare transformer, a scheduler without
        ``step_index``).

        Args:
            step: from 0; going back starts a new generation.
            num_steps: of this generation.
            branch: name of the conditioning branch, if there are several.
        """
        self._clock.announce(step, num_steps, branch)

    @property
    def attached(self) -> bool:
        """Whether the engine is installed on a model."""
        return self._detach is not None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    # What models/ calls.

    def attach(self, detach: Callable[[], None]) -> None:
        """Remember how to take the engine off again."""
        self._detach = detach

    def begin(self, context: str | None, device: torch.device) -> None:
        """A call of the model starts."""
        if torch.is_grad_enabled():
            raise ValueError("an accelerated model is for inference: call it under torch.no_grad()")
        tick = self._clock.tick(context)
        if tick.new_run:
            self._branches.clear()
            self._trace.clear()
        if tick.branch not in self._branches:
            self._branches[tick.branch] = Branch(len(self._layers), self.recipe)
        branch = self._branches[tick.branch]
        kind = self.recipe.schedule.kind(tick.step, tick.num_steps)
        if tick.step == tick.num_steps - 1:
            branch.reset()  # the last step is dense: its memory can go before it peaks
        self._tick, self._memo = tick, {}
        self._record = self._trace.begin(tick.step, kind.value, tick.branch, device)
        self._plan = self._make_plan(kind, tick, branch, device)
        branch.prefetch(0, self._plan.stores)

    def _make_plan(
        self, kind: StepKind, tick: Tick, branch: Branch, device: torch.device
    ) -> StepPlan:
        recipe = self.recipe
        since = 0 if branch.last_update is None else tick.step - branch.last_update
        basis = forecasts()[recipe.forecast]
        return StepPlan(
            kind=kind,
            step=tick.step,
            records=recipe.schedule.records(tick.step, tick.num_steps),
            probes=recipe.schedule.probes(tick.step, tick.num_steps),
            progress=torch.full((), (tick.step + 1) / tick.num_steps, device=device),
            coefficients=_to_device(basis(recipe.order, since), device),
            layer_coefficients=_to_device(basis(recipe.layer_order, since), device),
            storage=self._storage(device),
            num_steps=tick.num_steps,
            branch=tick.branch,
        )

    def _storage(self, device: torch.device) -> Storage:
        on_host = self.recipe.history_device == "host" and device.type == "cuda"
        if on_host and (self._lane is None or self._lane.device != device):
            self._lane = Lane(device)
        return Storage(self.recipe.history_dtype, self._lane if on_host else None)

    def end(self) -> None:
        """A call of the model is over."""
        plan, branch = self._current()
        if plan.stores:
            branch.spans.finish(plan.step)
        if plan.kind is StepKind.UPDATE:
            branch.last_update = plan.step
        sizes = [branch.nbytes() for branch in self._branches.values()]
        self._trace.saw_bytes(sum(d for d, _ in sizes), sum(h for _, h in sizes))
        self._stop()

    def abort(self) -> None:
        """A call of the model has raised, if one is under way: its branch starts afresh."""
        if self.running:
            self._current()[1].reset()
            self._stop()

    def _stop(self) -> None:
        if self._record is not None:
            self._record.watch.stop()
        if self._lane is not None:
            self._lane.flush()
        self._tick = self._plan = self._record = None
        self._memo.clear()

    @property
    def running(self) -> bool:
        """Whether a call of the model is under way."""
        return self._plan is not None

    def memo(self, key: Any, compute: Callable[[], Any]) -> Any:
        """``compute()``, once in each call of the model: for what all layers share."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def block(self, index: int, streams: Streams, compute: Callable[[], Streams]) -> Streams:
        """Run block ``index``, or replay it where it is cached whole.

        Args:
            index: position in the list of layers.
            streams: what the block gets and returns, ``[B, R, K]`` each.
            compute: runs the block, which calls :meth:`layer`; gives the streams behind it.
        """
        plan, branch = self._current()
        branch.expect(index, streams)
        if plan.kind is StepKind.DISPATCH:
            behind = branch.spans.replay(index, streams, plan.layer_coefficients)
            if behind is not None:
                self._bypassed(index, branch)
                return behind
        behind = compute()
        if plan.stores and branch.layers[index].degraded:
            branch.spans.record(index, streams, behind, plan.step)
        return behind

    def _bypassed(self, index: int, branch: Branch) -> None:
        """Record that a layer was left out, and what it would have cost."""
        assert self._record is not None
        record = LayerRecord(self._layers[index], "bypass", 0.0, 0.0)
        for op, flops, _ in branch.layers[index].ops:
            record.add(op, flops, 0.0)
        self._record.layers.append(record)

    def layer(self, index: int, grid: Grid) -> LayerRun:
        """The run of layer ``index`` in this call.

        Args:
            index: position in the list of layers.
            grid: blocks, text span and valid length of this call.
        """
        plan, branch = self._current()
        assert self._record is not None
        if plan.kind is StepKind.DISPATCH and branch.last_update is None:
            # A branch that joins late (CFG from some step on) has nothing to dispatch from.
            plan.kind = StepKind.UPDATE
            self._record.kind = StepKind.UPDATE.value
        branch.prefetch(index + 1, plan.stores)
        record = LayerRecord(self._layers[index], plan.kind.value)
        self._record.layers.append(record)
        return LayerRun(
            branch.layers[index],
            plan,
            self.recipe,
            grid,
            record,
            self._backend,
            index,
            len(self._layers),
        )

    def _current(self) -> tuple[StepPlan, Branch]:
        assert self._plan is not None and self._tick is not None, "no call is under way"
        return self._plan, self._branches[self._tick.branch]


def _to_device(values: list[float], device: torch.device) -> Tensor:
    """A small fp32 tensor on the device, without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(values, device=device)
    return torch.tensor(values, pin_memory=True).to(device, non_blocking=True)
