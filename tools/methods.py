"""The measured column of docs/methods.md: each method's recipe against the stock pipeline.

``python tools/methods.py --write`` runs what the column "recipe" names, on the ``report`` prompts,
and fills "measured": PSNR to the dense picture (mean, worst), computed steps, FLOPs skipped. A
recipe with ", calibrated" behind it gets the magnitude ratios or the polynomial that one dense run
of a ``tune`` prompt gives; they are printed. Rows that a run leaves out keep what they have.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from flashomni.engine import Recipe
from flashomni.lab import metrics, split, zoo
from flashomni.lab.generation import Generation
from flashomni.models import find_adapter

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
RECIPE, MEASURED = "recipe", "measured"
CALIBRATED = ", calibrated"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-image")
    parser.add_argument("--recipe", nargs="+", help="these only; all of the page by default")
    parser.add_argument("--count", type=int, default=2, help="report prompts")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size", type=int, help="height and width; the model's own by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    options = parser.parse_args()

    loaded = zoo.load(options.model, options.device)
    prompts = split.pick(options.model, loaded.prompts, "report", options.count)
    names = options.recipe or list(recipes_of(PAGE.read_text("utf-8")))
    change = {} if options.size is None else dict.fromkeys(("height", "width"), options.size)
    made = {name: Recipe.of(name.removesuffix(CALIBRATED)) for name in names}
    if any(name.endswith(CALIBRATED) for name in names):
        tune = split.pick(options.model, loaded.prompts, "tune", 1)[0]
        found = calibrate(_job(loaded, tune, 0, options.steps, change))
        for name in names:
            if name.endswith(CALIBRATED):
                schedule = made[name].schedule.name
                made[name] = made[name].replace(**found[schedule])
                print(f"{schedule}: {found[schedule]}", flush=True)

    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for number, prompt in enumerate(prompts):
        for seed in range(options.seeds):
            job = _job(loaded, prompt, seed, options.steps, change)
            dense, _, _ = job.dense(lambda *_: None)
            for name, recipe in made.items():
                pixels, _, summary = job.accelerated(recipe, lambda *_: None)
                kinds = [step["kind"] for step in summary.steps]
                computed = len(kinds) - kinds.count("dispatch")
                decibel = min(metrics.psnr(dense, pixels), 120.0)
                figures[name].append((decibel, computed, summary.flops_skipped))
        print(f"{number + 1} of {len(prompts)} prompts", flush=True)
    cells = {name: in_words(rows) for name, rows in figures.items()}
    for name, cell in cells.items():
        print(f"{cell}  {name}")
    if options.write:
        PAGE.write_text(filled(PAGE.read_text("utf-8"), cells), "utf-8")


def _job(loaded: Any, prompt: str, seed: int, steps: int | None, change: dict) -> Generation:
    job = Generation(loaded, prompt, seed, steps)
    job.call = {**job.call, **change}
    return job


def in_words(rows: list[tuple[float, float, float]]) -> str:
    """A cell of the column "measured"."""
    decibels, computed, skipped = zip(*rows, strict=True)
    return (
        f"{statistics.mean(decibels):.1f} / {min(decibels):.1f} dB, "
        f"{statistics.mean(computed):.3g} computed, {statistics.mean(skipped):.0%} skipped"
    )


def _rows(page: str) -> Iterator[tuple[int, list[str], int, int]]:
    """``(line, cells, place of the recipe, place of the figure)`` of each row that has both."""
    head: list[str] = []
    for number, line in enumerate(page.splitlines()):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif {RECIPE, MEASURED} <= set(head) and not set(line) <= set("|-: "):
            yield number, cells, head.index(RECIPE), head.index(MEASURED)


def recipes_of(page: str) -> Iterator[str]:
    """What the page's tables name to measure, as :func:`Recipe.of` takes it."""
    for _, cells, place, _ in _rows(page):
        found = re.fullmatch(rf"`([^`]+)`({re.escape(CALIBRATED)})?", cells[place])
        if found:
            yield found[1] + (found[2] or "")


def filled(page: str, figures: dict[str, str]) -> str:
    """The page with these figures in the rows of their recipes."""
    lines = page.splitlines()
    for number, cells, place, measured in _rows(page):
        name = cells[place].replace("`", "")
        if name in figures:
            cells[measured] = figures[name]
            lines[number] = "| " + " | ".join(cells) + " |"
    return "\n".join(lines) + "\n"


def calibrate(job: Generation) -> dict[str, dict[str, list[float]]]:
    """Settings of ``magcache`` and ``teacache`` that one dense run gives.

    The ratio of a step is the mean of ``|added| / |added before|`` over tokens (norms over
    channels) of what the blocks add to the vision tokens; the polynomial of degree 4 takes the
    relative change of the first block's modulated input to that of the output.
    """
    model = job.pipe.transformer
    with recorded(model) as seen:
        job.run(lambda *_: None)
    added, modulated, outputs = seen["added"], seen["modulated"], seen["outputs"]
    norms = [each.norm(dim=-1) for each in added]
    ratios = [1.0] + [float((b / a).mean()) for a, b in itertools.pairwise(norms)]
    found = {"magcache": {"ratios": [round(ratio, 5) for ratio in ratios]}}
    if modulated:
        x, y = (
            torch.tensor([float(_change(b, a)) for a, b in itertools.pairwise(each)])
            for each in (modulated, outputs)
        )
        powers = torch.stack([x.double() ** n for n in range(4, -1, -1)], dim=1)
        fit = torch.linalg.lstsq(powers, y.double()[:, None]).solution[:, 0]
        found["teacache"] = {"coefficients": [float(f"{c:.6g}") for c in fit]}
    return found


def _change(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return (new - old).abs().mean() / old.abs().mean()


@contextmanager
def recorded(model: Any) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What the blocks add, the first one's modulated input and the output, of each call."""
    sites = find_adapter(model).sites(model)
    first, last = sites[0], sites[-1]
    seen: dict[str, list[torch.Tensor]] = {"added": [], "modulated": [], "outputs": []}
    entrance: list[torch.Tensor] = []

    def before(block: Any, args: tuple, kwargs: dict) -> None:
        entrance[:] = [kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]]
        if first.modulated is not None:
            seen["modulated"].append(first.modulated(block, *args, **kwargs).float().cpu())

    def behind(block: Any, args: tuple, output: Any) -> None:
        seen["added"].append((last.unpack(output)[last.main] - entrance[0]).float().cpu())

    def returned(module: Any, args: tuple, output: Any) -> None:
        seen["outputs"].append((output[0] if isinstance(output, tuple) else output).float().cpu())

    handles = [
        first.block.register_forward_pre_hook(before, with_kwargs=True),
        last.block.register_forward_hook(behind),
        model.register_forward_hook(returned),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main()
