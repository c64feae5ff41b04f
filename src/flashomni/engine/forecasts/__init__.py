"""Forecasts: how values of the past combine into a value now. One file each.

A forecast is a function ``weights(times, t, known=None) -> list of floats``: the weights of the
values at the anchors ``times`` (steps, oldest first, at most order + 1 of them), at step ``t``
behind the last; ``known`` says what else may matter. Caches keep, instead of the values, f_i = i!
times the divided difference over the newest i + 1 anchors; the weights of these follow here, on the
host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flashomni.registry import Registry

Weights = Callable[..., list[float]]

FORECASTS: Registry[Weights] = Registry("forecast", __name__, "flashomni.forecasts")


_AHEAD: set[str] = set()  # forecasts that look ahead

Entry = tuple[tuple[int, ...], int, tuple[float, ...]]


@dataclass(frozen=True)
class Fitted:
    """Weights that a calibration found; JSON values, kept in a recipe.

    Args:
        num_steps: of the generations that they were fitted on; others use ``base``.
        weights: ``[anchors, step, weights]`` for each pair of anchors (oldest first) and step.
        base: the forecast of pairs that are not listed.

    Raises:
        ValueError: an entry is not of this form, or comes twice.
    """

    num_steps: int
    weights: tuple[Entry, ...] = ()
    base: str = "hermite"

    def __post_init__(self) -> None:
        if not _is_int(self.num_steps) or self.num_steps < 1:
            raise ValueError(f"fitted.num_steps must be at least 1, got {self.num_steps!r}")
        if not isinstance(self.base, str) or self.base == "fitted" or self.base not in FORECASTS:
            others = ", ".join(name for name in FORECASTS if name != "fitted")
            raise ValueError(f"fitted.base must be one of {others}, got {self.base!r}")
        if not isinstance(self.weights, (list, tuple)):
            raise ValueError(f"fitted.weights must be a list of entries, got {self.weights!r}")
        entries = tuple(_entry(entry, self.num_steps) for entry in self.weights)
        if len({entry[:2] for entry in entries}) != len(entries):
            raise ValueError("fitted.weights must list each pair of anchors and step once")
        object.__setattr__(self, "weights", entries)


def _entry(entry: Any, num_steps: int) -> Entry:
    """``[anchors, step, weights]`` checked, as tuples."""
    parts = tuple(entry) if isinstance(entry, (list, tuple)) else ()
    good = len(parts) == 3 and all(isinstance(parts[i], (list, tuple)) for i in (0, 2))
    if good:
        times, step, found = parts
        ordered = all(map(_is_int, (*times, step))) and list(times) == sorted(set(times))
        good = bool(times) and ordered and times[0] >= 0 and times[-1] < step < num_steps
        good = good and len(found) == len(times) and all(_is_finite(weight) for weight in found)
    if not good:
        raise ValueError(
            "fitted.weights must be entries [anchors, step, weights], anchors ascending before the "
            f"step, the step below {num_steps}, one finite weight an anchor; got {entry!r}"
        )
    return tuple(times), step, tuple(float(weight) for weight in found)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Known:
    """What a forecast may use beside the anchors' times.

    Args:
        num_steps: of the generation.
        fitted: the weights that the recipe brings, if it does.
        order: of what is cached whole: ``order + 1`` anchors, where there are so many.
        computed: steps that are computed, all of them, where the schedule knows them before.
        sigmas: noise level of each step, and the one behind the last, where the scheduler is one
            whose steps are known (:mod:`flashomni.engine.noise`).

    The last three are there for forecasts that ask for them.
    """

    num_steps: int
    fitted: Fitted | None = None
    order: int = 0
    computed: tuple[int, ...] = ()
    sigmas: tuple[float, ...] = ()


def forecast(name: str, *, looks_ahead: bool = False) -> Callable[[Weights], Weights]:
    """Register a function as the forecast ``name``.

    Args:
        name: what recipes call it.
        looks_ahead: whether it asks for ``computed`` and ``sigmas`` of what is known.
    """

    def keep(function: Weights) -> Weights:
        FORECASTS.add(name, function)
        (_AHEAD.add if looks_ahead else _AHEAD.discard)(name)
        difference_weights.cache_clear()  # it may replace an older definition of its own
        return function

    return keep


def forecasts() -> dict[str, Weights]:
    """Every forecast by name."""
    return FORECASTS.all()


def looks_ahead(name: str) -> bool:
    """Whether the forecast ``name`` asks for the steps that will be computed, and their noise."""
    FORECASTS.get(name)  # it may not have been loaded yet
    return name in _AHEAD


def to_differences(times: Sequence[int], weights: Sequence[float]) -> list[float]:
    """Weights of f_0, f_1, ... that give what ``weights`` give of the values.

    By Newton's form a value at an anchor is v(t_j) = sum_i f_i / i! prod_{l < i} (t_j - t_{k-l}),
    k the newest anchor.
    """
    newest = list(reversed(times))
    behind = list(reversed(weights))
    result = []
    for i in range(len(newest)):
        total = 0.0
        for t, weight in zip(newest, behind, strict=True):
            total += weight * math.prod(t - anchor for anchor in newest[:i])
        result.append(total / math.factorial(i))
    return result


def from_differences(times: Sequence[int], coefficients: Sequence[float]) -> list[float]:
    """Weights of the values that give what ``coefficients`` give of f_0, f_1, ...

    f_i = i! sum_{j <= i} v(t_{k-j}) / prod_{m <= i, m != j} (t_{k-j} - t_{k-m}).
    """
    newest = list(reversed(times))
    result = [0.0] * len(newest)
    for i, coefficient in enumerate(coefficients[: len(newest)]):
        for j in range(i + 1):
            gaps = math.prod(newest[j] - newest[m] for m in range(i + 1) if m != j)
            result[j] += coefficient * math.factorial(i) / gaps
    return list(reversed(result))


@functools.lru_cache(maxsize=4096)
def difference_weights(
    name: str, times: tuple[int, ...], t: int, known: Known | None = None
) -> tuple[float, ...]:
    """Weights of f_0, f_1, ... of the forecast ``name`` at step ``t``.

    Args:
        name: of the forecast.
        times: of the anchors, oldest first.
        t: a step behind the last of them.
        known: of the generation and the recipe.

    Raises:
        ValueError: the forecast is unknown, or does not give a finite weight for each anchor.
    """
    weights = FORECASTS.get(name)(times, t, known)
    if len(weights) != len(times) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(
            f"forecast {name} must give {len(times)} finite weights for anchors {times} at step "
            f"{t}, got {weights!r}"
        )
    return tuple(_nearest(value) for value in to_differences(times, weights))


def _nearest(value: float) -> float:
    """Drop what rounding in double precision left behind an exact value."""
    return float(f"{value:.12g}")
