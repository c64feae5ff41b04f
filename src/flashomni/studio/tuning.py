"""Tuning for one prompt, with few tries: what ``flashomni tune`` does for many."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from flashomni.engine import Recipe
from flashomni.lab.generation import Generation
from flashomni.lab.zoo import PROMPT
from flashomni.studio.events import Emit, Event, Progress
from flashomni.studio.outcome import Ask
from flashomni.studio.preview import Preview
from flashomni.studio.session import Session
from flashomni.studio.turns import Cancelled
from flashomni.tuning import NotBetterError, Settings, tune

LEAST_STEPS = 4
OTHERS = (PROMPT, "a photograph")  # to validate on, where a pipeline has no prompts of its own


@dataclass(frozen=True)
class TunedFor:
    """What came of it.

    Attributes:
        recipe: that was found, or ``None`` where the ramp is not beaten on the other prompt.
        says: the figures, in a sentence.
    """

    recipe: Recipe | None
    says: str


def tune_for(session: Session, ask: Ask, computed: int, tries: int) -> Iterator[Event]:
    """Tune on the page's prompt and validate on another; ends with a :class:`TunedFor`.

    The dense run is seen as it goes. The page takes the recipe that is found.

    Args:
        session: of the page.
        ask: prompt, seed, steps and size.
        computed: steps that the recipe may compute.
        tries: schedules that are tried on the real output.

    Raises:
        ValueError: there are too few steps.
    """
    if ask.steps < LEAST_STEPS or not 2 <= computed < ask.steps:
        raise ValueError(
            f"computed steps must be from 2 to {max(ask.steps - 1, 2)} of at least {LEAST_STEPS} "
            f"steps, got {computed} of {ask.steps}"
        )
    loaded = session.shelved.loaded
    other = next(p for p in (*loaded.prompts, *OTHERS) if p != ask.prompt)

    def work(emit: Emit, stop: threading.Event) -> TunedFor:
        now = Progress("tuning", 0, 0)
        emit(now)

        def on_progress(stage: str, done: int, total: int) -> None:
            nonlocal now
            if stop.is_set():
                raise Cancelled
            now = Progress(f"tuning: {stage}", done, total)
            emit(now)

        def on_latents(step: int, latents: Tensor | None) -> None:
            picture = preview.now_and_then(step, latents, ask.live)
            if picture is not None:
                emit(replace(now, preview=picture))

        generation = Generation(loaded, ask.prompt, ask.seed, ask.steps)
        generation.call.update(ask.size)
        preview = Preview(loaded.pipe, generation.call)
        recipe = None
        try:
            found = tune(
                loaded.pipe,
                [ask.prompt],
                call=generation.call,
                pareto=[computed],
                held_back=[other],
                seed=ask.seed,
                out=session.folder / f"tuned-{computed}-of-{ask.steps}.json",
                settings=Settings(tries=tries, probes=4, probed=1),
                on_progress=on_progress,
                on_latents=on_latents,
            )
            recipe = session.choose(found.recipe)
        except NotBetterError as error:
            found = error.found
        verdict = found.chosen.verdict
        beaten = "tuned" if recipe else "no recipe is taken, the ramp is as good"
        return TunedFor(
            recipe,
            f"{beaten}: {computed} of {ask.steps} steps give {verdict.psnr_db:.2f} dB on a prompt "
            f"that was not tuned on, a ramp of as many {verdict.ramp_db:.2f} dB "
            f"({found.seconds:.0f} s of tuning)",
        )

    return session.run(work)
