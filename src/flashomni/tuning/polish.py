"""Schedules tried on the real output: the model predicts, the pipeline decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashomni.tuning.cost import anchors_of
from flashomni.tuning.drive import Compute, Driver
from flashomni.tuning.plan import Steps, neighbours
from flashomni.tuning.record import Recording
from flashomni.tuning.state import State, key

BEHIND = 0.5  # dB on the prompts so far


@dataclass(frozen=True)
class Candidate:
    """A schedule and the weights of its forecasts.

    Args:
        steps: that are computed.
        weights: ``[T, T]``, see :class:`flashomni.tuning.cost.Costs`.
        order: of the forecast.
        forecast: its name; ``fitted`` where the weights are a calibration's.
        label: where it came from.
        predicted: cost in dB, of the final latents.
    """

    steps: Steps
    weights: np.ndarray
    order: int
    forecast: str
    label: str
    predicted: float


def simulate(driver: Driver, recording: Recording, candidate: Candidate) -> Tensor:
    """The final latents under a candidate, as the engine forecasts at the level of the output.

    What comes before the first step that is left out is replayed, not computed.
    """
    places = anchors_of(candidate.steps, candidate.order, len(candidate.weights))
    first = min(places, default=len(candidate.weights))
    kept: dict[int, list[tuple[int, Tensor]]] = {}

    def answer(step: int, call: int, compute: Compute) -> Tensor:
        history = kept.setdefault(call, [])
        if step not in places:
            replays = step < first
            recorded = recording.outputs[step][call]
            device = torch.device(driver.pipe._execution_device)
            value = recorded.to(device) if replays else compute()
            history.append((step, value))
            del history[: -(candidate.order + 1)]
            return value
        values = dict(history)
        forecast = torch.zeros_like(history[-1][1], dtype=torch.float32)
        for anchor in places[step]:
            forecast += float(candidate.weights[step, anchor]) * values[anchor].float()
        return forecast.to(history[-1][1].dtype)

    return driver.run(recording.prompt, recording.seed, answer)


def measured(
    driver: Driver,
    state: State,
    recording: Callable[[int], Recording],
    prompts: int,
    candidate: Candidate,
    best: Sequence[float] = (),
) -> list[float]:
    """dB of the final latents on the real output, by tuning prompt; what was found is kept.

    Ends early where the prompts so far are :func:`behind` those of the ``best`` candidate.
    """
    values: list[float] = []
    for number in range(prompts):
        weights = np.round(candidate.weights, 10).tolist()
        name = f"real {key(candidate.steps, weights, candidate.order, number)}"
        kept = state.get(name)
        if kept is None:
            dense = recording(number)
            latents = simulate(driver, dense, candidate)
            kept = state.put(name, signal_to_noise(latents, dense.latents))
        values.append(kept)
        if behind(values, best):
            break
    return values


def signal_to_noise(latents: Tensor, reference: Tensor) -> float:
    """dB of the reference's mean square over that of the difference."""
    reference = reference.to(latents.device)
    error = float((latents - reference).double().square().sum())
    power = float(reference.double().square().sum())
    return 300.0 if error == 0 else float(-10 * np.log10(error / power))


def search(
    starts: Iterable[Candidate],
    make: Callable[[Steps], Candidate],
    measure: Callable[[Candidate, Sequence[float]], list[float]],
    tries: int,
) -> tuple[Candidate, float]:
    """The best of what is measured: all starts, then neighbours of the best, likeliest first.

    Args:
        starts: measured all, likeliest first.
        make: the candidate of a schedule.
        measure: dB on the real output by prompt, given those of the best so far; fewer numbers
            where it is :func:`behind`.
        tries: neighbours to measure.

    Returns:
        The best, and its mean over prompts.
    """
    best, values = None, list[float]()
    tried: set[Steps] = set()

    def better(candidate: Candidate) -> bool:
        nonlocal best, values
        tried.add(candidate.steps)
        found = measure(candidate, values)
        if best is not None and (len(found) < len(values) or np.mean(found) <= np.mean(values)):
            return False
        best, values = candidate, found
        return True

    for start in sorted(starts, key=lambda start: -start.predicted):  # others soon fall behind
        better(start)
    assert best is not None, "there must be something to start from"
    while tries > 0:
        options = [s for s in neighbours(best.steps, len(best.weights)) if s not in tried]
        ranked = sorted((make(steps) for steps in options), key=lambda c: -c.predicted)
        for candidate in ranked[:tries]:
            tries -= 1
            if better(candidate):
                break
        else:
            break
    return best, float(np.mean(values))


def behind(values: Sequence[float], best: Sequence[float]) -> bool:
    """Whether some prompts say that a candidate will not catch up on the others.

    Candidates on one prompt are a few tenths of a dB apart, or many: half of the tries end here.
    """
    return bool(best) and np.mean(values) < np.mean(best[: len(values)]) - BEHIND


def spread(values: Sequence[float]) -> float | None:
    """Standard error of a mean; of one value nobody knows it."""
    count = len(values)
    return float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else None
