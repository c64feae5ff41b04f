"""What a call of the model returns: computed, forecast from its outputs, or from another branch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flashomni.engine.call import Call
from flashomni.engine.recipe import Recipe
from flashomni.engine.schedules import StepKind


def model_output(
    call: Call, recipe: Recipe, layers: Sequence[str], name: str, compute: Callable[[], Any]
) -> Any:
    """The model's output, and what its caches and guidance keep of it.

    Args:
        call: that is under way.
        recipe: of the engine.
        layers: names of all blocks.
        name: of the model, for errors.
        compute: runs the model.

    Raises:
        NotImplementedError: it holds no tensor, and the recipe caches it.
    """
    guidance, tick, plan = call.generation.guidance, call.tick, call.plans[0]
    turns = call.generation.turns
    if turns is not None and call.elsewhere:
        return turns.placeholder(tick.branch)
    if call.left_out or (recipe.at_output and plan.kind is StepKind.DISPATCH):
        for index, layer in enumerate(layers):
            call.bypassed(index, layer)
        if call.left_out and guidance is not None:
            return guidance.derive(tick.branch, tick.step, tick.num_steps)
        kept = call.branch.output
        output = kept.predict(plan.coefficients(kept.times))
    else:
        output = compute()
        kept = call.branch.output  # now: an Update may have dropped what was kept before
        measure = plan.coefficients if recipe.schedule.measures else None
        if recipe.at_output and plan.stores and not kept.record(output, plan.step, measure):
            raise NotImplementedError(
                f"forecast.level 'output': {name} returned "
                f"{type(output).__name__}, which holds no tensor; use level 'layers'"
            )
    if guidance is not None:
        guidance.saw(tick.branch, tick.step, tick.leads, call.live_share() > 0.5, output)
    return output if turns is None else turns.saw(tick.branch, output)
