"""What runs behind an engine: it places each call of the model and hands each block its run.

Hooks and adapters talk to it; users have :class:`flashomni.Engine`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from flashomni.engine.arguments import by_name
from flashomni.engine.block import run_block
from flashomni.engine.call import (
    Call,
    Place,
    first_tensor,
    kinds_now,
    overall,
    plans_now,
)
from flashomni.engine.callers import branches
from flashomni.engine.clock import Clock, Position
from flashomni.engine.gains import Gains
from flashomni.engine.generations import MAX_GENERATIONS, Generations
from flashomni.engine.geometry import Asked
from flashomni.engine.graphs import Graphs
from flashomni.engine.grids import Grids
from flashomni.engine.groups import Division
from flashomni.engine.layer import LayerRun
from flashomni.engine.learner import Learner
from flashomni.engine.memory import Budget
from flashomni.engine.model_output import model_output
from flashomni.engine.one_call import OneCall
from flashomni.engine.recipe import Recipe
from flashomni.engine.recordable import why_none, why_not_spread
from flashomni.engine.redone import Redone
from flashomni.engine.schedules import StepKind
from flashomni.engine.sharding import Sharding, agreed_on
from flashomni.engine.state.branch import signature
from flashomni.engine.state.generation import Generation
from flashomni.engine.state.room import Keeping, Room
from flashomni.engine.state.span import Streams
from flashomni.engine.state.turns import Turns
from flashomni.engine.symbols_file import SymbolsFile
from flashomni.engine.trace import LayerRecord, Trace
from flashomni.engine.unserved import Unserved
from flashomni.parallel import Ranks

log = logging.getLogger("flashomni")


class Runtime:
    """State of one accelerated model.

    One call at a time: calls of two threads may alternate, and an overlapping one is refused.

    Args:
        model: the transformer.
        recipe: what to compute and what to cache.
        layers: names of the blocks, in order.
        clock: finds the position of each call.
        backend: take exactly this backend in every op; by default the best that accepts.
        check: raises where the model is not, or no longer, in a state that can be accelerated.

    Attributes:
        tier: how much of the model is known: ``generic``, ``declared`` or ``adapter``.
        learner: watches the first calls of a model that has no adapter.
        geometry: asks the adapter where the tokens of a generation lie.
        graphs: records calls and replays them, if it is told to.
        sharding: whether the sequence is spread over ranks.
        budget: chooses the recipe by what memory is free, if the user wants that.
        cfg: ranks that share the conditioning branches.
        noted: what else the report of the last generation should say.
    """

    tier: str = "adapter"
    learner: Learner | None = None
    geometry: Asked | None = None
    budget: Budget | None = None
    sharding: Sharding
    cfg: Ranks | None = None
    noted: Callable[[], list[str]] = list

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        layers: list[str],
        clock: Clock,
        backend: str | None,
        check: Callable[[], None],
        latents: str = "hidden_states",
    ) -> None:
        self.model, self.recipe, self.clock, self.backend = model, recipe, clock, backend
        self.layers, self._check, self._latents = layers, check, latents
        self.division, self.graphs = Division.make(recipe, layers), Graphs(False, model)
        self.redone, self.grids = Redone(len(layers)), Grids()
        self.unserved = Unserved(type(model).__name__, backend)
        self.gains = Gains(type(model).__name__)
        self.generations = Generations()
        self.last: Generation | None = None
        self._call: Call | None = None
        self._one = OneCall(type(model).__name__)
        self._keeping = Keeping(recipe.storage, backend)
        path = recipe.sparse.symbols
        self.symbols = SymbolsFile.load(path, layers) if path else None
        self._warned: set[str] = set()

    @property
    def running(self) -> bool:
        """Whether a call of the model is under way in this thread."""
        return self._call is not None and self._one.mine

    @property
    def trace(self) -> Trace:
        """Of the generation that called last."""
        return Trace() if self.last is None else self.last.trace

    def all_ranks(self) -> list[Ranks]:
        """Those that share the sequence, and those that share the branches."""
        return [ranks for ranks in (self.sharding.ranks, self.cfg) if ranks is not None]

    def reset(self) -> None:
        """Drop all caches; the next call of the model starts a generation."""
        self._end_left()
        self.generations.restart(None if self._call is None else self._call.generation)
        self.clock.forget()
        self.graphs.clear()
        self.redone.reset()
        if self.budget is not None:
            self.budget.reset()

    def begin(self, context: Any, device: torch.device, args: tuple, kwargs: dict) -> None:
        """A call of the model starts.

        Args:
            context: diffusers' cache context, its name, or ``None``.
            device: where the model computes.
            args: of the call, like ``kwargs``.

        Raises:
            ValueError: gradients are on, nothing tells the step, or there are too many branches.
            NotImplementedError: the model was changed into something that is not supported.
            RuntimeError: another call is under way.
        """
        if torch.is_grad_enabled():
            raise ValueError("an accelerated model is for inference: call it under torch.no_grad()")
        self._end_left()
        self._one.enter()
        try:
            self._call = self._place(context, device, args, kwargs)
        except BaseException:
            self._leave()
            raise
        if self._call is None:
            self._leave()

    def _leave(self) -> None:
        self._call = None
        self._one.leave()

    def _place(self, context: Any, device: torch.device, args: tuple, kwargs: dict) -> Call | None:
        position = self.clock.locate(context)
        if position is None:
            self._warn(
                "outside",
                "%s was called outside of any denoising loop: such calls run dense, one by one; "
                "call engine.step(i, num_steps) before each to accelerate them",
                type(self.model).__name__,
            )
            return None
        generation = self.generations.at(position)
        if generation is None:
            self._check()
            if self.budget is not None:
                self._keep_to(self.budget, context, device, by_name(self.model, args, kwargs))
            self.unserved.look(device)
            generation = self._start(position)
            generation.room = Room(self._keeping, type(self.model).__name__)
            generation.geometry = self.geometry(device, args, kwargs) if self.geometry else None
            ranks = self.sharding.ranks
            refused = why_not_spread(self.graphs.mode, ranks, self.cfg, device)
            refused = refused or why_none(self.recipe, self.learner)
            self.graphs.start(device, refused, ranks)
            if self.cfg is not None:
                began = agreed_on(by_name(self.model, args, kwargs), (self._latents,))
                generation.turns = Turns(self.cfg, type(self.model).__name__, began)
        tick = generation.advance(position)
        self.last = generation
        branch = generation.branches[tick.branch]
        inputs = by_name(self.model, args, kwargs)
        shard = self.sharding.of(inputs)
        sort, is_new = (None, False) if self.learner is None else self.learner.begin(args, kwargs)
        branch.expect("call", (sort, *map(signature, (*args, *kwargs.values()))))
        turns = generation.turns
        elsewhere = turns is not None and not turns.mine(tick.branch, tick.leads)
        if elsewhere:
            branch.reset()
        left_out = elsewhere or (not is_new and generation.leaves_out(tick))
        if not left_out and generation.ends_dense(tick):
            branch.reset()  # its memory can go before it peaks
        kinds = [StepKind.DISPATCH if left_out else StepKind.FULL] * len(branch.groups)
        if not is_new and not left_out:
            kinds = kinds_now(generation, branch, tick, inputs, self._latents)
        kind = "elsewhere" if elsewhere else overall(tuple(kinds)).value
        place = tick.step + generation.first, tick.num_steps, kind
        record = generation.trace.begin(*place, tick.branch, device)
        shared: dict[str, Any] = {"num_layers": len(self.layers), "redone": self.redone.on(device)}
        shared |= {"storage": self._keeping.on(device), "backend": self.backend, "device": device}
        shared |= {"geometry": generation.geometry, "grids": self.grids.on(device), "shard": shard}
        shared |= {"inputs": inputs, "room": generation.room, "symbols": self.symbols}
        shared |= {"noise": generation.noise}
        plans = plans_now(self.division.recipes, generation, branch, tick, kinds, is_new, shared)
        branch.prefetch(0, plans[self.division.of[0]].stores)
        call = Call(generation, branch, tick, plans, record, inputs, self._latents, left_out)
        call.elsewhere = elsewhere
        return call

    def _keep_to(
        self, budget: Budget, context: Any, device: torch.device, inputs: Mapping[str, Any]
    ) -> None:
        """Take the recipe that fits the memory; what is kept by another one goes."""
        recipe = budget.choose(device, inputs, branches(self.model, context))
        if recipe == self.recipe:
            return
        self.recipe, self._keeping = recipe, Keeping(recipe.storage, self.backend)
        self.generations.clear()
        self.graphs.clear()
        if self.learner is not None:
            self.learner.forget()
        else:
            self.arrange(self.layers)

    def _start(self, position: Position) -> Generation:
        """A generation begins."""
        generation = Generation(position, self.division, self.backend)
        if self.generations.add(generation):
            self._warn(
                "generations",
                "more than %d generations are under way on one transformer: the oldest lost its "
                "caches, and computes its next step",
                MAX_GENERATIONS,
            )
        return generation

    def end(self, output: Any = None) -> None:
        """A call of the model is over.

        Args:
            output: what it returned.
        """
        if not self.running:
            return
        call = self.call
        branch, generation = call.branch, call.generation
        call.settle()
        for plan, group in zip(call.plans, branch.groups, strict=False):  # arranged since, maybe
            if plan.kind is not StepKind.DISPATCH and call.record.layers:
                group.computed.append(plan.step)
        miss = branch.measured()
        branch.send()
        schedule = self.recipe.schedule
        if schedule.learns and call.tick.leads and StepKind.DISPATCH not in call.kinds:
            tensor = first_tensor(output)
            if tensor is not None:
                schedule.learn(tensor, call.signals())
        generation.trace.ended(call.record, miss, *generation.nbytes())
        is_last = call.tick.step == call.tick.num_steps - 1
        if is_last:
            branch.end()
            self.sharding.settle()
            if generation.turns is not None:
                generation.turns.settle()
        self._stop()
        if is_last:
            self.gains.look(generation.trace.steps, self.recipe)
        if is_last and log.isEnabledFor(logging.INFO):
            log.info("%s: %s", type(self.model).__name__, generation.trace.in_short())

    def abort(self) -> None:
        """A call of the model has raised, if one is under way here: its branch starts afresh.

        The call did not happen: it is no step of the report, and may be made again.
        """
        if self.running:
            call = self.call
            call.branch.reset()
            for group in call.branch.groups:
                group.computed.clear()
            call.generation.take_back(call.tick)
            call.generation.trace.drop(call.record)
            self._stop()

    def _end_left(self) -> None:
        """A call that was interrupted, and that no hook was told the end of, is over."""
        if self._one.take_over():
            self.abort()
            self._leave()

    def _stop(self) -> None:
        if self._call is not None:
            self._call.record.watch.stop()
        self._keeping.flush()
        self._leave()

    def done(self, pipe: Any) -> None:
        """A pipeline says that it is done: free what its generation keeps.

        Args:
            pipe: the pipeline, or ``None`` where it is not known; then all that have ended.
        """
        if not self.running:
            self.generations.done(pipe)

    def block(
        self,
        index: int,
        place: Place,
        compute: Callable[[LayerRun], Streams],
        chain: bool = True,
    ) -> Streams:
        """Run block ``index``, or replay it where it is cached whole.

        Args:
            index: position in the list of layers.
            place: what the block gets.
            compute: runs the block with its run; gives the streams behind it.
            chain: whether the block may share a span with its neighbours.
        """
        return run_block(self.call, self.recipe.schedule, self.layers, index, place, compute, chain)

    def arrange(self, layers: list[str]) -> None:
        """The layers of a model that was just watched: nothing is kept of them yet."""
        self.layers, self.division = layers, Division.make(self.recipe, layers)
        self.generations.arrange(self.division)

    def as_it_is(self, name: str) -> LayerRecord:
        """Where the FLOPs of a block go that runs as it is in this call, its output not kept."""
        record = LayerRecord(name, StepKind.FULL.value)
        self.call.record.layers.append(record)
        return record

    def forward(self, args: tuple, kwargs: dict, model: Callable[..., Any]) -> Any:
        """``model(*args, **kwargs)``, as a graph or not, where a call of it is under way."""
        if not self.running:
            return model(*args, **kwargs)

        def compute(*args: Any, **kwargs: Any) -> Any:
            output = self.output(lambda: model(*args, **kwargs))
            self.call.settle()
            return output

        try:
            with self._one.inside():
                return self.graphs.run(self.call, args, kwargs, compute)
        except Exception:
            raise  # torch tells the hook that always runs
        except BaseException:  # Ctrl-C, of which it tells none
            self.abort()
            raise

    def output(self, compute: Callable[[], Any]) -> Any:
        """The model's output; forecast or derived where the recipe says so.

        Args:
            compute: runs the model.

        Raises:
            NotImplementedError: it holds no tensor.
        """
        if not self.running:
            return compute()
        name = type(self.model).__name__
        return model_output(self.call, self.recipe, self.layers, name, compute)

    def _warn(self, key: str, message: str, *values: object) -> None:
        """Log a warning once."""
        if key not in self._warned:
            self._warned.add(key)
            log.warning(message, *values)

    @property
    def call(self) -> Call:
        """The call that is under way."""
        assert self._call is not None, "no call is under way"
        return self._call
