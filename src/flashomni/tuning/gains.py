"""What an error at a step does to the result: directly, and on its way through the network.

The direct effect is the scheduler's: with all other outputs replayed nothing is computed. The gain
is measured at the size that is used: an error of a forecast is put into the dense run, and the
network computes the rest of the steps. Local error alone misleads: on one model early errors were
amplified tenfold at 128 pixels and not at all at 64, and a plan without gains lost 7 dB there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashomni.engine.forecasts import FORECASTS
from flashomni.tuning.drive import Compute, Driver
from flashomni.tuning.record import Recording


def direct_effects(driver: Driver, recording: Recording) -> np.ndarray:
    """What a unit of each row of the outputs does to the final latents, if nothing else changes.

    All schedulers are linear in what they get, so the effects of one and the same change, at any
    step and row, point into one direction: a signed number tells each.

    Returns:
        ``[T, rows]``. Computes nothing: every output is replayed.
    """
    steps, rows = recording.num_steps, recording.rows
    device = _device(driver)
    unit = torch.randn(
        recording.step(0, device).shape[1], generator=torch.Generator().manual_seed(0)
    )
    size = float(recording.step(0, device)[0].norm())
    unit = (unit / unit.norm() * size).to(device)
    base = _replayed(driver, recording, 0, None)
    changes = {}
    for step in range(steps):
        for row in range(rows):
            delta = torch.zeros(rows, len(unit), device=device)
            delta[row] = unit
            changes[step, row] = (_replayed(driver, recording, step, delta) - base).cpu()
    longest = max(changes.values(), key=lambda change: float(change.norm()))
    towards = longest / longest.norm()
    found = np.array(
        [[float(changes[t, r] @ towards) / size for r in range(rows)] for t in range(steps)]
    )
    return found * np.sign(found.sum())


def probe_steps(num_steps: int, count: int) -> list[int]:
    """Where to measure gains: from step 1 on, more of them early, where gains change fast."""
    last = num_steps - 2
    places = np.linspace(0.0, 1.0, count) ** 1.6
    return sorted({round(1 + (last - 1) * place) for place in places})


@dataclass(frozen=True)
class Gain:
    """What becomes of an error in the final latents, over its direct effect alone.

    Attributes:
        along: the part in the error's own direction; below 1 where the network makes good some of
            it, signed.
        across: norm of the rest, which the network adds.
    """

    along: float
    across: float


def gain(driver: Driver, recording: Recording, step: int) -> Gain:
    """What the network makes of an error at ``step``, of the size that is used.

    The error put in is that of a forecast over a gap as long as schedules have there.
    """
    delta = _forecast_error(recording, step, _device(driver))
    start = recording.latents.to(delta.device)
    live = _replayed(driver, recording, step, delta, live=True) - start
    direct = _replayed(driver, recording, step, delta) - start
    along = float(live @ direct / (direct @ direct).clamp(min=1e-30))
    rest = live - along * direct
    return Gain(along, float(rest.norm() / direct.norm().clamp(min=1e-30)))


def gain_curve(measured: Sequence[dict[int, Gain]], num_steps: int) -> np.ndarray:
    """Gains of all steps from those of a few, of several prompts: ``[2, T]``, along and across.

    Means of logarithms over prompts, lines between steps. Behind the last step nothing computes:
    it is 1 along and 0 across. An error's own part is a number near 1, which early probes tell only
    roughly, since there nearly everything is across: it is kept between a third and three.

    Args:
        measured: of each prompt, by step.
        num_steps: of the generation.
    """
    steps = sorted({step for each in measured for step in each if step < num_steps - 1})
    found = [[each[step] for each in measured if step in each] for step in steps]
    along = [np.mean([np.log(np.clip(g.along, 1 / 3, 3.0)) for g in gains]) for gains in found]
    across = [np.mean([np.log(max(g.across, 1e-6)) for g in gains]) for gains in found]
    places = np.arange(num_steps)
    curves = np.stack([np.exp(np.interp(places, steps, logs)) for logs in (along, across)])
    curves[:, -1] = 1.0, 0.0
    return curves


def _forecast_error(recording: Recording, step: int, device: torch.device) -> Tensor:
    gap = max(1, min(step // 3, 4))
    anchors = [at for at in (step - 3 * gap, step - 2 * gap, step - gap) if at >= 0]
    anchors = anchors or [0]
    weights = FORECASTS.get("hermite")(anchors, step, None)
    forecast = sum(
        weight * recording.step(at, device) for weight, at in zip(weights, anchors, strict=True)
    )
    assert isinstance(forecast, Tensor)
    return forecast - recording.step(step, device)


def _replayed(
    driver: Driver, recording: Recording, step: int, delta: Tensor | None, live: bool = False
) -> Tensor:
    """The final latents of a dense run with another output at one step.

    Args:
        driver: of the pipeline.
        recording: of the run.
        step: where to change it.
        delta: ``[rows, elements]``, what is added; ``None`` for nothing.
        live: whether the network computes the steps behind it.
    """

    def answer(at: int, call: int, compute: Compute) -> Tensor:
        if live and at > step:
            return compute()
        kept = recording.outputs[at][call]
        value = kept.to(_device(driver))
        if at != step or delta is None:
            return value
        start = sum(len(each) for each in recording.outputs[at][:call])
        part = delta[start : start + len(value)].reshape(value.shape)
        return (value.float() + part).to(value.dtype)

    return driver.run(recording.prompt, recording.seed, answer)


def _device(driver: Driver) -> torch.device:
    return torch.device(driver.pipe._execution_device)
