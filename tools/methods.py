"""The measured columns of docs/methods.md: each method's recipe against the stock pipeline.

``python tools/methods.py --csv docs/results/methods.csv`` runs what the column "recipe" names, on
the ``report`` prompts of the models, and peers beside them; ``--write`` puts the CSV's figures into
the page: PSNR to the dense picture (mean and its standard error over prompts, worst), computed
steps, FLOPs skipped, speed-up. A recipe with ", calibrated" behind it gets the magnitude ratios or
the polynomial that one dense run of a ``tune`` prompt gives; they are printed. Rows that no run has
keep what they hold.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from flashomni.engine import Recipe
from flashomni.lab import results, split, zoo
from flashomni.lab.fidelity.compare import compare
from flashomni.lab.fidelity.comparison import Comparison, Summed
from flashomni.lab.fidelity.methods import Method, of_recipe, parse_method
from flashomni.lab.generation import Generation
from flashomni.models import find_adapter

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
RECIPE = "recipe"
MEASURED = {"tiny-image": "measured, picture", "tiny-video": "measured, video"}
CALIBRATED = ", calibrated"
RAMP = "[0,1,2,4,6,10,15,20,24,27]"  # the steps of `balanced`, given to peers that take a list
PEERS = (
    "steps=20", "steps=14", "steps=10",
    "diffusers.mag:threshold=.12", "diffusers.mag:threshold=.24", f"diffusers.mag:steps={RAMP}",
    "diffusers.taylorseer:cache_interval=4,disable_cache_before_step=4",
    "diffusers.first_block:threshold=.15",
    "cache-dit:Fn_compute_blocks=1,max_warmup_steps=4,residual_diff_threshold=.16",
    "cache-dit:Fn_compute_blocks=1,taylorseer_order=1,mask=fast",
    f"cache-dit:Fn_compute_blocks=1,taylorseer_order=1,steps={RAMP}",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=list(MEASURED))
    parser.add_argument("--recipe", nargs="+", help="these only; all of the page by default")
    parser.add_argument("--peer", nargs="*", default=PEERS)
    parser.add_argument("--count", type=int, nargs="+", default=[24, 12], help="prompts, a model")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size", type=int, help="height and width; the model's own by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--timed", default="float32", help="dtype of what is timed")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="a model")
    parser.add_argument("--rounds", type=int, default=3, help="timed generations")
    parser.add_argument("--seconds", type=float, nargs="+", help="a model; no further one is begun")
    parser.add_argument("--csv", type=Path, help="where rows are kept")
    parser.add_argument("--write", action="store_true", help=f"from the CSV into {PAGE.name}")
    options = parser.parse_args()

    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")  # stock and methods alike
    page = PAGE.read_text("utf-8")
    if options.write:
        if options.csv is None:
            parser.error("--write needs --csv")
        PAGE.write_text(filled(page, cells_of(results.read(options.csv, Summed))), "utf-8")
        return
    found = {}
    for number, model in enumerate(options.model):
        found[model] = measure(model, number, options, list(recipes_of(page)))
        if options.csv is not None:
            found[model].save(options.csv, model)
    for model, comparison in found.items():
        print(f"\n{model}, {comparison.seconds:.0f} s\n{comparison}", flush=True)


def measure(model: str, number: int, options: argparse.Namespace, names: list[str]) -> Comparison:
    """Every method on one model: as far as the time goes, the most important first."""

    def mine(values: list[Any] | None) -> Any:
        return None if not values else values[min(number, len(values) - 1)]

    loaded = zoo.load(model, options.device)
    start = time.perf_counter()

    def tell(name: str, done: int, total: int) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {model} {done}/{total} {name}", flush=True)

    timed = None
    if options.timed != "float32":
        timed = zoo.load(model, options.device, getattr(torch, options.timed)).pipe
    prompts = split.pick(model, loaded.prompts, "report", mine(options.count))
    change = {} if options.size is None else dict.fromkeys(("height", "width"), options.size)
    call = {**loaded.call, **change}
    methods = []
    for name in options.peer:  # first: what there is no time for has been compared with nothing
        try:
            methods.append(parse_method(name))
        except NotImplementedError as error:
            print(f"{name}: {error}", flush=True)
    methods += made(options.recipe or names, loaded, call, options.steps, model)
    return compare(
        loaded.pipe,
        methods,
        prompts,
        seeds=range(options.seeds),
        call=call,
        steps=options.steps,
        batch=mine(options.batch),
        rounds=options.rounds,
        timed=timed,
        seconds=mine(options.seconds),
        on_method=tell,
    )


def made(
    names: list[str], loaded: Any, call: dict[str, Any], steps: int | None, model: str
) -> list[Method]:
    """The methods of these names, calibrated where they say so."""
    recipes = {name: Recipe.of(name.removesuffix(CALIBRATED)) for name in names}
    if any(name.endswith(CALIBRATED) for name in names):
        tune = split.pick(model, loaded.prompts, "tune", 1)[0]
        found = calibrate(_job(loaded, tune, 0, steps, call))
        for name in names:
            if name.endswith(CALIBRATED):
                schedule = recipes[name].schedule.name
                recipes[name] = recipes[name].replace(**found[schedule])
                print(f"{schedule}: {found[schedule]}", flush=True)
    return [of_recipe(name, recipe) for name, recipe in recipes.items()]


def _job(loaded: Any, prompt: str, seed: int, steps: int | None, change: dict) -> Generation:
    job = Generation(loaded, prompt, seed, steps)
    job.call = {**job.call, **change, "num_inference_steps": job.num_steps}
    return job


def in_words(row: dict[str, str]) -> str:
    """A cell of a measured column, of a row of the CSV."""
    error = f" ± {float(row['psnr_error']):.1f}" if row["psnr_error"] else ""
    parts = [f"{float(row['psnr_db']):.1f}{error} / {float(row['worst_psnr_db']):.1f} dB"]
    if row["computed"]:
        parts.append(f"{float(row['computed']):.3g} computed")
    if row["flops_skipped"]:
        parts.append(f"{float(row['flops_skipped']):.0%} skipped")
    if row.get("attention_spent"):
        parts.append(f"attention {float(row['attention_spent']):.2f}")
    return ", ".join([*parts, f"{float(row['speedup']):.2f}x"])


def cells_of(rows: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    """Column -> recipe -> cell, of the rows of a CSV; one that is not finite says so."""
    found: dict[str, dict[str, str]] = {column: {} for column in MEASURED.values()}
    for row in rows:
        if row["model"] in MEASURED:
            words = row["psnr_db"] if row["psnr_db"] == "not finite" else in_words(row)
            found[MEASURED[row["model"]]][row["method"]] = words
    return found


def _rows(page: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """``(line, cells, head)`` of each row of a table with recipes and a measured column."""
    head: list[str] = []
    for number, line in enumerate(page.splitlines()):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif RECIPE in head and set(MEASURED.values()) & set(head) and set(line) - set("|-: "):
            yield number, cells, head


def recipes_of(page: str) -> Iterator[str]:
    """What the page's tables name to measure, as :func:`Recipe.of` takes it."""
    for _, cells, head in _rows(page):
        found = re.fullmatch(rf"`([^`]+)`({re.escape(CALIBRATED)})?", cells[head.index(RECIPE)])
        if found:
            yield found[1] + (found[2] or "")


def filled(page: str, figures: dict[str, dict[str, str]]) -> str:
    """The page with these figures, column -> recipe -> cell, in the rows of their recipes."""
    lines = page.splitlines()
    for number, cells, head in _rows(page):
        name = cells[head.index(RECIPE)].replace("`", "")
        for column, known in figures.items():
            if column in head and name in known:
                cells[head.index(column)] = known[name]
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
