"""``flashomni.tune``: a goal, the points on the way to it, and the recipe that reaches it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashomni.engine import Recipe
from flashomni.tuning.drive import OnLatents
from flashomni.tuning.settings import Point, Settings
from flashomni.tuning.tuner import OnProgress, Tuner
from flashomni.util.files import write_text
from flashomni.util.words import in_bytes

log = logging.getLogger("flashomni")
SPEEDUPS = (1.75, 2.25, 2.75, 3.25, 4.0)  # of the points of a Pareto front, about
MOST_POINTS = 5  # measured on the way to a fidelity


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        points: by number of computed steps, most first.
        chosen: the one that reaches the goal; of a Pareto front, the one that gains most.
        seconds: that it took; of an interrupted run before it, up to what that found last.
        bytes_each: of one recording, on the host and on disk.
        resumed: findings of an earlier run that were used.
    """

    points: tuple[Point, ...]
    chosen: Point
    seconds: float
    bytes_each: int
    resumed: int

    @property
    def recipe(self) -> Recipe:
        return self.chosen.recipe

    def to_dict(self) -> dict[str, Any]:
        """JSON values: predicted against measured, of each point."""
        return {
            "seconds": round(self.seconds, 2),
            "recording_bytes": self.bytes_each,
            "resumed": self.resumed,
            "chosen": self.chosen.computed,
            "points": [
                {
                    "computed": point.computed,
                    "steps": list(point.recipe.schedule.to_dict()["steps"]),
                    "forecast": point.recipe.forecast.name,
                    "source": point.source,
                    "predicted_db": round(point.predicted_db, 2),
                    "measured_db": round(point.measured_db, 2),
                    "sparse": None if point.spent is None else point.spent.to_dict(),
                    "divided": None if point.divided is None else point.divided.to_dict(),
                    "groups": [group.to_dict() for group in point.recipe.groups],
                    **asdict(point.verdict),
                }
                for point in self.points
            ],
        }


class NotBetterError(RuntimeError):
    """No recipe is written: none of those found beats the ramp on held-back prompts.

    Attributes:
        found: what was found.
    """

    def __init__(self, message: str, found: Tuned) -> None:
        super().__init__(message)
        self.found = found


def tune(
    pipe: Any,
    prompts: Sequence[str],
    *,
    call: dict[str, Any] | None = None,
    steps: int | None = None,
    target_speedup: float | None = None,
    target_psnr: float | None = None,
    pareto: bool | Sequence[int] = False,
    held_back: Sequence[str] | int | None = None,
    seed: int = 0,
    out: str | Path = "recipe.json",
    settings: Settings | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
    on_latents: OnLatents | None = None,
    on_note: Callable[[str], None] = log.info,
) -> Tuned:
    """Find the schedule and the forecast weights that suit a pipeline, and write the recipe.

    Any diffusers pipeline with one transformer: with a LoRA, a ControlNet, guidance by two calls.
    An interrupted run goes on where it was: what is found lies in ``OUT.tune/`` beside the recipe.

    Args:
        pipe: the pipeline, as it will be used; not accelerated.
        prompts: some to tune on, and the last ones to validate on.
        call: arguments of the pipeline's call, as it will be used.
        steps: denoising steps, instead of those of ``call``.
        target_speedup: how much faster than the stock pipeline.
        target_psnr: dB against the stock pipeline's pictures, on held-back prompts.
        pareto: several numbers of computed steps, chosen here or given; each has its recipe, beside
            ``out`` with the number in its name. Exactly one of the three is asked for.
        held_back: prompts to validate on, or how many of ``prompts``; a quarter if left out.
        seed: of the first prompt's noise; each further prompt has the next.
        out: of the recipe.
        settings: how much work to do.
        on_progress: told the stage, the model's calls so far, and how many there will be.
        on_latents: given step and latents of the dense runs that are recorded, to show them.
        on_note: told, before anything runs, what recording will take, and what was there already.

    Returns:
        The points, and the one that reaches the goal.

    Raises:
        ValueError: an argument is not allowed, or the goal cannot be reached.
        NotImplementedError: the pipeline's transformer cannot be tuned; the message says why.
        NotBetterError: no recipe beats the ramp with as many computed steps on held-back prompts.
            Then none is written.
    """
    goals = [target_speedup is not None, target_psnr is not None, pareto is not False]
    if sum(goals) != 1:
        raise ValueError("exactly one of target_speedup, target_psnr and pareto must be given")
    for name, value in (("target_speedup", target_speedup), ("target_psnr", target_psnr)):
        if value is not None and not value > (1.0 if name == "target_speedup" else 0.0):
            raise ValueError(f"{name} must be a larger number, got {value!r}")
    own, back = _divided(prompts, held_back)
    out = Path(out)
    call = dict(call or {}) | ({} if steps is None else {"num_inference_steps": steps})
    tuner = Tuner(
        pipe, call, own, back, seed, out.stem, state_folder(out), settings or Settings(),
        on_progress, on_latents,
    )  # fmt: skip
    resumed = tuner.state.resumed
    on_note(
        f"recording takes {in_bytes(tuner.bytes_each)} a prompt for {len(own)} prompts, on "
        f"the host (at most {in_bytes(tuner.settings.memory)} at a time) and in "
        f"{tuner.state.folder}{tuner.groups.in_words}"
    )
    if tuner.state.foreign:
        on_note(f"what lay in {tuner.state.folder} is of other settings, and starts anew")
    elif resumed:
        on_note(f"goes on with {resumed} findings in {tuner.state.folder}")
    if target_psnr is not None:
        points = _reach(tuner, target_psnr)
        enough = [p for p in points if p.verdict.psnr_db >= target_psnr]
        if not enough:
            best = max(points, key=lambda point: point.verdict.psnr_db)
            raise ValueError(
                f"target_psnr must be at most {best.verdict.psnr_db} dB here, which "
                f"{best.computed} of {tuner.num_steps} steps give; got {target_psnr:g}"
            )
        chosen = min(enough, key=lambda point: point.computed)
    else:
        counts = _counts(tuner, target_speedup, pareto)
        tuner.expect(counts)
        points = [tuner.point(count) for count in sorted(counts)]
        chosen = max(points, key=lambda point: point.verdict.gain_db)
    points = sorted(points, key=lambda point: -point.computed)
    found = Tuned(tuple(points), chosen, tuner.seconds, tuner.bytes_each, resumed)
    _write(found, out, many=pareto is not False)
    tuner.state.forget_recordings()
    return found


