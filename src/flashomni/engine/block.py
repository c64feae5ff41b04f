"""One block in a call of the model: run with its run, or replayed where it is cached whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from flashomni.engine.call import Call, Place
from flashomni.engine.layer import LayerRun
from flashomni.engine.schedules import Schedule, StepKind
from flashomni.engine.state.span import Streams
from flashomni.engine.trace import LayerRecord


def run_block(
    call: Call,
    schedule: Schedule,
    layers: Sequence[str],
    index: int,
    place: Place,
    compute: Callable[[LayerRun], Streams],
    chain: bool = True,
) -> Streams:
    """The streams behind block ``index``.

    Args:
        call: that is under way.
        schedule: of the recipe, which may look inside the step.
        layers: names of all blocks.
        index: position in ``layers``.
        place: what the block gets.
        compute: runs the block with its run; gives the streams behind it.
        chain: whether the block may share a span with its neighbours.
    """
    branch, streams = call.branch, place.streams
    of = branch.division.of
    plan, group = call.plans[of[index]], branch.group_of(index)
    if branch.expect(index, tuple((x.shape, x.dtype, x.device) for x in streams)):
        call.update_instead()
    inner = schedule.front <= index < len(layers) - schedule.back and not plan.recipe.at_output
    if schedule.decides and index <= schedule.front:
        _look_inside(call, schedule, index, place)
    for other in branch.groups:
        if other is not group:
            other.spans.close(plan.step)
    if plan.kind is StepKind.DISPATCH and inner:
        times = group.spans.times(index)
        if times:
            behind = group.spans.replay(index, streams, plan.coefficients(times))
            if behind is not None:
                call.bypassed(index, layers[index])
                return behind
    if index + 1 < len(layers):
        branch.prefetch(index + 1, call.plans[of[index + 1]].stores)
    record = LayerRecord(layers[index], plan.kind.value)
    run = LayerRun(index, branch.layers[index], plan, record, call.shared, cacheable=inner)
    _bring_carry(call, index)
    run.ahead = partial(_bring_carry, call, index + 1)
    behind = compute(run)
    call.record.layers.append(record)
    if plan.stores:
        if inner and branch.layers[index].degraded:
            behind = group.spans.record(index, streams, behind, plan.step, chain=chain)
        else:
            group.spans.close(plan.step)
    return behind


def _bring_carry(call: Call, index: int) -> None:
    """Start the way of D back from the host, to a block that runs.

    Earlier than that it would only take memory: what lies on the host of the block before must be
    used up, and a copy takes no longer than what is computed from there to where D is added.
    """
    of = call.branch.division.of
    if index >= len(of):
        return
    plan, group = call.plans[of[index]], call.branch.group_of(index)
    sparse = plan.sparse
    if not sparse.carries or sparse.chooses:  # D of other columns is dropped
        return
    is_replayed = plan.kind is StepKind.DISPATCH and bool(group.spans.times(index))
    if not is_replayed:
        call.branch.prefetch_carry(index, sparse.refreshes)


def _look_inside(call: Call, schedule: Schedule, index: int, place: Place) -> None:
    """A schedule that decides inside a step sees its first blocks; once a step it decides."""
    if index == 0:
        call.entrance = place.streams
    if index < schedule.front or call.decided or not call.tick.leads:
        return
    call.decided, signals = True, call.signals(place)
    call.entrance = ()
    if call.plans[0].kind is not StepKind.DISPATCH:
        schedule.watch(index, signals)
        return
    call.generation.inside = bool(schedule.decide(index, signals))
    if call.generation.inside:
        call.update_instead()
