"""The page, the plot, the pictures and the CSV of the study of sparse attention."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from _paired import Mean, Table, Values, file_name, minus
from _study import COLOURS, Point, Study
from _symbols import shown
from matplotlib.figure import Figure
from PIL import Image

from flashomni.lab import metrics
from flashomni.lab.viz import save_figure
from flashomni.util.files import write_text

LIMITS = {False: (0.55, 0.47, 0.40, 0.38), True: (0.9, 0.8, 0.7, 0.6, 0.5)}  # of time
LINES = ("today", "+ order", "+ 4 summaries", "+ choice of 8 tokens", "+ chosen once",
         "+ carry, refresh 8", "+ carry, refresh 4",
         "+ extrapolated in full, refresh 4")  # fmt: skip
DRAWN = ("stock", "today", "+ order", "+ carry, refresh 4")
RULES = {"spargeattn": "#111827", "window": "#6b7280", "radial": "#a16207"}
STYLES = {
    "": "x:", "our order": "x--", "our order and carry": "x-",
    "our order and carry, refresh 8": "x-.",
}  # fmt: skip
Tables = dict[str, Table]


def write(
    study: Study,
    points: Sequence[Point],
    tables: Tables,
    work: Path,
    out: Path,
    command: str,
    untimed: Sequence[Point] = (),
) -> None:
    """Write everything; the page last.

    Args:
        study: what is asked.
        points: that are shown.
        tables: of all models.
        work: where measurements lie.
        out: of the files.
        command: that the page names.
        untimed: points that a study of times has attention and PSNR of, and no times.
    """
    some = {model: table for model, table in tables.items() if table.methods}
    if not some:
        print("no pair is complete yet: nothing to write")
        return
    asked = [point for point in points if point.model in some]
    save_figure(plot(study, asked, some), out / f"{study.name}.png")
    sheet = pictures(some, work)
    if sheet is not None:
        path = out / f"{study.name}_pictures.webp"
        save_figure(sheet, path)
        Image.open(path).convert("RGB").save(path, quality=85)
    beside = [point for point in untimed if point.model in some]
    write_text(out / f"{study.name}.csv", rows(asked, some) + rows(beside, _by_attention(some), 1))
    made = page(study, asked, some, work, command, sheet is not None, beside)
    write_text(out / f"{study.name}.md", made)


def _of(points: Sequence[Point], model: str, series: str) -> list[str]:
    return [p.method for p in points if (p.model, p.series) == (model, series)]


def _by_attention(tables: Tables) -> Tables:
    return {model: table.by_attention() for model, table in tables.items()}


def rows(points: Sequence[Point], tables: Tables, skipped: int = 0) -> str:
    """CSV: a line for each method of each model, without the first ``skipped`` lines."""
    buffer = io.StringIO()
    writer: csv.DictWriter | None = None
    for point in points:
        table = tables[point.model]
        first = table.row(point.method)
        gain, mean = _gain(points, table, point), Mean.of(table.psnr(point.method))
        values = {
            "model": point.model, "series": point.series, "method": point.method,
            "pairs": mean.count, "prompts": mean.prompts, **_costs(table, point.method),
            **_numbers("psnr_db", mean),
            **_numbers("gain_db", Mean.of(gain)),
            **_numbers("flip", Mean.of(table.column(point.method, lambda m: m.flip)), 5),
            "flops_skipped": round(
                Mean.of(table.column(point.method, lambda m: m.skipped)).value, 4
            ),
            "steps": first.steps, "dtype": first.dtype, "device": first.device,
            "commit": " ".join(sorted(set(table.commits))), "torch": first.torch,
            "diffusers": first.diffusers,
        }  # fmt: skip
        if writer is None:
            writer = csv.DictWriter(buffer, list(values), lineterminator="\n")
            writer.writeheader()
        writer.writerow(values)
    return "".join(buffer.getvalue().splitlines(keepends=True)[skipped:])


def _costs(table: Table, method: str) -> dict[str, float | str]:
    spent = Mean.of(table.column(method, lambda m: m.spent)).value
    time = round(table.cost(method), 4) if table.timed else ""
    return {"spent": round(spent, 4), "time": time}


def _numbers(name: str, mean: Mean, digits: int = 2) -> dict[str, float | str]:
    shown = ["" if math.isnan(x) else round(x, digits) for x in (mean.value, mean.error)]
    return {name: shown[0], f"{name}_se": shown[1]}


def _gain(points: Sequence[Point], table: Table, point: Point) -> Values:
    """Over today's way where it costs as much, pair by pair."""
    today = _of(points, point.model, "today")
    if not today:
        return {}
    return minus(table.psnr(point.method), table.between(today, table.cost(point.method)))


