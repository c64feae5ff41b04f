"""Sparse attention: what order, summaries, choice and carry buy, against attention spent.

``python studies/sparse.py --device cuda --seconds 280`` goes on where it was stopped; the page says
how many pairs of prompt and seed are complete. ``--write`` makes the page of what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import _sparse_long
import torch
from _paired import Measured, Runner, Table, pairs, read
from _sparse_page import write
from _study import OUT, ROOT, Point, Study
from _symbols import agreement
from rich.progress import Progress

from flashomni.lab import split, zoo

MODELS = ("tiny-image", "tiny-video")
LONGEST = "tiny-video@352x352"
DENSITIES = (0.5, 0.35, 0.25, 0.125)
# Every step is computed, the first four dense.
STEPS = "interval=1,warmup=0,in_computed=true,dense_steps=4"
TOP = "topk:q_density=1,diagonal=true,text_rows=true,kv_density={}," + STEPS
EACH, ONCE, CARRIED = ",choose_at=computed", ",choose_at=[4]", ",choose_at=[3]"
ORDER, SUMMARIES, FINE = ",token_order=hilbert", ",summaries=4", ",resolution=8"
CARRY = ",carry=extrapolate,refresh={}"
BEST = ORDER + SUMMARIES + FINE + CARRIED + CARRY
FULLY = ",extrapolation=1"
# Rungs of the ladder: each adds one thing to the one above.
LADDER = {
    "today": EACH,
    "+ order": ORDER + EACH,
    "+ 4 summaries": ORDER + SUMMARIES + EACH,
    "+ choice of 8 tokens": ORDER + SUMMARIES + FINE + EACH,
    "+ chosen once": ORDER + SUMMARIES + FINE + ONCE,
    "+ carry, refresh 8": BEST.format(8),
    "+ carry, refresh 4": BEST.format(4),
    **{f"+ extrapolated in full, refresh {r}": BEST.format(r) + FULLY for r in (4, 5, 9)},
}
AMOUNTS = {
    "today": DENSITIES,
    "+ carry, refresh 4": (*DENSITIES, 0.22, 0.09),
    "+ carry, refresh 8": (0.5, 0.25, 0.125, 0.09),
    "+ extrapolated in full, refresh 4": (0.25, 0.22, 0.125, 0.09),
    "+ extrapolated in full, refresh 5": (0.19,),
    "+ extrapolated in full, refresh 9": (0.125, 0.09),
}
# At lengths where every generation takes its time: what is worth it there.
LONG_AMOUNTS = {
    "today": (0.5, 0.25),
    "+ carry, refresh 4": (0.25, 0.125),
    "+ carry, refresh 8": (0.25, 0.125, 0.09),
    "+ extrapolated in full, refresh 4": (0.25, 0.125),
}
# One thing changed, at density 0.25.
ASIDE = {
    "tile order": ",token_order=tile" + SUMMARIES + FINE + EACH,
    "1 summary": ORDER + ",summaries=1" + FINE + EACH,
    "16 summaries": ORDER + ",summaries=16" + FINE + EACH,
    "choice of 32 tokens": ORDER + SUMMARIES + ",resolution=32" + EACH,
    "carried once": BEST.format(0),
    "carry, held, refresh 4": BEST.format(4).replace("extrapolate", "hold"),
    "carry without summaries": ORDER + FINE + CARRIED + CARRY.format(4),
    "carry alone, raster": CARRIED + CARRY.format(4),
    "control: chosen again at step 14": BEST.format(4).replace("[3]", "[3,14]"),
}
# Published rules with five thresholds each and the same dense steps, in our order, and with our
# carry too: at lengths where attention is most of the time. SpargeAttn's gate on similar tokens is
# open: with it nearly every query block visits everything here, whatever the mass.
RULES = {
    "spargeattn": ("spargeattn:mass={},similarity_gate=-1," + STEPS, (0.3, 0.5, 0.65, 0.8, 0.9)),
    "radial": ("radial:width={}," + STEPS, (0.05, 0.1, 0.2, 0.4, 0.8)),
    "window": ("window:reach={}," + STEPS, (0.02, 0.05, 0.1, 0.15, 0.25)),
}
OURS = ORDER + EACH
OURS_CARRIED = ORDER + CARRIED + CARRY.format(4)
RAMP = "taylorseer:forecast=hermite,layer_order=2,computed={}"
CACHED = "topk:q_density=1,diagonal=true,text_rows=true,kv_density={},degrade_below=1,computed={}"
CACHED += ",forecast=hermite,layer_order=2,in_computed=true,dense_steps=1,choose_at=[0]"
CACHED += ORDER + SUMMARIES + FINE
RAMPS = (7, 9, 11, 13, 17)
# Density, refresh, and what else: "in full" where D is extrapolated so.
ON_RAMPS = dict.fromkeys((11, 13, 17), ((0.25, 3), (0.125, 3), (0.25, 2), (0.25, 3, FULLY)))
LONG_RAMPS = (7, 8, 9, 10, 11, 13, 17)
ON_LONG_RAMPS = {
    9: ((0.25, 3), (0.25, 3, FULLY)),
    11: ((0.25, 3), (0.125, 3), (0.25, 3, FULLY), (0.25, 4, FULLY)),
    13: ((0.25, 3), (0.25, 2), (0.25, 3, FULLY), (0.25, 4, FULLY)),
    17: ((0.25, 3), (0.125, 3)),
}
# What else a preset for long videos may do: of 11 steps, density 0.25, a refresh every third step.
TRIED = {
    "no summaries": (",summaries=4", ""),
    "1 summary": (",summaries=4", ",summaries=1"),
    "from the second step": ("dense_steps=1,choose_at=[0]", "dense_steps=2,choose_at=[1]"),
    "from the third step": ("dense_steps=1,choose_at=[0]", "dense_steps=3,choose_at=[2]"),
    "D held": ("extrapolate", "hold"),
    "float8": ("extrapolate", "extrapolate,history_dtype=float8"),
}


def points(model: str) -> Iterator[Point]:
    """All of one model."""
    long = "@" in model
    for series, rest in LADDER.items():
        amounts = LONG_AMOUNTS.get(series, ()) if long else AMOUNTS.get(series, DENSITIES[::2])
        for density in amounts:
            yield Point(series, None, TOP.format(density) + rest, model)
    for series, rest in () if long else ASIDE.items():
        yield Point(series, None, TOP.format(0.25) + rest, model)
    for ramp in LONG_RAMPS if long else RAMPS:
        yield Point("caching", None, forecast(RAMP.format(ramp), long), model)
        for density, refresh, *rest in (ON_LONG_RAMPS if long else ON_RAMPS).get(ramp, ()):
            series = f"caching + sparse {density:g}, refresh {refresh}" + ", in full" * len(rest)
            method = CACHED.format(density, ramp) + CARRY.format(refresh) + "".join(rest)
            yield Point(series, None, forecast(method, long), model)
    if long:
        usual = forecast(CACHED.format(0.25, 11), long) + CARRY.format(3) + FULLY
        for series, change in TRIED.items():
            yield Point(f"tried: {series}", None, usual.replace(*change), model)
        yield from rules(model)


def forecast(method: str, long: bool) -> str:
    """Long clips are forecast as by the presets; others as when they were measured."""
    return method.replace("=hermite", "=quadrature") if long else method


def chosen(points: Iterable[Point], series: str, only: str) -> list[Point]:
    """Those of some series whose method matches; today's way with what is compared with it."""
    wanted = series.split(";") if series else []
    on_ramps = wanted and all(name.startswith(("caching", "tried")) for name in wanted)
    return [
        point for point in points
        if (point.series == "today" and not on_ramps)
        or ((not wanted or point.series in wanted) and re.search(only, point.method))
    ]  # fmt: skip


