"""What a generation did not gain, in words: once in the log as it ends, and in its report."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flashomni.engine.schedules import StepKind

if TYPE_CHECKING:
    from flashomni.engine.recipe import Recipe
    from flashomni.engine.trace import StepRecord

log = logging.getLogger("flashomni")
LITTLE = 0.9  # of the blocks' FLOPs executed in Dispatch steps: who skips less has set it wrongly
SHOWN = 2  # reasons that the log names; the report has them all, layer by layer


class Gains:
    """Warns of a generation that gained nothing, or less than it could; each thing once.

    Args:
        model: its name, for the log.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._said: set[str] = set()

    def look(self, steps: Sequence[StepRecord], recipe: Recipe) -> None:
        """Told of a generation that is over; nothing of it waits for the device.

        Args:
            steps: its calls of the model.
            recipe: that they followed.
        """
        for text in (nothing(steps, recipe), dense_layers(steps)):
            if text is not None and text not in self._said:
                self._said.add(text)
                log.warning("%s: %s", self._model, text)


def nothing(steps: Sequence[StepRecord], recipe: Recipe) -> str | None:
    """Why nothing was skipped, if nothing was although the recipe would skip."""
    numbers = {record.step for record in steps}
    if not numbers or any(_dispatches(record) for record in steps):
        return None
    num_steps = max(record.num_steps for record in steps)
    if len(numbers) < num_steps or not recipe.skips:
        return None
    if recipe.sparse.in_computed and num_steps > recipe.sparse.dense_steps:
        if recipe.sparse.symbols or any("chooses" in record.does for record in steps):
            return None
        at = recipe.sparse.choose_at
        when = "no step was an Update" if at == "update" else "none of these steps was run"
        return (
            f"key blocks were never chosen, so all were visited: choose_at is {at!r}, and "
            f"{when} (choose_at='computed' chooses in every computed step)"
        )
    least = getattr(recipe.schedule, "min_steps", 0)
    hint = f" (this recipe skips from {least} steps on)" if num_steps < least else ""
    return f"0 Dispatch steps: nothing to gain at {num_steps} steps{hint}"


def _dispatches(record: StepRecord) -> bool:
    """Whether a step skips, in all layers or in a group of them."""
    kinds = {record.kind, *(layer.kind for layer in record.layers)}
    return not kinds.isdisjoint({StepKind.DISPATCH.value, StepKind.BYPASS.value})


def dense_layers(steps: Iterable[StepRecord]) -> str | None:
    """How many layers did not skip what the recipe would skip in them, and why."""
    reasons: dict[str, set[str]] = {}
    for record in steps:
        for layer in record.layers:
            for note in layer.notes():
                reasons.setdefault(note, set()).add(layer.name)
    if not reasons:
        return None
    counts = Counter({note: len(names) for note, names in reasons.items()}).most_common(SHOWN)
    more = f"; {len(reasons) - SHOWN} more in the report" if len(reasons) > SHOWN else ""
    return "; ".join(f"in {count} layers, {note}" for note, count in counts) + more


def little(steps: Iterable[Mapping[str, Any]], recipe: Recipe) -> str | None:
    """A note where Dispatch steps skip next to nothing.

    Args:
        steps: of a summary: what was executed is read back from the device by then.
        recipe: that ran.
    """
    dispatches = [step["executed"] for step in steps if step["kind"] == StepKind.DISPATCH.value]
    shares = [share for executed in dispatches for share in executed]
    if not shares or not recipe.skips or statistics.fmean(shares) < LITTLE:
        return None
    return (
        f"Dispatch steps executed {statistics.fmean(shares):.0%} of the blocks' FLOPs: with these "
        "settings next to nothing is skipped at this size"
    )