def plot(study: Study, points: Sequence[Point], tables: Tables) -> Figure:
    """PSNR above, FLIP below, against what it costs; a column a model."""
    figure = Figure(figsize=(7.2 * len(tables), 9.0), layout="constrained")
    axes = figure.subplots(2, len(tables), squeeze=False, sharex="col", height_ratios=(3, 2))
    values: list[Callable[[Table, str], float]] = [
        lambda table, method: Mean.of(table.psnr(method)).value,
        lambda table, method: Mean.of(table.column(method, lambda m: m.flip)).value,
    ]
    for column, (model, table) in enumerate(tables.items()):
        for axis, value in zip(axes[:, column], values, strict=True):
            for number, series in enumerate(LINES):
                some = sorted((table.cost(m), value(table, m)) for m in _of(points, model, series))
                if some:
                    axis.plot(*zip(*some, strict=True), "o-", color=COLOURS[number], label=series)
            rules = dict.fromkeys(p.series for p in points if p.series.split(",")[0] in RULES)
            for rule in rules:
                name, _, variant = rule.partition(",")
                some = sorted((table.cost(m), value(table, m)) for m in _of(points, model, rule))
                if some:
                    axis.plot(
                        *zip(*some, strict=True), STYLES[variant.strip()], color=RULES[name],
                        label=rule, alpha=0.7, linewidth=1,
                    )  # fmt: skip
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        top, bottom = axes[:, column]
        top.set(title=model, ylabel="PSNR against dense, dB")
        bottom.set(ylabel="FLIP", xlabel=study.x_label, yscale="log")
        if top.get_legend_handles_labels()[1]:
            top.legend(frameon=False, fontsize=7, ncols=2)
    return figure


def pictures(tables: Tables, work: Path) -> Figure | None:
    """The first pair at a density of 0.25, and where it differs from the stock pipeline's."""
    found = {}
    for model in tables:
        names = ["stock", *range(len(DRAWN) - 1)]
        paths = [next(work.glob(f"{file_name(model)}-{name}.*"), None) for name in names]
        if all(path is not None for path in paths):
            found[model] = [np.array(Image.open(path).convert("RGB")) for path in paths if path]
    if not found:
        return None
    figure = Figure(figsize=(2.6 * len(DRAWN), 5.4 * len(found)), layout="constrained")
    axes = figure.subplots(2 * len(found), len(DRAWN), squeeze=False)
    for line, (model, images) in enumerate(found.items()):
        tensors = [torch.from_numpy(image).permute(2, 0, 1)[None] / 255 for image in images]
        for column, (name, image) in enumerate(zip(DRAWN, images, strict=True)):
            above, below = axes[2 * line, column], axes[2 * line + 1, column]
            above.imshow(image)
            above.set_title(f"{model}: {name}", fontsize=8)
            if column and metrics.why_no_flip() is None:
                seen = metrics.flip_map(tensors[0], tensors[column])[0]
                below.imshow(seen.numpy(), cmap="magma", vmin=0.0, vmax=1.0)
                below.set_title(f"FLIP {float(seen.mean()):.4f}", fontsize=8)
            for axis in (above, below):
                axis.set_axis_off()
    return figure


