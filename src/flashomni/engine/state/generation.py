"""One generation: its place in the schedule, and the state of each of its branches."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from flashomni.engine.clock import Position
from flashomni.engine.geometry import Geometry
from flashomni.engine.recipe import Recipe
from flashomni.engine.schedules import Plan, StepKind
from flashomni.engine.state.branch import Branch
from flashomni.engine.trace import Trace

MAX_BRANCHES = 8  # conditioning branches of a generation: cond, uncond, perturbed, per prompt ...


@dataclass(frozen=True)
class Tick:
    """One call of the model in its generation.

    Args:
        step: index in this generation, from 0.
        num_steps: of this generation.
        branch: key of the conditioning branch.
    """

    step: int
    num_steps: int
    branch: str


class Generation:
    """What belongs to one run of one caller.

    Args:
        position: of its first call.
        num_layers: of the model.
        recipe: decides how many steps are planned and what a branch keeps.
        backend: of the passes over what is kept.

    Attributes:
        key: whose generation it is.
        branches: state by branch.
        trace: what its calls computed and skipped.
        plan: the kinds of its steps, where the schedule knows them before.
        geometry: where its tokens lie, if anybody wants to know.
    """

    geometry: Geometry | None = None

    def __init__(
        self, position: Position, num_layers: int, recipe: Recipe, backend: str | None = None
    ) -> None:
        self.key: Hashable = position.key
        self.branches: dict[str, Branch] = {}
        self.trace = Trace()
        self.plan: Plan | None = None
        self.step, self.num_steps = -1, 0
        self._num_layers, self._recipe, self._backend = num_layers, recipe, backend
        self._first, self._timesteps = position.index, position.timesteps
        self._index = position.index - 1
        self._calls: dict[str, int] = {}
        self._late: tuple[int, StepKind] | None = None

    @property
    def finished(self) -> bool:
        """Whether its last step has begun."""
        return 0 < self.num_steps <= self.step + 1

    def continues(self, position: Position) -> bool:
        """Whether a call at ``position`` belongs to this run of its owner, or starts another.

        Another run has new timesteps, or goes back; where steps are announced, the first step
        comes but once for each branch.
        """
        if position.index < self._index or position.timesteps is not self._timesteps:
            return False
        name = position.branch or "call"
        again = position.announced and position.index == self._index and name in self._calls
        return not (again and position.index == self._first)

    def advance(self, position: Position) -> Tick:
        """Count the call at ``position`` and name its branch.

        Raises:
            ValueError: more branches than a pipeline has: its steps are not seen; or a branch
                that was announced twice in a step.
        """
        if position.index != self._index:
            self._calls = {}
            self.step += 1
        if position.step is not None:
            self.step = position.step
        self._index = position.index
        num_steps = max(position.num_steps, self.step + 1)
        if num_steps != self.num_steps:
            self.num_steps = num_steps
            self.plan = self._recipe.plan(num_steps)
        name = position.branch or "call"
        seen = self._calls[name] = self._calls.get(name, 0) + 1
        if position.announced and seen > 1:
            raise ValueError(
                f"step {self.step} was announced twice for branch {name!r} of one generation: give "
                "each conditioning branch a name, engine.step(i, num_steps, branch=...)"
            )
        branch = name if seen == 1 else f"{name}#{seen - 1}"
        if branch not in self.branches:
            self._refuse_runaway(branch)
            self.branches[branch] = Branch(self._num_layers, self._recipe, self._backend)
        return Tick(self.step, num_steps, branch)

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

    def kind(self, signals: Any) -> StepKind:
        """What this step does: as planned, or as the schedule decides at its first call.

        Args:
            signals: makes the :class:`Signals` of this call.
        """
        if self.plan is not None:
            return self.plan.kinds[self.step]
        if self._late is None or self._late[0] != self.step:
            decided = self._recipe.schedule.kind(self.step, self.num_steps, signals())
            self._late = (self.step, decided)
        return self._late[1]

    def computed_before(self) -> int | None:
        """The last step before this one that was to be computed, as far as it is known."""
        if self.plan is not None:
            planned = range(self.step - 1, -1, -1)
            kinds = self.plan.kinds
            return next((s for s in planned if kinds[s] is not StepKind.DISPATCH), None)
        steps = (branch.computed[-1] for branch in self.branches.values() if branch.computed)
        return max((step for step in steps if step < self.step), default=None)

    def free(self) -> None:
        """Drop what the branches keep; the trace stays."""
        for branch in self.branches.values():
            branch.reset()

    def nbytes(self) -> tuple[int, int]:
        """Bytes kept on the compute device and on the host."""
        sizes = [branch.nbytes() for branch in self.branches.values()]
        return sum(device for device, _ in sizes), sum(host for _, host in sizes)
