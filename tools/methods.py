"""The measured columns of docs/methods.md: each method's recipe against the stock pipeline.

``python tools/methods.py --csv docs/results/methods.csv`` runs what the column "recipe" names, on
the ``report`` prompts of the models, and peers beside them; ``--write`` puts the CSV's figures into
the page: PSNR to the dense picture (mean and its standard error over prompts, worst), computed
steps, FLOPs skipped, speed-up against the median of the CSV's times of the stock pipeline. A recipe
with ", calibrated" behind it gets the magnitude ratios or the polynomial that one dense run of a
``tune`` prompt gives; they are printed. Rows that no run has keep what they hold.

``--jobs N`` looks at pictures in N processes, which share a card whose kernels are too short to
fill it and take methods from one list, the most important first (``--ours``, then peers), and takes
all times behind that, alone. ``--dtype`` is what the stock pipeline and methods both run in.
``--ours`` names methods that are compared with every line of peers at their own measured time,
``--equal-time`` is the CSV of that.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from flashomni.engine import Recipe
from flashomni.lab import results, split, zoo
from flashomni.lab.fidelity.calibrate import calibrate
from flashomni.lab.fidelity.compare import compare
from flashomni.lab.fidelity.comparison import Comparison, Picture, Summed
from flashomni.lab.fidelity.equal_time import Equal, at_equal_time
from flashomni.lab.fidelity.methods import Method, of_recipe, parse_method
from flashomni.lab.generation import Generation

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
RECIPE = "recipe"
MEASURED = {"tiny-image": "measured, picture", "tiny-video": "measured, video"}
CALIBRATED = ", calibrated"
SHARE = 0.5  # of the seconds, for pictures where they have processes of their own
GRACE = 12.0  # seconds that a process has for the method that it is at
AT_ONCE = 8  # methods timed between two states of the CSV
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
    parser.add_argument("--dtype", default="float32", help="of pictures, stock and methods alike")
    parser.add_argument("--timed", help="dtype of what is timed; that of pictures by default")
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
    if options.part is not None:
        _work_on(options.part)
        return
    page = PAGE.read_text("utf-8")
    if options.write:
        if options.csv is None:
            parser.error("--write needs --csv")
        PAGE.write_text(filled(page, cells_of(results.read(options.csv, Summed))), "utf-8")
        return
    options.recipe = options.recipe or list(recipes_of(page))
    found = {model: measure(model, n, options) for n, model in enumerate(options.model)}
    for model, comparison in found.items():
        print(f"\n{model}, {comparison.seconds:.0f} s\n{comparison}", flush=True)
        equal = at_equal_time(comparison, [_called(name) for name in options.ours])
        for each in equal:
            print(each, flush=True)
        if options.equal_time is not None:
            rows = [Equal.of(each, model, comparison) for each in equal]
            results.replace(options.equal_time, rows, ("model", "method", "line", "device"))


class Ready(NamedTuple):
    """A model and what is asked of it."""

    model: str
    loaded: zoo.Loaded
    prompts: list[str]
    call: dict[str, Any]
    steps: int | None

    @classmethod
    def of(cls, model: str, options: argparse.Namespace, count: int) -> Ready:
        """Load it."""
        loaded = zoo.load(model, options.device, getattr(torch, options.dtype))
        change = {} if options.size is None else dict.fromkeys(("height", "width"), options.size)
        prompts = split.pick(model, loaded.prompts, "report", count)
        return cls(model, loaded, prompts, {**loaded.call, **change}, options.steps)

    def method(self, kind: str, name: str) -> Method | None:
        """A method, calibrated where it says so; one that cannot run here says why."""
        try:
            if kind == "peer":
                return parse_method(name)
            return made([name], self.loaded, self.call, self.steps, self.model)[0]
        except NotImplementedError as error:
            print(f"{name}: {error}", flush=True)
            return None


def measure(model: str, number: int, options: argparse.Namespace) -> Comparison:
    """Every method on one model: as far as the time goes, the most important first."""
    start = time.perf_counter()

    def mine(values: list[Any] | None) -> Any:
        return None if not values else values[min(number, len(values) - 1)]

    limit, count, batch = mine(options.seconds), mine(options.count), mine(options.batch)
    listed = _by_importance(options)
    with tempfile.TemporaryDirectory() as name:
        folder, running, looked = Path(name), [], None
        if options.jobs > 1:
            running = started(folder, model, listed, options, (limit, count, batch))
        ready = Ready.of(model, options, count)
        timed = None
        if options.timed not in (None, options.dtype):
            timed = zoo.load(model, options.device, getattr(torch, options.timed)).pipe
        if running:
            until = None if limit is None else start + SHARE * limit + GRACE
            looked = joined(folder, running, listed, until)
            listed = [each for each in listed if _called(each[1]) not in looked.left_out]

    def tell(name: str, done: int, total: int) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {model} {done}/{total} {name}", flush=True)

    parts: list[Comparison] = []
    found = looked or Comparison((), ())
    while listed:
        spent = time.perf_counter() - start
        if limit is not None and spent > limit:
            left_out = tuple(_called(name) for _, name in listed)
            return replace(found, left_out=found.left_out + left_out)
        some, listed = listed[:AT_ONCE], listed[AT_ONCE:]
        methods = [method for each in some if (method := ready.method(*each)) is not None]
        if not methods:
            continue
        parts.append(
            compare(
                ready.loaded.pipe,
                methods,
                ready.prompts,
                seeds=range(options.seeds),
                call=ready.call,
                steps=options.steps,
                batch=batch,
                rounds=options.rounds,
                pictures=looked is None,
                enough=options.enough,
                timed=timed,
                seconds=None if limit is None else max(limit - spent, 0.0),
                on_method=tell,
            )
        )
        found = _together(parts)
        found = found if looked is None else Comparison.merged([looked], found)
        if options.csv is not None:
            found.save(options.csv, model)
    return found


def _together(parts: list[Comparison]) -> Comparison:
    """Comparisons of other methods on the same pipeline, as one."""
    return Comparison(
        sum((each.rows for each in parts), ()),
        sum((each.pictures for each in parts), ()),
        sum((each.left_out for each in parts), ()),
        sum(each.seconds for each in parts),
    )


Listed = list[tuple[str, str]]  # kind and name of methods


def _by_importance(options: argparse.Namespace) -> Listed:
    """Ours that are compared with peers, peers, and then the others."""
    recipes = [("recipe", name) for name in options.recipe]
    ours = [each for each in recipes if _called(each[1]) in options.ours]
    peers = [("peer", name) for name in options.peer]
    return ours + peers + [each for each in recipes if each not in ours]


def started(
    folder: Path, model: str, listed: Listed, options: argparse.Namespace, mine: tuple
) -> list[subprocess.Popen[bytes]]:
    """Processes that make the pictures of all methods, each of the next one that none has taken.

    Methods that decide by what they see make theirs one by one, and need the stock pipeline's one
    by one as well: they are the work of some of the processes, which help the others behind that.
    """
    slow = [place for place, (kind, name) in enumerate(listed) if _alone(name, kind)]
    fast = [place for place in range(len(listed)) if place not in slow]
    few = min(max(round(options.jobs * 0.4), 1), len(slow))
    threads = max((os.cpu_count() or 1) // options.jobs, 1)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running = []
    for number in range(options.jobs):
        order = slow + fast if number < few else fast
        part = folder / f"job-{number}.json"
        said = {**vars(options), "listed": listed, "order": order, "model": model, "mine": mine}
        part.write_text(json.dumps(said, default=str), "utf-8")
        command = [sys.executable, __file__, "--part", str(part)]
        running.append(subprocess.Popen(command, env=environment))
    return running


def _work_on(part: Path) -> None:
    """One of the processes: methods that no other has taken, until the time is up."""
    start = time.perf_counter()
    options = argparse.Namespace(**json.loads(part.read_text("utf-8")))
    limit, count, batch = options.mine
    ready, references = Ready.of(options.model, options, count), {}
    for place in options.order:
        if limit is not None and time.perf_counter() - start > SHARE * limit:
            break
        try:
            (part.parent / f"{place}.taken").touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            method = ready.method(*options.listed[place])
            if method is None:
                continue
            found = compare(
                ready.loaded.pipe,
                [method],
                ready.prompts,
                seeds=range(options.seeds),
                call=ready.call,
                steps=options.steps,
                batch=batch,
                rounds=0,
                references=references,
            )
        except Exception:  # one that fails must not take the others with it; its row is missing
            print(f"{options.listed[place][1]} failed", flush=True)
            traceback.print_exc()
            continue
        told = part.parent / f"{place}.part"
        told.write_text(json.dumps([asdict(picture) for picture in found.pictures]), "utf-8")
        told.rename(told.with_suffix(".found"))  # whole, or not there


def joined(
    folder: Path, running: list[subprocess.Popen[bytes]], listed: Listed, until: float | None
) -> Comparison:
    """What the processes found; those that are late are ended."""
    start = time.perf_counter()
    for process in running:
        try:
            process.wait(None if until is None else max(until - time.perf_counter(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    found: list[Picture] = []
    left_out = []
    for place, (_, name) in enumerate(listed):
        told = folder / f"{place}.found"
        if told.exists():
            found += [Picture(**each) for each in json.loads(told.read_text("utf-8"))]
        else:
            left_out.append(_called(name))
    return Comparison((), tuple(found), tuple(left_out), time.perf_counter() - start)


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


def in_words(row: dict[str, str], dense: float) -> str:
    """A cell of a measured column, of a row of the CSV; the stock pipeline takes ``dense`` s."""
    error = f" ± {float(row['psnr_error']):.1f}" if row["psnr_error"] else ""
    parts = [f"{float(row['psnr_db']):.1f}{error} / {float(row['worst_psnr_db']):.1f} dB"]
    if row["computed"]:
        parts.append(f"{float(row['computed']):.3g} computed")
    if row["flops_skipped"]:
        parts.append(f"{float(row['flops_skipped']):.0%} skipped")
    if row.get("attention_spent"):
        parts.append(f"attention {float(row['attention_spent']):.2f}")
    return ", ".join([*parts, f"{dense / float(row['seconds']):.2f}x"])


def cells_of(rows: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    """Column -> recipe -> cell, of the rows of a CSV; one that is not finite says so."""
    found: dict[str, dict[str, str]] = {column: {} for column in MEASURED.values()}
    dense: dict[str, list[float]] = {}
    for row in rows:
        dense.setdefault(row["model"], []).append(float(row["dense_seconds"]))
    for row in rows:
        if row["model"] in MEASURED:
            usual = statistics.median(dense[row["model"]])  # one alone may have been disturbed
            words = row["psnr_db"] if row["psnr_db"] == "not finite" else in_words(row, usual)
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


if __name__ == "__main__":
    main()
