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


def signal_to_noise(latents: Tensor, reference: Tensor) -> float:
    """dB of the reference's mean square over that of the difference."""
    reference = reference.to(latents.device)
    error = float((latents - reference).double().square().sum())
    power = float(reference.double().square().sum())
    return 300.0 if error == 0 else float(-10 * np.log10(error / power))


def search(
    starts: Iterable[Candidate],
    make: Callable[[Steps], Candidate],
    measure: Callable[[Candidate], float],
    tries: int,
) -> tuple[Candidate, float]:
    """The best of what is measured: all starts, then neighbours of the best, likeliest first.

    Args:
        starts: measured all.
        make: the candidate of a schedule.
        measure: dB on the real output, mean over prompts.
        tries: neighbours to measure.
    """
    seen: dict[tuple[Steps, str], float] = {}
    best, value = None, -np.inf
    for start in starts:
        found = seen[start.steps, start.label] = measure(start)
        if found > value:
            best, value = start, found
    assert best is not None, "there must be something to start from"
    tried: set[Steps] = {steps for steps, _ in seen}
    while tries > 0:
        options = [s for s in neighbours(best.steps, len(best.weights)) if s not in tried]
        ranked = sorted((make(steps) for steps in options), key=lambda c: -c.predicted)
        improved = False
        for candidate in ranked[:tries]:
            tried.add(candidate.steps)
            tries -= 1
            found = measure(candidate)
            if found > value:
                best, value, improved = candidate, found, True
                break
        if not improved:
            break
    return best, value


def spread(values: Sequence[float]) -> float:
    """Standard error of a mean; 0 of one value."""
    count = len(values)
    return float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else 0.0
