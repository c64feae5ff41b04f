"""The measured columns of docs/methods.md: each method's recipe against the stock pipeline.

``python tools/methods.py --csv docs/results/methods.csv`` runs what the column "recipe" names, on
the ``report`` prompts of the models, and peers beside them; ``--write`` puts the CSV's figures into
the page: PSNR to the dense picture (mean and its standard error over prompts, worst), computed
steps, FLOPs skipped, speed-up against the median of the CSV's times of the stock pipeline. A recipe
with ", calibrated" behind it gets the magnitude ratios or the polynomial that one dense run of a
``tune`` prompt gives; they are printed. Rows that no run has keep what they hold.

``--jobs N`` looks at pictures in N processes, each of its share of the prompts, and takes all times
behind that, alone. Rows with a figure that cannot be are named and not written; then it ends with
1. Methods come in the order ``--ours``, peers, others; with ``--missing-first``
recipes without a row in the CSV come before them; ``MODEL@NAME`` is for that model alone.
``--dtype`` is what the stock pipeline and methods both run in. ``--flip`` measures FLIP as well, of
which the CSV has a mean under "measures" and the page a word. ``--ours`` names methods that are
compared with every line of peers at their own measured time, ``--equal-time`` is the CSV of that.
On a CPU ``--in-turn`` times the pictures themselves, prompt by prompt, and ``--seconds`` ends it
behind one; ``--processor-time`` does not count the work of others. There several processes, each on
cores of its own, can take parts of the prompts (``--part 0/4 --pictures 0.json``), whose pictures
``--together 0.json ... --csv FILE`` puts together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rows.page import MEASURED, cells_of, filled, recipes_of
from rows.ready import Listed, Ready
from rows.workers import Asked, Workers

from flashomni.lab import results, zoo
from flashomni.lab.fidelity.compare import compare, processor_time
from flashomni.lab.fidelity.comparison import Comparison, Picture, Summed
from flashomni.lab.fidelity.equal_time import Equal, at_equal_time
from flashomni.lab.fidelity.impossible import impossible
from flashomni.util.files import write_text

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
AT_ONCE = 8  # methods timed between two states of the CSV, if not in turn
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
    parser.add_argument("--share", type=float, default=0.55, help="of the seconds, for pictures")
    parser.add_argument("--enough", type=float, default=2.0, help="timed seconds of a method")
    parser.add_argument("--jobs", type=int, default=1, help="processes that make pictures")
    parser.add_argument("--ours", nargs="*", default=["balanced"], help="at equal time with peers")
    parser.add_argument("--missing-first", action="store_true", help="before all that has a row")
    parser.add_argument(
        "--guided", action="store_true", help="two calls a step: the page's CFG rows"
    )
    parser.add_argument(
        "--flip", action="store_true", help="beside PSNR and SSIM; of each frame, on the CPU"
    )
    parser.add_argument("--in-turn", action="store_true", help="time pictures, all methods on each")
    parser.add_argument("--processor-time", action="store_true", help="a clock of a busy machine")
    parser.add_argument("--part", help="I/N: of the prompts; with --in-turn")
    parser.add_argument("--pictures", type=Path, help="where each picture's figures are kept")
    parser.add_argument("--together", type=Path, nargs="+", help="such files; nothing is run")
    parser.add_argument("--csv", type=Path, help="where rows are kept")
    parser.add_argument("--equal-time", type=Path, help="where differences are kept")
    parser.add_argument("--write", action="store_true", help=f"from the CSV into {PAGE.name}")
    options = parser.parse_args()

    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")  # stock and methods alike
    page = PAGE.read_text("utf-8")
    if options.write:
        if options.csv is None:
            parser.error("--write needs --csv")
        PAGE.write_text(filled(page, cells_of(sound(results.read(options.csv, Summed)))), "utf-8")
        return
    found: list[Comparison] = []
    if options.together:
        for model, comparison in together(options.together).items():
            if options.csv is not None:
                comparison.save(options.csv, model)
            tell_equal(model, comparison, options)
            found.append(comparison)
        sys.exit(any(each.impossible for each in found))
    options.recipe = options.recipe or list(recipes_of(page, options.guided))
    with Workers(options.jobs, options) if options.jobs > 1 else nullcontext() as workers:
        for number, model in enumerate(options.model):
            comparison = measure(model, number, options, workers)
            tell_equal(model, comparison, options)
            found.append(comparison)
            if options.pictures is not None:
                keep(options.pictures, model, comparison)
    sys.exit(any(each.impossible for each in found))


def sound(rows: list[results.Cells]) -> list[results.Cells]:
    """The rows of a CSV.

    Raises:
        ValueError: one has a figure that cannot be.
    """
    for row in rows:
        for words in impossible(SimpleNamespace(**row)):
            raise ValueError(f"{row['model']}, {row['method']}: {words}")
    return rows


def tell_equal(model: str, comparison: Comparison, options: argparse.Namespace) -> None:
    """Print a comparison, and ours against each line of peers at equal time."""
    print(f"\n{model}, {comparison.seconds:.0f} s\n{comparison}", flush=True)
    equal = at_equal_time(comparison, [Listed("", name).called for name in options.ours])
    for each in equal:
        print(each, flush=True)
    if options.equal_time is not None:
        rows = [Equal.of(each, model, comparison) for each in equal]
        results.replace(options.equal_time, rows, ("model", "method", "line", "device"))


def keep(path: Path, model: str, comparison: Comparison) -> None:
    """Write each picture's figures, JSON."""
    content = {
        "model": model,
        "device": comparison.rows[0].device,
        "seconds": comparison.seconds,
        "families": {row.method: row.family for row in comparison.rows},
        "pictures": [asdict(picture) for picture in comparison.pictures],
    }
    write_text(path, json.dumps(content) + "\n")


