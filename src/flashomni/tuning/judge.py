"""What of a tuned recipe stands on held-back prompts: its schedule, and its sparse attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from flashomni.engine import Recipe
from flashomni.tuning.layer_tries import Divided, in_layers
from flashomni.tuning.polish import Candidate
from flashomni.tuning.sparse import Spent, sparsely
from flashomni.tuning.validate import (
    KINDS,
    Held,
    HeldBack,
    Verdict,
    keep_picture,
    picture_path,
    recipe_of,
)


def judge(
    held: HeldBack,
    folder: Path,
    name: str,
    count: int,
    num_steps: int,
    best: Candidate,
    fitted: Candidate,
    spend: Callable[[Recipe], Spent | None],
    divide: Callable[[Recipe], Divided | None],
    worth: Callable[[float], float],
) -> dict[str, Any]:
    """The verdict on one number of computed steps.

    A schedule that the ramp with weights fitted in the same way is as good as has learnt its
    prompts by heart: then that ramp takes its place, and has to beat the presets' forecast.

    Args:
        held: the prompts.
        folder: of pictures and the ramp's recipe.
        name: of the recipe.
        count: of computed steps, of ``num_steps``.
        num_steps: of the generation.
        best: what tuning found.
        fitted: the ramp with fitted weights.
        spend: what sparse attention in computed steps of a recipe is worth.
        divide: what groups of layers with steps of their own are worth in a recipe.
        worth: dB that plans of the output lose which save so many computed steps.

    Returns:
        JSON values: ``verdict``; ``ramp``, whether it is the fitted ramp's; ``groups`` of layers
        whose sparse attention pays here too, or ``layers`` with steps of their own that give more,
        and what was ``spent`` on the first and came of the second (``divided``).
    """
    recipe, ramp = recipe_of(best.steps, num_steps, best, name), fitted.steps
    mine, picture = held.run(recipe, count)
    against, ramp_picture = held.run(recipe_of(ramp, num_steps), count)
    verdict, same, falls_back = Verdict.of(mine, against, None), None, False
    if best.steps != ramp:
        other = recipe_of(ramp, num_steps, fitted, f"ramp-{count}-fitted")
        other.save(folder / f"{other.name}.json")
        same, same_picture = held.run(other, count)
        verdict = Verdict.of(mine, against, same)
        falls_back = verdict.schedule_gain_db is not None and verdict.schedule_gain_db <= 0
        if falls_back:
            recipe, picture = other, same_picture
            verdict, same = Verdict.of(same, against, None), None
    plain: list[Held] = []

    def offer(changed: Recipe) -> tuple[float, float, Verdict, Tensor]:
        """Seconds that it saves on these prompts, dB that it loses, and what it gives."""
        again, its_picture = held.run(changed, count)
        plain.extend([] if plain else held.run(recipe, count)[0])
        pairs = zip(plain, again, strict=True)
        saved = statistics.median(a.seconds - b.seconds for a, b in pairs)
        found = Verdict.of(again, against, same)
        return saved, mean - found.psnr_db, found, its_picture

    spent, groups, best_surplus, mean = spend(recipe), list[Any](), 0.0, verdict.psnr_db
    if spent is not None and spent.chosen is not None:
        sparse = sparsely(recipe, spent.chosen.groups)
        saved, lost, changed, its_picture = offer(sparse)
        if changed.beats and saved > 0 and lost < saved * spent.price:
            groups, best_surplus = sparse.to_dict()["groups"], saved * spent.price - lost
            verdict, picture = changed, its_picture
    divided, layers = divide(recipe), list[Any]()
    if divided is not None and divided.chosen is not None:
        finer = in_layers(recipe, divided.chosen.groups)
        saved, lost, changed, its_picture = offer(finer)
        fewer = min(saved / divided.step_seconds, divided.chosen.fewer)
        if changed.beats and worth(fewer) - lost > best_surplus:
            groups, layers = [], finer.to_dict()["groups"]
            verdict, picture = changed, its_picture
    pictures = (held.dense()[0][0], ramp_picture, picture)
    for kind, pixels in zip(KINDS, pictures, strict=True):
        keep_picture(pixels, picture_path(folder, count, kind))
    return {
        "ramp": falls_back,
        "groups": groups,
        "layers": layers,
        "spent": None if spent is None else spent.to_dict(),
        "divided": None if divided is None else divided.to_dict(),
        "verdict": asdict(verdict),
    }
