"""Sparse attention in the steps that caching computes, of long clips, by the time of a large model.

A small model's own time is the host's. What its generations would take at HunyuanVideo's size
follows from what kinds of step they have, and from what those were measured to take there.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from _paired import Mean, Table, minus
from _study import COLOURS, ROOT, Point
from matplotlib.figure import Figure

from flashomni.engine import Recipe
from flashomni.engine.schedules import StepKind
from flashomni.engine.sparse_settings import Marks
from flashomni.lab.viz import save_figure
from flashomni.util.files import write_text

TIMES = ROOT / "docs" / "results" / "sparse_e2e.csv"
NAME = "sparse_long"
WORDS = {"d": "dense", "c": "refresh with a choice", "r": "refresh", "s": "sparse", "-": "left out"}
USUAL = "kv_density=0.25"  # the density that was timed
TOKENS, MORE = 32656, 118_000
ATTENTION = 0.6  # of a dense step at that many tokens: 60 layers of 18.2 ms of 1,822


def times(path: Path = TIMES) -> dict[str, float]:
    """Milliseconds of a step by the letter of its kind: means of the rows that there are.

    The first refresh, which chooses too, is in a row with later ones: the longest counts.
    """
    found: dict[str, list[float]] = {letter: [] for letter in WORDS}
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        kind, dense = row["step_kind"], row["recipe"] == "lossless"
        letter = {"full, refresh": "c", "update, refresh": "r", "dispatch": "-"}.get(kind, "")
        if kind in ("full, sparse", "update, sparse"):
            letter = "s"
        if dense:
            letter = "d" if kind in ("full", "update", "dispatch") else ""
        elif "degrade_below" not in row["recipe"] or "history_device" in row["recipe"]:
            continue  # of a generation without caching, or whose D is not on the card
        if letter:
            found[letter].append(float(row["ms"]))
    return {x: max(ms) if x == "c" else statistics.fmean(ms) for x, ms in found.items()}


def longer(ms: dict[str, float], times: float, attention: float = ATTENTION) -> dict[str, float]:
    """What steps would take with so many times the tokens, of a dense step there.

    Attention grows with the square of the tokens and everything else with them; what a step has
    more or less than a dense one is attention.
    """
    grown = attention * times / (attention * times + 1 - attention)  # share of a dense step there
    ratio = grown / attention
    return {x: 0.0 if x == "-" else 1 + ratio * (t / ms["d"] - 1) for x, t in ms.items()}


def steps_of(method: str, num_steps: int) -> str:
    """A letter for each step of a generation."""
    recipe, marks, letters = Recipe.of(method), Marks(), ""
    kinds = recipe.schedule.plan(num_steps, recipe.forecast.layer_order).kinds
    for step, kind in enumerate(kinds):
        if kind is StepKind.DISPATCH:
            letters += "-"
            continue
        did = recipe.sparse.step(kind, step, marks)
        letters += (
            "c" if did.chooses and did.refreshes else "r" if did.refreshes
            else "s" if did.skips else "d"
        )  # fmt: skip
        marks = Marks(
            step if did.chooses else marks.chosen,
            step if did.refreshes else marks.refreshed,
            0 if did.refreshes else marks.since + 1,
        )
    return letters


def write(points: Sequence[Point], table: Table, out: Path, command: str) -> None:
    """Page, plot and CSV; the page last."""
    ms = times()
    first = table.row(points[0].method)
    steps = {point.method: steps_of(point.method, first.steps) for point in points}
    costs = {m: sum(ms[letter] for letter in some) / ms["d"] for m, some in steps.items()}
    more = longer(ms, MORE / TOKENS)
    costs_there = {m: sum(more[letter] for letter in some) for m, some in steps.items()}
    ramps = [p.method for p in points if p.series == "caching"]
    timed = [p for p in points if p.series == "caching" or USUAL in p.method]
    rows = []
    for point in sorted(timed, key=lambda p: costs[p.method]):
        method, psnr = point.method, table.psnr(point.method)
        line = table.between(ramps, costs[method], costs.__getitem__)
        gain = {} if method in ramps else minus(psnr, line)
        there = table.between(ramps, costs_there[method], costs_there.__getitem__)
        mean, better = Mean.of(psnr), Mean.of(gain)
        better_there = Mean.of(minus(psnr, there))
        rows.append({
            "series": point.series, "method": method, "steps": steps[method],
            "dense_steps": round(costs[method], 3), "pairs": mean.count, "prompts": mean.prompts,
            "psnr_db": round(mean.value, 2), "psnr_db_se": round(mean.error, 2),
            "gain_db": round(better.value, 2) if gain else "",
            "gain_db_se": round(better.error, 2) if gain else "",
            "gain_pairs": better.count, "dense_steps_118k": round(costs_there[method], 3),
            "gain_db_118k": round(better_there.value, 2) if gain else "",
            "gain_db_118k_se": round(better_there.error, 2) if gain else "", "device": first.device,
            "commit": " ".join(table.commits), "torch": first.torch, "diffusers": first.diffusers,
        })  # fmt: skip
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / f"{NAME}.csv", buffer.getvalue())
    save_figure(plot(rows, table), out / f"{NAME}.png")
    write_text(out / f"{NAME}.md", page(rows, ms, command))


def plot(rows: Sequence[dict], table: Table) -> Figure:
    """PSNR against time, of the pairs that all have: caching alone, and what was tried beside it.

    Methods of fewer than half of the pairs are left out.
    """
    most = max(row["pairs"] for row in rows)
    rows = [row for row in rows if 2 * row["pairs"] >= most]
    shared = set.intersection(*(set(table.pairs(row["method"])) for row in rows))

    def mean(row: dict) -> float:
        values = table.psnr(row["method"]).items()
        return Mean.of({pair: x for pair, x in values if pair in shared}).value

    figure = Figure(figsize=(7.2, 5.0), layout="constrained")
    axis = figure.subplots()
    for number, series in enumerate(dict.fromkeys(row["series"] for row in rows)):
        some = [(r["dense_steps"], mean(r)) for r in rows if r["series"] == series]
        style = "o-" if series == "caching" else "sD"[number >= len(COLOURS)]
        colour = "black" if series == "caching" else COLOURS[number % len(COLOURS)]
        axis.plot(*zip(*some, strict=True), style, color=colour, label=series, markersize=5)
    axis.set(
        xlabel="time of a generation, in dense steps", ylabel="PSNR against dense, dB",
        title=f"{len(shared)} pairs",
    )  # fmt: skip
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=7)
    return figure


def page(rows: Sequence[dict], ms: dict[str, float], command: str) -> str:
    """Question, times, table, how it was made."""
    lines = [
        "# Sparse attention on top of caching, at 33,000 tokens", "",
        "Whole-layer caching computes some of 28 steps and forecasts the others (`quadrature`, as "
        "the presets do); key blocks may be left out in those that are computed. "
        "Fidelity is that of long clips of tiny-video (352 x 352, 65 frames, 32,912 tokens); time "
        "is what steps of each kind take at HunyuanVideo's size (`flashomni bench e2e --model "
        "hunyuan-33k`, [rows](../results/sparse_e2e.csv)), because a small model's own is the "
        "host's:",
        "",
        "| step | letter | ms | of dense |",
        "|---|---|---|---|",
        *(f"| {WORDS[x]} | {x} | {ms[x]:,.0f} | {ms[x] / ms['d']:.3f} |" for x in WORDS),
        "",
        f"![PSNR against time]({NAME}.png)",
        "",
        "Gain: over a ramp of dense steps of the same time, between two measured ones (the "
        "cheapest, where none is so cheap), pair by pair. Where it is positive, leaving out key "
        "blocks is better than computing fewer steps. The last two columns are computed, not "
        f"measured: times at {MORE:,} tokens, if attention ({ATTENTION:.0%} of a dense step at "
        f"{TOKENS:,}) grows with their square and the rest with them, at the fidelity of these "
        "clips.",
        "",
        "| series | steps | dense steps of time | PSNR, dB | pairs (prompts) | gain, dB | "
        "at 118K, of time | gain there, dB |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        gain = _signed(row, "gain_db")
        lines.append(
            f"| {row['series']} | `{row['steps']}` | {row['dense_steps']:.2f} | "
            f"{row['psnr_db']:.1f} ± {row['psnr_db_se']:.1f} | {row['pairs']} ({row['prompts']}) | "
            f"{gain} | {row['dense_steps_118k']:.2f} | {_signed(row, 'gain_db_118k')} |"
        )
    return "\n".join([
        *lines, "",
        f"Made by `{command}` on {rows[0]['device']}, torch {rows[0]['torch']}, diffusers "
        f"{rows[0]['diffusers']}, commit {rows[0]['commit'].replace(' ', ' and ')}, bfloat16. "
        "Pairs of prompt and seed, in brackets the prompts; `±` is the standard error of the mean "
        "over prompts, seeds of a prompt averaged first.",
    ]) + "\n"  # fmt: skip


def _signed(row: dict, name: str) -> str:
    """A gain with its error; empty where there is none."""
    return "" if row[name] == "" else f"{row[name]:+.1f} ± {row[f'{name}_se']:.1f}"
