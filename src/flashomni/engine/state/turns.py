"""Conditioning branches that ranks run at once: the first rank the condition, the next the other.

A pipeline calls its model once for each branch of a step, one call after the other, and combines
what they returned when it has all of it. So a call of a branch that another rank runs returns at
once, with tensors that are filled when the step's last call is done. Until then they hold NaN: a
pipeline that reads them too early gives no picture rather than a wrong one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashomni.engine.recipe import Recipe
from flashomni.engine.state.output import put_together, take_apart
from flashomni.parallel import Agreement, Ranks


class Turns:
    """Who runs which call of a generation.

    How many calls a step makes is known after the first step, which every rank runs whole.

    Args:
        ranks: which share the branches, the n-th call of a step to the n-th of them, and so on.
        name: how messages call the model.
        began: what all ranks must have been given alike, by name.
    """

    def __init__(self, ranks: Ranks, name: str, began: dict[str, Tensor]) -> None:
        self._ranks, self._name = ranks, name
        self._known: tuple[str, ...] = ()
        self._calls: list[str] = []
        self._outputs: dict[str, tuple[Any, list[Tensor]]] = {}
        ranks.restart()
        self._pending: Agreement | None = Agreement(ranks, began)

    def mine(self, branch: str, leads: bool) -> bool:
        """Whether this rank runs the call that is about to start.

        Args:
            branch: its name.
            leads: whether it is the step's first.

        Raises:
            ValueError: the ranks began with different arguments.
            RuntimeError: the step makes other calls than the generation's first step did.
        """
        self.settle()
        if leads:
            if self._known and tuple(self._calls) != self._known:
                self._refuse(self._calls)
            self._known, self._calls = self._known or tuple(self._calls), []
        self._calls.append(branch)
        if not self._known:
            return True
        if tuple(self._calls) != self._known[: len(self._calls)]:
            self._refuse(self._calls)
        return self._owner(branch) == self._ranks.rank

    def placeholder(self, branch: str) -> Any:
        """What a call returns that another rank runs, as its last output was made up."""
        shape, tensors = self._outputs[branch]
        empty = [x.new_full(x.shape, float("nan")) for x in tensors]
        return self.saw(branch, put_together(shape, iter(empty)))

    def saw(self, branch: str, output: Any) -> Any:
        """Keep what a call returned; behind the step's last one every rank gets all of them.

        Returns:
            What the call is to return.
        """
        tensors: list[Tensor] = []
        shape = take_apart(output, tensors)
        tensors = [x.contiguous() for x in tensors]
        self._outputs[branch] = shape, tensors
        if self._known and len(self._calls) == len(self._known):
            for name in self._known:
                for x in self._outputs[name][1]:
                    self._ranks.broadcast(x, self._owner(name))
        return put_together(shape, iter(tensors))

    def settle(self) -> None:
        """Ask what the ranks began with.

        Raises:
            ValueError: different things.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.check()

    @property
    def note(self) -> str:
        """What the report should say; empty for nothing."""
        if len(self._known) == 1:
            return "cfg: the model was called once a step, so nothing was shared out"
        return ""

    def free(self) -> None:
        """The generation is over."""
        self._outputs = {}

    def _owner(self, branch: str) -> int:
        return self._known.index(branch) % self._ranks.size

    def _refuse(self, calls: list[str]) -> None:
        raise RuntimeError(
            f"cfg: {self._name} was called for {', '.join(calls)} in one step and for "
            f"{', '.join(self._known)} in the first one, so a branch was left to a rank that never "
            "ran it: guidance that changes from step to step needs cfg=1"
        )


def why_no_turns(recipe: Recipe) -> list[str]:
    """What of a recipe does not work where ranks run different branches, in words."""
    found, schedule = [], recipe.schedule
    looks = schedule.decides or schedule.learns or schedule.measures or schedule.modulates
    if looks or recipe.plan(50) is None:
        found.append(
            f"schedule {schedule.name!r} decides by the step's first call, which one rank has only"
        )
    if recipe.guidance.acts:
        found.append("guidance makes one branch of the other")
    return found
