"""Which steps to compute: exact dynamic programming, then descent on the whole cost.

The dynamic programme's cost is a sum over segments between computed steps: the errors of one
segment are nearly parallel and add up with their signs, so that a segment costs
``|sum_t g_t d_t e_t|^2``, as if every error went to the end with its gain. It depends on the last
anchors (DPCache, 2602.22654), which are the state; one run gives the best schedule of every number
of computed steps. What later segments see of earlier errors is no sum over segments: descent, from
the plans and from the ramp, counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flashomni.engine.forecasts import FORECASTS, Known
from flashomni.tuning.cost import Costs

Steps = tuple[int, ...]
REACH = 3  # how far a computed step moves at a time
DEPTH = 3  # anchors in the state of the programme


def segment_costs(costs: Costs, name: str, order: int) -> np.ndarray:
    """``[T+1, T+1, T, T+1]``: of the anchors a < b < c (T: there is none) and the next step.

    The forecast at steps between c and the next computed one uses the last ``order + 1`` of a, b
    and c; the next one may be the end, T. Infinite where the steps are not in order.

    Args:
        costs: of the model.
        name: of a forecast, or ``fitted``: the weights that forecast best, from the Gram matrix.
        order: 0 to 2.
    """
    num_steps = costs.num_steps
    none = num_steps
    found = np.full((none + 1, none + 1, num_steps, none + 1), np.inf)
    gram = even_gram(costs)
    scale = np.sqrt(1.0 + costs.across / costs.gains[0] ** 2) * costs.effects
    for a, b, c in _states(num_steps):
        anchors = tuple(x for x in (a, b, c) if x != none)[-(order + 1) :]
        steps = np.arange(c + 1, num_steps)
        errors = np.zeros((len(steps), num_steps))
        errors[np.arange(len(steps)), steps] = -1.0
        errors[:, anchors] += _weights(gram, anchors, steps, name, num_steps)
        sums = np.cumsum(scale[steps, None] * errors, axis=0)
        values = np.maximum(np.einsum("ks,st,kt->k", sums, gram, sums), 0.0)
        found[a, b, c, c + 1] = 0.0
        found[a, b, c, c + 2 :] = values
    return found


def _states(num_steps: int) -> Iterator[tuple[int, int, int]]:
    """The last three computed steps, ascending; one that there is not is ``num_steps``."""
    none = num_steps
    yield none, none, 0
    for c in range(1, num_steps):
        yield none, 0, c
        for b in range(1, c):
            for a in range(b):
                yield a, b, c


def even_gram(costs: Costs) -> np.ndarray:
    """One Gram matrix of all prompts, each over what reuse of the step before would cost."""
    weights = np.eye(costs.num_steps, k=-1)
    errors = weights[1:] - np.eye(costs.num_steps)[1:]
    sizes = np.einsum("ks,pst,kt->p", errors, costs.grams, errors)
    return (costs.grams / np.maximum(sizes, 1e-300)[:, None, None]).mean(0)


def _weights(
    gram: np.ndarray, anchors: Steps, steps: np.ndarray, name: str, num_steps: int
) -> np.ndarray:
    """``[steps, anchors]``."""
    if name != "fitted":
        known, rule = Known(num_steps), FORECASTS.get(name)
        return np.array([rule(anchors, int(step), known) for step in steps]).reshape(
            len(steps), len(anchors)
        )
    found = np.zeros((len(steps), len(anchors)))
    found[:, -1] = 1.0
    if len(anchors) > 1 and len(steps):
        to_last = np.zeros((len(anchors) - 1, num_steps))
        to_last[np.arange(len(anchors) - 1), list(anchors[:-1])] = 1.0
        to_last[:, anchors[-1]] -= 1.0
        wanted = np.eye(num_steps)[steps]
        wanted[:, anchors[-1]] -= 1.0
        normal = to_last @ gram @ to_last.T
        normal += 1e-3 * np.diag(normal.diagonal()) + 1e-300 * np.eye(len(normal))
        solved = np.linalg.solve(normal, to_last @ gram @ wanted.T).T
        found[:, :-1] = solved
        found[:, -1] -= solved.sum(1)
    return found


def best_schedules(segments: np.ndarray, largest: int | None = None) -> dict[int, Steps]:
    """The cheapest schedule of every number of computed steps, exactly.

    Args:
        segments: of :func:`segment_costs`.
        largest: number of computed steps to stop at; all if left out.

    Returns:
        Computed steps by their number. Step 0 is always one of them; the last is free.
    """
    num_steps = segments.shape[2]
    none = num_steps
    # value[a, b, c]: cheapest way to have computed so many steps, the last ones a, b and c.
    value = np.full((none + 1, none + 1, num_steps), np.inf)
    value[none, none, 0] = 0.0
    came_from: list[np.ndarray] = []
    found = {}
    for count in range(1, (largest or num_steps) + 1):
        total = value + segments[..., none]
        at = [int(place) for place in np.unravel_index(int(total.argmin()), total.shape)]
        found[count] = _trace(came_from, at)
        if count == num_steps:
            break
        ahead = value[..., None] + segments[..., :num_steps]  # [a, b, c, next]
        first = ahead.argmin(0)
        following = np.full_like(value, np.inf)
        following[:, :none] = np.take_along_axis(ahead, first[None], 0)[0]  # [b, c, next]
        came_from.append(first)
        value = following
    return found


def _trace(came_from: list[np.ndarray], state: Sequence[int]) -> Steps:
    """The computed steps that led to a state."""
    a, b, c = state
    steps = [c]
    for first in reversed(came_from):
        before = int(first[a, b, c])
        a, b, c = before, a, b
        steps.append(c)
    return tuple(sorted(steps))


def neighbours(steps: Steps, num_steps: int) -> list[Steps]:
    """Schedules with one computed step, not the first, moved by up to ``REACH``."""
    found = set()
    for place in range(1, len(steps)):
        for move in (*range(-REACH, 0), *range(1, REACH + 1)):
            to = steps[place] + move
            if 0 < to < num_steps and to not in steps:
                found.add(tuple(sorted((*steps[:place], to, *steps[place + 1 :]))))
    return sorted(found)


def descend(start: Steps, num_steps: int, cost: Callable[[Steps], float]) -> tuple[Steps, float]:
    """Go to the best neighbour as long as one is better."""
    best, value = start, cost(start)
    while True:
        options = [(cost(other), other) for other in neighbours(best, num_steps)]
        if not options or min(options)[0] >= value:
            return best, value
        value, best = min(options)
