"""The measured columns of docs/methods.md: each method's recipe against the stock pipeline.

``python tools/methods.py --csv docs/results/methods.csv`` runs what the column "recipe" names, on
the ``report`` prompts of the models, and peers beside them; ``--write`` puts the CSV's figures into
the page: PSNR to the dense picture (mean and its standard error over prompts, worst), computed
steps, FLOPs skipped, speed-up. A recipe with ", calibrated" behind it gets the magnitude ratios or
the polynomial that one dense run of a ``tune`` prompt gives; they are printed. Rows that no run has
keep what they hold.

``--jobs N`` looks at pictures in N processes, which share a card whose kernels are too short to
fill it, and takes all times behind that, alone. ``--ours`` names methods that are compared with
every line of peers at their own measured time, ``--equal-time`` is the CSV of that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from flashomni.engine import Recipe
from flashomni.lab import results, split, zoo
from flashomni.lab.fidelity.compare import compare
from flashomni.lab.fidelity.comparison import Comparison, Picture, Summed
from flashomni.lab.fidelity.equal_time import Equal, at_equal_time
from flashomni.lab.fidelity.methods import Method, of_recipe, parse_method
from flashomni.lab.generation import Generation
from flashomni.models import find_adapter

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
RECIPE = "recipe"
MEASURED = {"tiny-image": "measured, picture", "tiny-video": "measured, video"}
CALIBRATED = ", calibrated"
SHARE = 0.45  # of the seconds, for pictures where they have processes of their own
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
    parser.add_argument("--enough", type=float, default=2.0, help="timed seconds of a method")
    parser.add_argument("--jobs", type=int, default=1, help="processes that make pictures")
    parser.add_argument("--ours", nargs="*", default=["balanced"], help="at equal time with peers")
    parser.add_argument("--csv", type=Path, help="where rows are kept")
    parser.add_argument("--equal-time", type=Path, help="where differences are kept")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)  # of one of the jobs
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
    options.recipe = options.recipe or list(recipes_of(page))
    if options.part is not None:
        _work_on(options)
        return
    found = {}
    for number, model in enumerate(options.model):
        found[model] = measure(model, number, options)
        if options.csv is not None:
            found[model].save(options.csv, model)
    for model, comparison in found.items():
        print(f"\n{model}, {comparison.seconds:.0f} s\n{comparison}", flush=True)
        equal = at_equal_time(comparison, [_called(name) for name in options.ours])
        for each in equal:
            print(each, flush=True)
        if options.equal_time is not None:
            rows = [Equal.of(each, model, comparison) for each in equal]
            results.replace(options.equal_time, rows, ("model", "method", "line", "device"))


def measure(model: str, number: int, options: argparse.Namespace) -> Comparison:
    """Every method on one model: as far as the time goes, the most important first."""
    start = time.perf_counter()

    def mine(values: list[Any] | None) -> Any:
        return None if not values else values[min(number, len(values) - 1)]

    limit, looked = mine(options.seconds), None
    folder = tempfile.TemporaryDirectory()
    running = started(model, options, mine, Path(folder.name)) if options.jobs > 1 else []
    loaded = zoo.load(model, options.device)

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
    methods += made(options.recipe, loaded, call, options.steps, model)
    if running:
        looked = joined(running)
        seen = {picture.method for each in looked for picture in each.pictures}
        methods = [method for method in methods if method.name in seen]
    spent = time.perf_counter() - start
    found = compare(
        loaded.pipe,
        methods,
        prompts,
        seeds=range(options.seeds),
        call=call,
        steps=options.steps,
        batch=mine(options.batch),
        rounds=0 if options.part else options.rounds,
        pictures=looked is None,
        enough=options.enough,
        timed=timed,
        seconds=None if limit is None else max(limit - spent, 1.0),
        on_method=tell,
    )
    return found if looked is None else Comparison.merged(looked, found)


Hand = list[tuple[str, str]]  # kind and name of methods
Job = tuple[Path, Hand, "subprocess.Popen[bytes]"]


def started(model: str, options: argparse.Namespace, mine: Any, folder: Path) -> list[Job]:
    """Processes that make the pictures of all methods.

    Methods that decide by what they see make theirs one by one: they are dealt to processes of
    their own, which need the stock pipeline's pictures one by one as well.
    """
    names = {"peer": list(options.peer), "recipe": list(options.recipe)}
    slow, fast = Hand(), Hand()
    for kind, several in names.items():
        for name in several:
            (slow if _alone(name, kind) else fast).append((kind, name))
    jobs = min(options.jobs, len(slow) + len(fast))
    few = min(max(round(jobs * 0.4), 1), len(slow), jobs - 1) if fast else jobs
    hands = [slow[i::few] for i in range(few)]
    hands += [fast[i :: jobs - few] for i in range(jobs - few)]
    limit = mine(options.seconds)
    running = []
    for number, hand in enumerate(hands):
        part = folder / f"{number}.json"
        chosen = {kind: [name for of, name in hand if of == kind] for kind in names}
        seconds = None if limit is None else [SHARE * limit]
        said = {**vars(options), **chosen, "model": [model], "jobs": 1, "seconds": seconds}
        said |= {"count": [mine(options.count)], "batch": [mine(options.batch)]}
        part.write_text(json.dumps(said, default=str), "utf-8")
        command = [sys.executable, __file__, "--part", str(part)]
        threads = max((os.cpu_count() or 1) // jobs, 1)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        running.append((part, hand, subprocess.Popen(command, env=environment)))
    return running


def joined(running: list[Job]) -> list[Comparison]:
    """What the processes found."""
    found = []
    for part, hand, process in running:
        process.wait()
        if process.returncode:
            print(f"job {part.stem} ended with {process.returncode}", flush=True)
            found.append(Comparison((), (), tuple(_called(name) for _, name in hand)))
            continue
        told = json.loads(part.with_suffix(".out").read_text("utf-8"))
        pictures = tuple(Picture(**each) for each in told["pictures"])
        found.append(Comparison((), pictures, tuple(told["left_out"]), told["seconds"]))
    return found


def _work_on(options: argparse.Namespace) -> None:
    """One of the processes: what its file says, and the pictures beside it."""
    part = options.part
    for key, value in json.loads(part.read_text("utf-8")).items():
        setattr(options, key, value)
    options.part, options.timed = part, "float32"
    found = measure(options.model[0], 0, options)
    told = {
        "pictures": [asdict(picture) for picture in found.pictures],
        "left_out": found.left_out,
        "seconds": found.seconds,
    }
    part.with_suffix(".out").write_text(json.dumps(told), "utf-8")


def _alone(name: str, kind: str) -> bool:
    """Whether a method decides by what it sees, so that its pictures are made one by one."""
    try:
        if kind == "peer":
            return parse_method(name).alone
        return of_recipe(name, Recipe.of(name.removesuffix(CALIBRATED))).alone
    except NotImplementedError:
        return False


def _called(name: str) -> str:
    """A recipe's name in tables: of a file its stem."""
    return Path(name).stem if name.endswith(".json") else name


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
    return [of_recipe(_called(name), recipe) for name, recipe in recipes.items()]


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