FEW_TOP = TOP.replace("dense_steps=4", "dense_steps=2") + ORDER + SUMMARIES + FINE


def few(model: str) -> Iterator[Point]:
    """For a generation of few steps (8), of which two are dense: sparse attention or caching."""
    for density in DENSITIES[::2]:
        today = TOP.format(density).replace("dense_steps=4", "dense_steps=2") + EACH
        yield Point("today", None, today, model)
    for refresh in (2, 3):
        for density in (0.5, 0.25, 0.125):
            method = FEW_TOP.format(density) + ",choose_at=[1]" + CARRY.format(refresh)
            yield Point(f"+ carry, refresh {refresh}", None, method, model)
            full = f"+ extrapolated in full, refresh {refresh}"
            yield Point(full, None, method + FULLY, model)
    for computed in (5, 6, 7):
        yield Point("caching", None, RAMP.format(f"{computed},of=8"), model)


def rules(model: str) -> Iterator[Point]:
    """Published ones: every threshold in our order, some of them with our carry."""
    for rule, (method, thresholds) in RULES.items():
        if rule == "radial" and model.startswith("tiny-image"):
            continue  # a picture is one frame, which radial sees whole
        for threshold in thresholds:
            yield Point(f"{rule}, our order", None, method.format(threshold) + OURS, model)
        for threshold in thresholds[1::2]:
            series = f"{rule}, our order and carry"
            yield Point(series, None, method.format(threshold) + OURS_CARRIED, model)
        for threshold in thresholds[1::2] if "@" in model else ():
            rarely = ORDER + CARRIED + CARRY.format(8)
            series = f"{rule}, our order and carry, refresh 8"
            yield Point(series, None, method.format(threshold) + rarely, model)