def together(paths: Iterable[Path]) -> dict[str, Comparison]:
    """Parts of comparisons that :func:`keep` wrote, by model; each picture was timed."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        part = json.loads(path.read_text("utf-8"))
        parts.setdefault(part["model"], []).append(part)
    return {
        model: Comparison.of_timed(
            [Picture(**picture) for part in some for picture in part["pictures"]],
            some[0]["families"],
            some[0]["device"],
            max(part["seconds"] for part in some),
        )
        for model, some in parts.items()
    }


def measure(
    model: str, number: int, options: argparse.Namespace, workers: Workers | None
) -> Comparison:
    """Every method on one model: as far as the time goes, the most important first."""
    start, now = time.perf_counter(), time.time()

    def mine(values: list[Any] | None) -> Any:
        return None if not values else values[min(number, len(values) - 1)]

    limit, count, batch = mine(options.seconds), mine(options.count), mine(options.batch)
    ready = Ready.of(model, options, count)
    first, every = map(int, (options.part or "0/1").split("/"))
    ready = ready._replace(prompts=ready.prompts[first::every])
    listed = ready.calibrated(by_importance(options, model))
    timed = None
    if options.timed not in (None, options.dtype):
        timed = zoo.load(model, options.device, getattr(torch, options.timed)).pipe

    def tell(name: str, done: int, total: int) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {model} {done}/{total} {name}", flush=True)

    looked = None
    if workers is not None:
        until = float("inf") if limit is None else now + options.share * limit
        asked = Asked(model, count, batch, listed, 0, until)
        shares = min(workers.jobs, count)
        looked = workers.looked(asked, lambda name, done: tell(f"{name}, pictures", done, shares))
        listed = [each for each in listed if each.called not in looked.left_out]
    parts: list[Comparison] = []
    found = looked or Comparison((), ())
    while listed:
        spent = time.perf_counter() - start
        if limit is not None and spent > limit:
            left_out = tuple(each.called for each in listed)
            return replace(found, left_out=found.left_out + left_out)
        at_once = len(listed) if options.in_turn else AT_ONCE
        some, listed = listed[:at_once], listed[at_once:]
        methods = [method for each in some if (method := ready.method(each)) is not None]
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
                in_turn=options.in_turn,
                measures={"flip": ""} if options.flip else None,
                clock=processor_time if options.processor_time else time.perf_counter,
                on_method=tell,
            )
        )
        found = _together(parts)
        found = found if looked is None else Comparison.merged([looked], found)
        if options.part is not None:  # numbers of prompts are those of the whole
            pictures = (replace(p, prompt=p.prompt * every + first) for p in found.pictures)
            found = replace(found, pictures=tuple(pictures))
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


def by_importance(options: argparse.Namespace, model: str) -> list[Listed]:
    """Ours that are compared with peers, peers, the others; what has no row yet before them."""
    recipes = [Listed("recipe", name) for name in of_model(options.recipe, model)]
    ours = [each for each in recipes if each.called in options.ours]
    peers = [Listed("peer", name) for name in of_model(options.peer, model)]
    order = ours + peers + [each for each in recipes if each not in ours]
    if not options.missing_first or options.csv is None:
        return order
    rows = results.read(options.csv, Summed)
    known = {row["method"] for row in rows if row["model"] == model}
    new = [each for each in recipes if each.called not in known]
    return new + [each for each in order if each not in new]


def of_model(names: Iterable[str], model: str) -> list[str]:
    """Names for every model, and those that ``MODEL@`` in front keeps for this one."""
    split = [name.rpartition("@") for name in names]
    return [name for only, _, name in split if only in ("", model)]


if __name__ == "__main__":
    main()