def state_folder(out: str | Path) -> Path:
    """Where a run keeps what it found, beside its recipe."""
    out = Path(out)
    return out.with_name(out.stem + ".tune")


def _divided(
    prompts: Sequence[str], held_back: Sequence[str] | int | None
) -> tuple[list[str], list[str]]:
    """Prompts to tune on, and to validate on."""
    prompts = list(prompts)
    if held_back is None:
        held_back = max(len(prompts) // 4, 1)
    if isinstance(held_back, int):
        if not 1 <= held_back < len(prompts):
            raise ValueError(
                f"prompts must be at least two, one of them held back; got {len(prompts)} with "
                f"held_back={held_back}"
            )
        prompts, held_back = prompts[:-held_back], prompts[-held_back:]
    back = list(held_back)
    if not prompts or not back or set(prompts) & set(back):
        raise ValueError("prompts and held_back must not be empty, and have none in common")
    return prompts, back


def _counts(tuner: Tuner, target_speedup: float | None, pareto: bool | Sequence[int]) -> list[int]:
    steps = tuner.num_steps
    if target_speedup is not None:
        tuner.expect([max(round(steps / target_speedup), 2)])
        return [tuner.count_for(target_speedup)]
    if isinstance(pareto, bool):
        found = {round(steps / speedup) for speedup in SPEEDUPS}
        return sorted((count for count in found if 2 <= count < steps), reverse=True)
    wrong = [count for count in pareto if not 2 <= count < steps]
    if wrong or not pareto:
        raise ValueError(f"pareto must list counts from 2 to {steps - 1}, got {list(pareto)}")
    return sorted(set(pareto), reverse=True)


def _reach(tuner: Tuner, target: float) -> list[Point]:
    """Points until the fewest computed steps that reach a fidelity are found, or enough tried."""
    low, high = 2, tuner.num_steps - 1
    points: list[Point] = []
    tuner.expect([tuner.num_steps // 2] * 3)
    while low <= high and len(points) < MOST_POINTS:
        count = (low + high) // 2 if points else max(round(tuner.num_steps / 2.5), low)
        points.append(tuner.point(count))
        if points[-1].verdict.psnr_db >= target:
            high = count - 1
        else:
            low = count + 1
    return points


def _write(found: Tuned, out: Path, many: bool) -> None:
    """The recipes that beat the ramp, and the figures of all.

    Raises:
        NotBetterError: there is none.
    """
    write_text(state_folder(out) / "report.json", json.dumps(found.to_dict(), indent=2) + "\n")
    verdict = found.chosen.verdict
    if not verdict.beats:
        count = found.chosen.computed
        tuned = found.recipe.tuned
        raise NotBetterError(
            f"no recipe written: on held-back prompts {count} tuned steps give "
            f"{verdict.psnr_db} dB, {tuned.ramp if tuned else 'the ramp'} with forecast quadrature "
            f"of order 2 gives {verdict.ramp_db} dB (difference {verdict.gain}); use the ramp, or "
            "tune with more prompts",
            found,
        )
    found.recipe.save(out)
    if many:
        for point in found.points:
            if point.verdict.beats:
                point.recipe.save(out.with_name(f"{out.stem}-{point.computed}{out.suffix}"))