STUDY = Study(
    name="sparse",
    title="Sparse attention against attention spent",
    question=(
        "Attention is left out in every step but the first four, and nothing is cached: how far is "
        "the result from the stock pipeline's, for the attention that was spent? *Spent* is what "
        "was computed over the whole generation, of dense: visited pairs, summaries, refreshes and "
        "dense steps, as the report counts it. Prompts 16 to 39 of each model, fp32; means over "
        "pairs of prompt and seed, differences on the same pairs."
    ),
    x_label="attention spent, of dense",
    points=[point for model in MODELS for point in points(model)],
)


TIMED = {
    "name": "sparse_time",
    "title": "Sparse attention against time",
    "question": (
        "The methods of [the study of attention spent](sparse.md) against the measured time of a "
        "generation without its decoder: the median of three behind two that compile and record, "
        "of the stock pipeline's, one after the other in one process. Take them with care: of such "
        "a small model the host is a large part."
    ),
    "x_label": "time of a generation, of dense",
}


SECOND = "tiny-wan"
WAN = {
    "name": "sparse_wan",
    "title": "Sparse attention on a second model",
    "question": (
        "The methods of [the study of attention spent](sparse.md) on tiny-wan, of Wan's kind: text "
        "in cross attention, attention over the clip alone, which has 17,408 tokens at 256 x 256. "
        "bf16, prompts 16 to 39."
    ),
}


FEW = {
    "name": "sparse_few",
    "title": "Sparse attention in few steps",
    "question": (
        "Generations of 8 steps, as distilled models make them, of which the first two have dense "
        "attention: sparse attention in the others, or whole-layer caching. (These models are not "
        "distilled: what is compared is the distance to their own 8 dense steps.)"
    ),
}


@dataclass(frozen=True)
class Options:
    """The command line."""

    device: str
    models: tuple[str, ...]
    prompts: int
    seeds: tuple[int, ...]
    steps: int | None
    seconds: float
    work: Path
    dtype: torch.dtype = torch.float32
    timed: int = 0
    share: tuple[int, int] = (0, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=f"{STUDY.title}. {STUDY.question}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default=",".join(MODELS), help="NAME, or NAME@HxW")
    parser.add_argument("--prompts", type=int, default=24, help="of the split's part report")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=None, help="denoising steps")
    parser.add_argument("--seconds", type=float, default=math.inf, help="nothing begins later")
    parser.add_argument("--series", default="", help="only these, and today's way; apart by ;")
    parser.add_argument("--only", default="", help="a pattern: methods, but today's, that match")
    parser.add_argument("--long", action="store_true", help="write the page of caching at 33K")
    parser.add_argument("--few", action="store_true", help="8 steps, a page of its own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--timed", type=int, default=0, metavar="PAIRS",
                        help="cost is time, of so many pairs; a page of its own")  # fmt: skip
    parser.add_argument("--write", action="store_true", help="the page of what is measured already")
    parser.add_argument("--share", default="0/1", help="I/N: every N-th pair, from I; no page")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, help="of measurements; by default one for each page")
    args = parser.parse_args(arguments)
    steps = 8 if args.few else args.steps
    if args.long:
        return _write_long(args.work or ROOT / "eval" / "studies" / TIMED["name"], args.out)
    second = all(model.startswith(SECOND) for model in args.models.split(","))
    other = TIMED if args.timed else FEW if args.few else WAN if second else {}
    study = dataclasses.replace(STUDY, **other)
    work = args.work or ROOT / "eval" / "studies" / study.name
    options = Options(
        args.device, tuple(args.models.split(",")), args.prompts, tuple(range(args.seeds)),
        steps, 0.0 if args.write else args.seconds, work, getattr(torch, args.dtype),
        args.timed, _share(args.share),
    )  # fmt: skip
    asked = {
        model: chosen((few if args.few else points)(model), args.series, args.only)
        for model in options.models
    }
    run(options, asked)
    known = measured_of(options)
    found = tables(known, asked, bool(options.timed))
    whole, asked = asked, {m: reached(some, found[m]) for m, some in asked.items()}
    if options.share != (0, 1):
        return  # whoever started them writes the page when all are done
    command = ["python", "studies/sparse.py", *(sys.argv[1:] if arguments is None else arguments)]
    every = [point for some in asked.values() for point in some]
    untimed = [
        point for model, some in whole.items() for point in some
        if args.timed and point not in every and found[model].pairs(point.method)
    ]  # fmt: skip
    write(study, every, found, options.work, args.out, " ".join(command), untimed)