def page(
    study: Study, points: Sequence[Point], tables: Tables, work: Path, command: str, drawn: bool,
    untimed: Sequence[Point] = (),
) -> str:  # fmt: skip
    """Question, plot, targets, tables, how it was made."""
    lines = [f"# {study.title}", "", study.question, "", f"![{study.title}]({study.name}.png)", ""]
    if drawn:
        lines += [f"![The first pair, density 0.25]({study.name}_pictures.webp)", ""]
    lines += _targets(points, tables)
    lines += _published(points, tables)
    if any(table.timed for table in tables.values()):
        title = "The same rules where as much attention is spent"
        lines += _published([*points, *untimed], _by_attention(tables), title)
    if not next(iter(tables.values())).timed:  # times of small models are too rough for it
        lines += _on_caching(points, tables)
    lines += [
        "## Every method",
        "",
        f"Cost: {study.x_label}. Gain: over today's way where it costs as much.",
        "",
        "| model | series | method | cost | pairs (prompts) | PSNR, dB | gain, dB | FLIP |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        table = tables[point.model]
        flip = Mean.of(table.column(point.method, lambda m: m.flip))
        seen = f"{flip.value:.4f}" if flip.count else ""
        gain, psnr = Mean.of(_gain(points, table, point)), Mean.of(table.psnr(point.method))
        lines.append(
            f"| {point.model} | {point.series} | `{point.method}` | "
            f"{table.cost(point.method):.3f} | {psnr.counted} | {psnr} | {gain} | {seen} |"
        )
    kept = [line for model in tables for line in shown(model, work)]
    if kept:
        lines += [
            "",
            "## How long a choice stays right",
            "",
            "Of one dense generation: pairs that the choice of step 4 and that of a later step "
            "share, and the attention mass (of means of 8 tokens) that each holds then.",
            "",
            "| model | density | step | pairs shared | mass of its own choice | mass of step 4's |",
            "|---|---|---|---|---|---|",
            *kept,
        ]
    first = tables[points[0].model].row(points[0].method)
    commits = " and ".join(sorted({c for each in tables.values() for c in each.commits}))
    lines += [
        "",
        f"Made by `{command}` on {first.device}, torch {first.torch}, diffusers "
        f"{first.diffusers}, commit {commits}, {first.dtype} with TF32 products; "
        f"{first.steps} steps. Pairs of prompt and seed, in brackets the prompts; differences are "
        "of the pairs that both sides have. `±` is the standard error of the mean over prompts, "
        "seeds of a prompt averaged first.",
    ]
    return "\n".join(lines) + "\n"


def _targets(points: Sequence[Point], tables: Tables) -> list[str]:
    """The best that costs no more than a limit, against today's way there."""
    lines = ["## Carry and the rest, against today's way", "",
             "| model | cost at most | today | best of the ladder | method | pairs (prompts) | "
             "gain, dB |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for model, table in tables.items():
        today = _of(points, model, "today")
        ours = [p.method for p in points if p.model == model and p.series.startswith("+")]
        for limit in LIMITS[table.timed]:
            best = _best(table, ours, limit)
            if best is None:
                continue
            before, after = table.between(today, limit), table.psnr(best)
            gain = Mean.of(minus(after, before))
            before = {pair: before[pair] for pair in after if pair in before}
            lines.append(
                f"| {model} | {limit:.2f} | {Mean.of(before)} | {Mean.of(after)} | "
                f"`{best}` | {gain.counted} | {gain} |"
            )
    return _unless_empty(lines)


def _published(
    points: Sequence[Point],
    tables: Tables,
    title: str = "Published rules, each with its best threshold",
) -> list[str]:
    """Each rule at its best threshold, against our best, on the same pairs."""
    lines = [f"## {title}", "",
             "The same dense steps. The gain is ours over the rule, at equal limits.", "",
             "| model | cost at most | rule | PSNR, dB | threshold | pairs (prompts) | "
             "ours is better by, dB |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for model, table in tables.items():
        ours = [p.method for p in points if p.model == model and p.series.startswith("+")]
        series = dict.fromkeys(
            p.series for p in points if p.model == model and p.series.split(",")[0] in RULES
        )
        for limit in LIMITS[table.timed]:
            best = _best(table, ours, limit)
            for name in series:
                rule = _best(table, _of(points, model, name), limit)
                if rule is None or best is None:
                    continue
                gain = Mean.of(minus(table.psnr(best), table.psnr(rule)))
                threshold = rule.partition(":")[2].partition(",")[0]
                lines.append(
                    f"| {model} | {limit:.2f} | {name} | {Mean.of(table.psnr(rule))} | "
                    f"{threshold} | {gain.counted} | {gain} |"
                )
    return _unless_empty(lines)


def _on_caching(points: Sequence[Point], tables: Tables) -> list[str]:
    """Sparse attention in the steps that caching computes, against a ramp that costs as much."""
    lines = ["## On top of caching", "",
             "Sparse attention in the computed steps of a ramp, against whole-layer caching alone "
             "on a ramp that costs as much (between two measured ones). Cost: FLOPs of all ops, of "
             "dense.",
             "",
             "| model | series | computed steps | cost | pairs (prompts) | PSNR, dB | "
             "caching alone | gain, dB |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for model, table in tables.items():
        ramps = _of(points, model, "caching")
        if len(ramps) < 2:
            continue
        low, high = min(map(table.whole_cost, ramps)), max(map(table.whole_cost, ramps))
        for point in points:
            if point.model != model or not point.series.startswith("caching"):
                continue
            cost, psnr = table.whole_cost(point.method), table.psnr(point.method)
            alone, gain = "", ""
            if point.series != "caching" and low <= cost <= high:
                line = table.between(ramps, cost, table.whole_cost)
                alone = str(Mean.of({pair: line[pair] for pair in psnr if pair in line}))
                gain = str(Mean.of(minus(psnr, line)))
            elif point.series != "caching":
                alone = "no ramp so cheap" if cost < low else "no ramp so dear"
            steps = point.method.partition("computed=")[2].partition(",")[0]
            lines.append(
                f"| {model} | {point.series} | {steps} | {cost:.3f} | {Mean.of(psnr).counted} | "
                f"{Mean.of(psnr)} | {alone} | {gain} |"
            )
    return _unless_empty(lines)


def _unless_empty(section: list[str]) -> list[str]:
    """A section that ends with a table, if the table has a row."""
    return [] if section[-1].startswith("|---") else [*section, ""]


def _best(table: Table, methods: Sequence[str], limit: float) -> str | None:
    """The method with the best mean, over pairs that all have, of those that cost no more."""
    psnr = {method: table.psnr(method) for method in methods if table.cost(method) <= limit}
    shared = set.intersection(*map(set, psnr.values())) if psnr else set()

    def mean(method: str) -> float:
        values = psnr[method]
        return Mean.of({p: x for p, x in values.items() if p in shared} or values).value

    return max(psnr, key=mean, default=None)
