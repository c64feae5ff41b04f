"""The further branches of a step, where the recipe leaves them out: true CFG's unconditional call.

What guidance adds, the difference of the two branches, changes slower than either of them.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from flashomni.engine.recipe_parts import GuidanceSettings
from flashomni.engine.state.output import put_together, take_apart


class Guidance:
    """What a generation keeps of its branches' outputs, and which calls it leaves out.

    The first branch that calls leads: the others are its output less a difference.

    Args:
        rules: of the recipe.
    """

    def __init__(self, rules: GuidanceSettings) -> None:
        self._rules = rules
        self._leader = ""
        self._shape: Any = None
        self._first: list[Tensor] = []
        self._deltas: dict[str, list[Tensor]] = {}
        self._led: list[int] = []  # steps in which the leader ran
        self._ran: dict[str, int] = {}  # the last of each branch

    def leaves_out(self, name: str, step: int, num_steps: int) -> bool:
        """Whether this call of branch ``name`` need not run.

        Raises:
            NotImplementedError: the branch without the condition leads.
        """
        if name == self._leader or name not in self._deltas:
            return False
        if self._leader.startswith(("uncond", "neg", "pred_uncond")):
            raise NotImplementedError(
                f"guidance: this pipeline calls branch {self._leader!r} before {name!r}, so what "
                "could be left out is the condition; recipes with guidance need the other order"
            )
        if step >= math.ceil(self._rules.stop_after * num_steps):
            return True
        if self._rules.delta_every == 1 or step < self._rules.delta_after * num_steps:
            return False
        behind = sum(ran > self._ran[name] for ran in self._led)
        # In a step that is forecast, a branch that kept up has a forecast of its own.
        return behind > 0 and (self._led[-1] != step or behind < self._rules.delta_every)

    def saw(self, name: str, step: int, leads: bool, ran: bool, output: Any) -> None:
        """What a call returned that was not left out.

        Args:
            name: of the branch.
            step: of the call.
            leads: whether it is the step's first.
            ran: whether most of its blocks ran, or were forecast.
            output: of the model.
        """
        tensors: list[Tensor] = []
        shape = take_apart(output, tensors)
        if leads:
            self._leader, self._shape, self._first = name, shape, tensors
            self._led += [step] if ran else []
        elif [x.shape for x in tensors] == [x.shape for x in self._first]:
            self._deltas[name] = [a - b for a, b in zip(self._first, tensors, strict=True)]
        if ran:
            self._ran[name] = step

    def derive(self, name: str, step: int, num_steps: int) -> Any:
        """What a call that is left out returns."""
        if step >= math.ceil(self._rules.stop_after * num_steps):
            return put_together(self._shape, (x.clone() for x in self._first))
        pairs = zip(self._first, self._deltas[name], strict=True)
        return put_together(self._shape, (x - delta for x, delta in pairs))

    def tensors(self) -> list[Tensor]:
        """Everything that is kept, for accounting."""
        return [*self._first, *(x for delta in self._deltas.values() for x in delta)]

    def free(self) -> None:
        """The generation is over."""
        self._first, self._deltas = [], {}
