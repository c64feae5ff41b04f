"""One generation: its place in the schedule, and the state of each of its branches."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from flashomni.engine.clock import Position
from flashomni.engine.geometry import Geometry
from flashomni.engine.groups import Division
from flashomni.engine.noise import Noise
from flashomni.engine.schedules import Plan, StepKind
from flashomni.engine.state.branch import Branch
from flashomni.engine.state.guidance import Guidance
from flashomni.engine.state.room import Room
from flashomni.engine.state.turns import Turns
from flashomni.engine.trace import Trace

MAX_BRANCHES = 8  # conditioning branches of a generation: cond, uncond, perturbed, per prompt ...


@dataclass(frozen=True)
class Tick:
    """One call of the model in its generation.

    Args:
        step: index in this generation, from 0.
        num_steps: of this generation.
        branch: key of the conditioning branch.
        leads: whether it is the step's first call, which late decisions are made at.
    """

    step: int
    num_steps: int
    branch: str
    leads: bool = True


class Generation:
    """What belongs to one run of one caller.

    Args:
        position: of its first call.
        division: the layers, and what decides their steps and what a branch keeps of them.
        backend: of the passes over what is kept.

    Attributes:
        key: whose generation it is.
        branches: state by branch.
        trace: what its calls computed and skipped.
        plans: the kinds of its steps for each group of layers; ``None`` where the schedule does not
            know them before.
        first: step of its owner at which its own steps begin.
        inside: what the schedule decided inside this step, once it has.
        geometry: where its tokens lie, if anybody wants to know.
        room: where D is kept, if anything is carried.
        guidance: which calls of further branches are left out, if any are.
        turns: which of them other ranks run, if any do.
        number: of the generations on its model, from 1.
        noise: of its steps, if a forecast asks for it and the scheduler's are known.
    """

    geometry: Geometry | None = None
    room: Room | None = None
    turns: Turns | None = None
    number: int = 1

    def __init__(self, position: Position, division: Division, backend: str | None = None) -> None:
        self.key: Hashable = position.key
        self.branches: dict[str, Branch] = {}
        self.trace = Trace()
        self.plans: list[Plan | None] = [None] * len(division.recipes)
        self.inside: bool | None = None
        self.step, self.num_steps = -1, 0
        self._division, self._backend = division, backend
        rules = division.recipes[0].guidance
        self.guidance = Guidance(rules) if rules.acts else None
        self.first, self._timesteps = position.first, position.timesteps
        asks = any(recipe.forecast.looks_ahead for recipe in division.recipes)
        self.noise = Noise.of(position.scheduler) if asks else None
        self._begin = position.index
        self._index = position.index - 1
        self._calls: dict[str, int] = {}
        self._calling, self._led, self._begun = "", False, True
        self._late: tuple[int, StepKind] | None = None

    def arrange(self, division: Division) -> None:
        """Other layers, of which nothing is kept yet."""
        self._division = division
        self.plans = [recipe.plan(self.num_steps) for recipe in division.recipes]
        for branch in self.branches.values():
            branch.arrange(division)

    @property
    def finished(self) -> bool:
        """Whether its last step has begun."""
        return 0 < self.num_steps <= self.step + 1

    def continues(self, position: Position) -> bool:
        """Whether a call at ``position`` belongs to this run of its owner, or starts another.

        Another run has new timesteps, or goes back; where steps are announced, the first step
        comes but once for each branch. One whose first call has raised has not begun.
        """
        if not self._begun:
            return False
        if position.index < self._index or position.timesteps is not self._timesteps:
            return False
        name = position.branch or "call"
        again = position.announced and position.index == self._index and name in self._calls
        return not (again and position.index == self._begin)

    def advance(self, position: Position) -> Tick:
        """Count the call at ``position`` and name its branch.

        Raises:
            ValueError: more branches than a pipeline has: its steps are not seen; or a branch
                that was announced twice in a step.
        """
        if position.index != self._index:
            self._calls, self.inside, self._led = {}, None, False
            self.step += 1
        leads, self._led = not self._led, True
        if position.step is not None:
            self.step = position.step
        self._index = position.index
        num_steps = max(position.num_steps, self.step + 1)
        if num_steps != self.num_steps:
            self.num_steps = num_steps
            self.plans = [recipe.plan(num_steps) for recipe in self._division.recipes]
        name = self._calling = position.branch or "call"
        seen = self._calls[name] = self._calls.get(name, 0) + 1
        if position.announced and seen > 1:
            raise ValueError(
                f"step {self.step} was announced twice for branch {name!r} of one generation: give "
                "each conditioning branch a name, engine.step(i, num_steps, branch=...)"
            )
        branch = name if seen == 1 else f"{name}#{seen - 1}"
        if branch not in self.branches:
            self._refuse_runaway(branch)
            self.branches[branch] = Branch(self._division, self._backend)
        return Tick(self.step, num_steps, branch, leads)

    def take_back(self, tick: Tick) -> None:
        """The call of ``tick``, which :meth:`advance` gave last, has raised: it may come again."""
        self._calls[self._calling] -= 1
        if not self._calls[self._calling]:
            del self._calls[self._calling]
        if tick.leads:
            self._led, self._begun = False, self._index != self._begin

    def _refuse_runaway(self, branch: str) -> None:
        if len(self.branches) < MAX_BRANCHES:
            return
        raise ValueError(
            f"call {branch!r} would be branch {len(self.branches) + 1} of a generation that stands "
            f"at step {self.step} of {self.num_steps}: at most {MAX_BRANCHES} are kept. The "
            "pipeline's scheduler does not advance between the calls (it steps a copy, or the "
            "transformer is called outside of the loop): call engine.step(i, num_steps, branch) "
            "before each call of the transformer, or engine.remove()"
        )

    def kinds(self, signals: Any) -> list[StepKind]:
        """What this step does in each group: as planned, or as is decided at its first call.

        Args:
            signals: makes the :class:`Signals` of this call.
        """
        late = None in self.plans  # then there is but one group
        if late and (self._late is None or self._late[0] != self.step):
            schedule = self._division.recipes[0].schedule
            self._late = (self.step, schedule.kind(self.step, self.num_steps, signals()))
        decided = self._late[1] if late and self._late is not None else StepKind.UPDATE
        kinds = [decided if plan is None else plan.kinds[self.step] for plan in self.plans]
        if self.inside and kinds[0] is StepKind.DISPATCH:
            kinds[0] = StepKind.UPDATE  # the step's first call found out inside of it
        return kinds

    def leaves_out(self, tick: Tick) -> bool:
        """Whether this call follows from the step's first one, so that the model need not run."""
        rules = self.guidance
        return rules is not None and rules.leaves_out(tick.branch, tick.step, tick.num_steps)

    def ends_dense(self, tick: Tick) -> bool:
        """Whether this is the last step, known before, and nothing that is kept is used in it."""
        last = [None if plan is None else plan.kinds[-1] for plan in self.plans]
        is_dense = not any(recipe.sparse.in_computed for recipe in self._division.recipes)
        is_dense = is_dense and not {None, StepKind.DISPATCH} & set(last)
        return is_dense and tick.step == tick.num_steps - 1

    def computed_before(self, group: int) -> int | None:
        """The last step before this one that was to be computed, as far as it is known."""
        plan = self.plans[group]
        if plan is not None and not self._division.recipes[0].schedule.decides:
            planned = range(self.step - 1, -1, -1)
            return next((s for s in planned if plan.kinds[s] is not StepKind.DISPATCH), None)
        states = [branch.groups[group] for branch in self.branches.values()]
        steps = [step for state in states for step in state.computed if step < self.step]
        return max(steps, default=None)

    def error(self) -> float:
        """How far forecasts were off at the last Update, in the worst branch."""
        return max(b.error.read() for b in self.branches.values() if b.error is not None)

    def free(self) -> None:
        """Drop what the branches keep; the trace stays."""
        self.leave()
        for branch in self.branches.values():
            branch.end()
        for kept in (self.guidance, self.turns):
            if kept is not None:
                kept.free()

    def leave(self) -> None:
        """Nobody calls in it any more: others may have the recordings of its branches."""
        for branch in self.branches.values():
            branch.slot = None

    def nbytes(self) -> tuple[int, int]:
        """Bytes kept on the compute device and on the host."""
        sizes = [branch.nbytes() for branch in self.branches.values()]
        own = [] if self.guidance is None else self.guidance.tensors()
        device = sum(tensor.untyped_storage().nbytes() for tensor in own)
        return device + sum(size for size, _ in sizes), sum(host for _, host in sizes)
