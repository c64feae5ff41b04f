"""A call of the model that is under way, and what a schedule that decides late may see of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashomni.engine.recipe import Recipe
from flashomni.engine.schedules import Signals, StepKind
from flashomni.engine.state.branch import Branch
from flashomni.engine.state.generation import Generation, Tick
from flashomni.engine.state.output import take_apart
from flashomni.engine.state.span import Streams
from flashomni.engine.step_plan import StepPlan
from flashomni.engine.trace import LayerRecord, StepRecord
from flashomni.parallel import Shard
from flashomni.symbols import Grid


@dataclass(frozen=True)
class Place:
    """Where a block stands, for schedules that look inside a step.

    Args:
        streams: the token streams in front of it, ``[B, R, K]`` each.
        main: which of them holds the vision tokens.
        modulated: makes its input after norm and modulation, where the adapter knows how.
    """

    streams: Streams
    main: int = 0
    modulated: Callable[[], Tensor] | None = None


@dataclass
class Call:
    """A call of the model that is under way.

    Attributes:
        plans: of each group of layers; what a call launches depends on their kinds (see
            :attr:`kinds`), the densities of the symbols aside.
        elsewhere: whether another rank runs it.
        left_out: whether the branch follows from the first one, and the model does not run.
        decided: whether the schedule has looked inside this step already.
        settled: whether the spans that it recorded are the current ones by now.
        entrance: streams in front of the first block, kept where the schedule looks inside.
    """

    generation: Generation
    branch: Branch
    tick: Tick
    plans: list[StepPlan]
    record: StepRecord
    inputs: Mapping[str, Any]
    latents: str
    left_out: bool = False
    elsewhere: bool = False
    decided: bool = False
    settled: bool = False
    entrance: Streams = ()
    shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[StepKind, ...]:
        """What the step does in each group of layers."""
        return tuple(plan.kind for plan in self.plans)

    def update_instead(self) -> None:
        """The step turns out to be one that computes."""
        for plan in self.plans:
            if plan.kind is StepKind.DISPATCH:
                plan.kind = StepKind.UPDATE
        self.record.kind = overall(self.kinds).value

    def spread(self, shard: Shard) -> None:
        """The blocks that run from now on have a share of their sequence."""
        for plan in self.plans:
            plan.shard = shard

    def live_share(self) -> float:
        """Share of the blocks that have run, of those that were come to so far."""
        kinds = [layer.kind for layer in self.record.layers]
        return 1 - kinds.count(StepKind.BYPASS.value) / max(len(kinds), 1)

    def settle(self) -> None:
        """The last block has run: what was recorded is what the next steps dispatch from."""
        did = [plan.sparse for plan in self.plans]  # a replayed call is settled by its recording
        words = ("chooses", "refreshes")
        self.record.does = tuple(word for word in words if any(getattr(x, word) for x in did))
        if self.settled:
            return
        self.settled = True
        for plan, group in zip(self.plans, self.branch.groups, strict=False):  # arranged since
            if plan.stores:
                whole = group.spans.finish(plan.step)
                if plan.recipe.at_output:  # a hook put on since may have run the model without us
                    whole = plan.step in self.branch.output.times
                # Where a block's output was written to before it could be kept, nothing was stored.
                group.stored = plan.step if whole else None
            group.mark(plan.sparse, plan.step)

    @property
    def changes(self) -> bool:
        """Whether it changes what the branch remembers, or only reads it."""
        return any(
            plan.stores or plan.probes or plan.sparse.chooses or plan.sparse.refreshes
            for plan in self.plans
        )

    @property
    def key(self) -> Hashable:
        """What tells it from other calls that find the same caches and get arguments alike.

        A plain full step is like any other; what others do depends on when they come.
        """
        skips = any(plan.sparse.skips for plan in self.plans)
        if not self.changes and not skips and set(self.kinds) == {StepKind.FULL}:
            return StepKind.FULL
        does = tuple(
            (plan.kind, plan.records, plan.probes, plan.optimistic, plan.sparse)
            for plan in self.plans
        )
        whole: list[bool] = []
        layers, of = self.branch.layers, self.branch.division.of
        for cache, number in zip(layers, of, strict=True):
            plan = self.plans[number]
            threshold = plan.recipe.sparse.degrade_below
            if plan.stores and threshold > 0:
                whole.append(cache.expected(plan.step, threshold, plan.hopeful))
        return self.tick.step, self.tick.num_steps, does, tuple(whole)

    @property
    def sort(self) -> Hashable:
        """What is the same in all calls of its branch, and may be another in other branches."""
        return self.tick.branch, self.generation.geometry

    def numbers(self) -> list[dict]:
        """The coefficients that it has used, of each group of layers."""
        return [plan.numbers for plan in self.plans]

    def prepare(self, numbers: list[dict]) -> None:
        """Make the coefficients now that it is going to use; see :meth:`numbers`."""
        for plan, wanted in zip(self.plans, numbers, strict=True):
            for key in wanted:
                plan.weights(key)

    def levels(self) -> tuple[float, ...]:
        """The noise that coefficients may depend on; none where they do not."""
        noise = self.generation.noise
        return () if noise is None else noise.levels()

    def renew(self, numbers: list[dict]) -> None:
        """Write into the coefficients of a recording what they are in this generation."""
        for plan, recorded in zip(self.plans, numbers, strict=True):
            for key, number in recorded.items():
                number.copy_(plan.weights(key), non_blocking=True)

    def given(self) -> list[Any]:
        """What its kernels read that neither its arguments nor the branch hold.

        A recording has to: Triton's launches are no ops of torch, which alone its recorder sees.
        """
        grids = [value for value in self.shared.values() if isinstance(value, Grid)]
        return [*(plan.progress for plan in self.plans), *grids]

    def rewind(self) -> None:
        """Forget that the blocks have run."""
        self.settled = False
        self.record.layers.clear()
        self.shared.clear()

    def bypassed(self, index: int, name: str) -> None:
        """Record that a layer was left out, and what it would have cost."""
        record = LayerRecord(name, StepKind.BYPASS.value, 0.0, 0.0)
        for op, flops, _ in self.branch.layers[index].ops:
            record.add(op, flops, 0.0)
        self.record.layers.append(record)

    def signals(self, place: Place | None = None) -> Signals:
        """What the schedule may look at now."""
        generation, branch, tick = self.generation, self.branch, self.tick
        return signals(generation, branch, tick, self.inputs, self.latents, place, self.entrance)


def signals(
    generation: Generation,
    branch: Branch,
    tick: Tick,
    inputs: Mapping[str, Any],
    latents: str,
    place: Place | None = None,
    entrance: Streams = (),
) -> Signals:
    """What the schedule may look at."""
    place = Place(()) if place is None else place
    known = any(each.error is not None for each in generation.branches.values())
    return Signals(
        step=tick.step,
        num_steps=tick.num_steps,
        computed=tuple(branch.groups[0].computed),
        inputs=inputs,
        streams=place.streams,
        memory=branch.memory,
        latents=_joined(inputs.get(latents)),
        main=place.main,
        entrance=entrance,
        modulated=place.modulated,
        error=generation.error if known else None,
    )


def kinds_now(
    generation: Generation, branch: Branch, tick: Tick, inputs: Mapping[str, Any], latents: str
) -> list[StepKind]:
    """What a call does in each group; an Update is due where a Dispatch would use what is too old.

    Args:
        generation: of the call.
        branch: of the call.
        tick: where it stands.
        inputs: arguments of the model, by name.
        latents: the one that the model's output changes.
    """
    kinds = generation.kinds(lambda: signals(generation, branch, tick, inputs, latents))
    for number, group in enumerate(branch.groups):
        if kinds[number] is StepKind.DISPATCH:
            due = generation.computed_before(number)
            missed = due is not None and (not group.computed or group.computed[-1] < due)
            if group.stored is None or missed:
                kinds[number] = StepKind.UPDATE
    return kinds


def plans_now(
    recipes: tuple[Recipe, ...],
    generation: Generation,
    branch: Branch,
    tick: Tick,
    kinds: list[StepKind],
    is_new: bool,
    shared: dict[str, Any],
) -> list[StepPlan]:
    """The plan of a call, of each group of layers.

    Args:
        recipes: that the groups follow.
        generation: of the call.
        branch: of the call.
        tick: where it stands.
        kinds: what it does in each group.
        is_new: whether the model is watched in it, and nothing recorded.
        shared: what all of them have.
    """
    plans = []
    for each in zip(recipes, generation.plans, kinds, branch.groups, strict=True):
        recipe, planned, kind, group = each
        at = (tick.step, tick.num_steps, tick.branch)
        plan = StepPlan.of(recipe, planned, kind, *at, marks=group.marks, **shared)
        plan.records = plan.records and not is_new
        group.spans.measure = plan.coefficients if recipe.schedule.measures else None
        plans.append(plan)
    return plans


def _joined(latents: Any) -> Tensor | None:
    """The latents as one tensor: some models take a list, an item of the batch each."""
    if isinstance(latents, (tuple, list)):
        return torch.cat([each.flatten() for each in latents])
    return latents


def overall(kinds: tuple[StepKind, ...]) -> StepKind:
    """What a step does, of what it does in each group: the one that does most names it."""
    return next(k for k in (StepKind.UPDATE, StepKind.FULL, StepKind.DISPATCH) if k in kinds)


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of what a model returned."""
    tensors: list[Tensor] = []
    take_apart(output, tensors)
    return tensors[0] if tensors else None