def _write_long(work: Path, out: Path) -> None:
    """The page of what caching and sparse attention do to long clips, by a large model's time."""
    found = [
        e for e in read(work / "measured.jsonl") if (e.model, e.dtype) == (LONGEST, "bfloat16")
    ]
    table = Table(found)
    some = [
        point for point in points(LONGEST)
        if point.series.startswith(("caching", "tried")) and len(table.pairs(point.method)) > 1
    ]  # fmt: skip
    _sparse_long.write(some, table, out, "python studies/sparse.py --long")


def run(options: Options, asked: dict[str, list[Point]]) -> dict[str, Table]:
    """Measure until the time is over; tables by model."""
    if options.device == "cuda":  # of the process; on a CPU it has other products round, too
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    deadline = time.monotonic() + options.seconds
    with Progress() as progress:
        runner = Runner(options.work, deadline, progress)
        loaded = {}
        order = sorted(
            (place, model)
            for model in options.models
            for place in range(options.prompts * len(options.seeds))
            if place % options.share[1] == options.share[0]
        )
        for place, model in order:
            if runner.over:
                break
            if model not in loaded:
                loaded[model] = load(model, options)
            some = loaded[model]
            prompts = split.pick(model.partition("@")[0], some.prompts, "report", options.prompts)
            todo = list(pairs(prompts, options.seeds))
            if place >= len(todo):
                continue
            methods = [point.method for point in asked[model]]
            drawn = drawings() if place == 0 else ()
            timed = place < options.timed
            runner.pair(model, some, methods, *todo[place], options.steps, timed=timed, drawn=drawn)
            if place == 0:
                agreement(model, some, todo[0], options.work, options.steps, deadline)
    return tables(measured_of(options), asked, bool(options.timed))


def reached(points: Sequence[Point], table: Table) -> list[Point]:
    """Points that there was time for: timed ones, or those on two pairs if any point is."""
    if table.timed:
        return [p for p in points if table.column(p.method, lambda m: m.time)]
    counts = {p.method: len(table.pairs(p.method)) for p in points}
    least = min(2, max(counts.values(), default=0)) or 1
    return [p for p in points if counts[p.method] >= least]


def measured_of(options: Options) -> list[Measured]:
    """What is known in this dtype."""
    kind = str(options.dtype).removeprefix("torch.")
    return [e for e in read(options.work / "measured.jsonl") if e.dtype == kind]


def _share(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--share must be I/N with 0 <= I < N, got {text!r}")
    return int(index), int(count)


def load(model: str, options: Options) -> zoo.Loaded:
    """A model, whose pictures have the size that its name may say."""
    name, _, size = model.partition("@")
    loaded = zoo.load(name, options.device, options.dtype)
    if not size:
        return loaded
    height, width = map(int, size.split("x"))
    return dataclasses.replace(loaded, call={**loaded.call, "height": height, "width": width})


def drawings() -> list[str]:
    """Methods whose pictures are shown, at a density of 0.25."""
    return [TOP.format(0.25) + LADDER[name] for name in ("today", "+ order", "+ carry, refresh 4")]


def tables(
    found: Sequence[Measured], asked: dict[str, list[Point]], timed: bool
) -> dict[str, Table]:
    """Of each model: of the device and the steps that were measured last."""
    result = {}
    for model in asked:
        mine = [each for each in found if each.model == model]
        last = [e for e in mine if (e.device, e.steps) == (mine[-1].device, mine[-1].steps)]
        result[model] = Table(last, timed)
    return result


if __name__ == "__main__":
    main()
