"""What every study is made of: points, their campaign, a plot, a table, a page of Markdown.

``python studies/NAME.py --device cuda`` writes ``docs/studies/NAME.md``, ``.png`` and ``.csv``, and
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from matplotlib.figure import Figure
from rich.progress import Progress

from flashomni.lab import metrics, split, zoo
from flashomni.lab.fidelity import Campaign, Row, parse_method, summarise
from flashomni.lab.fidelity.table import IDENTICAL
from flashomni.lab.viz import save_figure
from flashomni.util.files import write_text

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "studies"
COLOURS = ("#2563eb", "#d97706", "#0d9488", "#9333ea", "#dc2626", "#6b7280", "#65a30d", "#db2777")


@dataclass(frozen=True)
class Point:
    """One method in one place of a plot.

    Args:
        series: which line it belongs to.
        x: where on the axis; ``None`` puts it at its measured share of skipped FLOPs.
        method: as ``flashomni eval --method`` takes it.
        model: a model that the project ships.
        call: arguments of the pipeline's call that differ from the model's own.
        panel: which plot; the model's name by default.
    """

    series: str
    x: float | None
    method: str
    model: str = "tiny-image"
    call: dict = field(default_factory=dict)
    panel: str | None = None


@dataclass(frozen=True)
class Study:
    """A question, the points that answer it, and how they are drawn.

    Args:
        name: of the files.
        title: of the page.
        question: what is asked, and how it is measured: Markdown.
        x_label: of the plots.
        points: all of them.
        log_x: logarithmic axis.
        extra: more Markdown from the rows, by point.
    """

    name: str
    title: str
    question: str
    x_label: str
    points: list[Point]
    log_x: bool = False
    extra: Callable[[list[tuple[Point, Row]]], str] | None = None


def main(study: Study) -> None:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=f"{study.title}. {study.question}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=8, help="prompts for tiny-image")
    parser.add_argument("--videos", type=int, default=4, help="prompts for tiny-video")
    parser.add_argument("--split", choices=split.PARTS, default="report", help="which prompts")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, default=ROOT / "eval" / "studies")
    args = parser.parse_args()
    measured = run(study, args.device, args.images, args.videos, args.steps, args.work, args.split)
    write(
        study, measured, args.out, " ".join(["python", f"studies/{study.name}.py", *sys.argv[1:]])
    )


def run(
    study: Study,
    device: str,
    images: int,
    videos: int,
    steps: int | None,
    work: Path,
    part: str = "report",
) -> list[tuple[Point, Row]]:
    """Every point with its row; results are kept in ``work``."""
    from training.agreement import agreement

    groups: dict[tuple, list[Point]] = {}
    for point in study.points:
        groups.setdefault((point.model, *sorted(point.call.items())), []).append(point)
    measured: dict[int, Row] = {}
    with Progress() as progress:
        for (model, *changes), points in groups.items():
            loaded = zoo.load(model, device, torch.float32)
            loaded = dataclasses.replace(loaded, call={**loaded.call, **dict(changes)})
            names = list(dict.fromkeys(point.method for point in points))
            count = videos if model == "tiny-video" else images
            prompts = split.pick(model, loaded.prompts, part, count)
            methods = [parse_method(name) for name in names]
            campaign = Campaign(
                model, loaded, methods, prompts, [0], work / study.name, agreement, steps
            )
            label = " ".join([study.name, model, *(f"{k}={v}" for k, v in changes)])
            task = progress.add_task(label, total=len(campaign))
            for _ in campaign.run(lambda case: lambda step, total: None):
                progress.advance(task)
            rows = {row.recipe: row for row in summarise(model, campaign.results(), study.name)}
            measured |= {id(point): rows[point.method] for point in points}
    return [(point, measured[id(point)]) for point in study.points]


def write(study: Study, measured: list[tuple[Point, Row]], out: Path, command: str) -> None:
    """Write the table, the plot and, last, the page."""
    save_figure(plot(study, measured), out / f"{study.name}.png")
    write_text(out / f"{study.name}.csv", table(measured))
    write_text(out / f"{study.name}.md", page(study, measured, command))


def plot(study: Study, measured: list[tuple[Point, Row]]) -> Figure:
    """PSNR above, caption agreement below; one column a panel, one line a series."""
    panels = list(dict.fromkeys(panel(point) for point, _ in measured))
    series = list(dict.fromkeys(point.series for point, _ in measured))
    figure = Figure(figsize=(6.2 * len(panels), 7.4), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, sharex="col", height_ratios=(3, 2))
    for column, name in enumerate(panels):
        top, bottom = axes[0][column], axes[1][column]
        for index, line in enumerate(series):
            some = [(p, r) for p, r in measured if (panel(p), p.series) == (name, line)]
            some.sort(key=lambda pair: at(*pair))
            colour = COLOURS[index % len(COLOURS)]
            fidelity = [(at(p, r), r.psnr_db) for p, r in some if r.psnr_db != IDENTICAL]
            if fidelity:
                top.plot(*zip(*fidelity, strict=True), "o-", color=colour, label=line)
            score = [(at(p, r), r.caption_score) for p, r in some if r.caption_score != ""]
            if score:
                bottom.plot(*zip(*score, strict=True), "o-", color=colour, label=line)
        dense = [r.dense_caption_score for p, r in measured if panel(p) == name]
        bottom.axhline(float(dense[0]), color="black", linestyle="--", linewidth=1, label="dense")
        top.set_title(name)
        top.set_ylabel("PSNR against dense, dB")
        bottom.set_ylabel("statements right")
        bottom.set_ylim(0.0, 1.05)
        bottom.set_xlabel(study.x_label)
        for axis in (top, bottom):
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if study.log_x:
                axis.set_xscale("log")
        top.legend(frameon=False, fontsize=8)
    return figure


def panel(point: Point) -> str:
    return point.panel or point.model


def at(point: Point, row: Row) -> float:
    return row.flops_skipped if point.x is None else point.x


def table(measured: list[tuple[Point, Row]]) -> str:
    """CSV: the point, then the row. Times are left out: studies run beside each other."""
    hidden = {"seconds", "speedup", "dense_seconds"}
    buffer = io.StringIO()
    writer: csv.DictWriter | None = None
    for point, row in measured:
        place = {"panel": panel(point), "series": point.series, "x": at(point, row)}
        values = {k: v for k, v in dataclasses.asdict(row).items() if k not in hidden}
        if writer is None:
            writer = csv.DictWriter(buffer, [*place, *values], lineterminator="\n")
            writer.writeheader()
        writer.writerow({**place, **values})
    return buffer.getvalue()


def page(study: Study, measured: list[tuple[Point, Row]], command: str) -> str:
    """The page: question, plot, table, how it was made."""
    first = measured[0][1]
    counts = {row.model: row.generations for _, row in measured}
    lines = [
        f"# {study.title}",
        "",
        study.question,
        "",
        f"![{study.title}]({study.name}.png)",
        "",
        "| panel | series | x | PSNR, dB | worst | SSIM | statements right | FLOPs skipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for point, row in measured:
        score = f"{row.caption_score:.1%}" if isinstance(row.caption_score, float) else ""
        lines.append(
            f"| {panel(point)} | {point.series} | {at(point, row):.3g} | {row.psnr_db} | "
            f"{row.worst_psnr_db} | {row.ssim:.4f} | {score} | {row.flops_skipped:.1%} |"
        )
    if study.extra is not None:
        lines += ["", study.extra(measured)]
    why = metrics.why_no_lpips()
    commits = " and ".join(sorted({row.commit for _, row in measured}))
    dense = {row.model: row.dense_caption_score for _, row in measured}
    lines += [
        "",
        f"Made by `{command}` on {first.device}, torch {first.torch}, diffusers {first.diffusers}, "
        f"commit {commits}, fp32; "
        + ", ".join(f"{count} prompts of {model}" for model, count in counts.items())
        + ", seed 0. Statements right in the stock pipeline's pictures: "
        + ", ".join(f"{model} {float(share):.1%}" for model, share in dense.items())
        + ".",
        "" if why is None else f"LPIPS was not measured: {why}.",
    ]
    return "\n".join(lines).rstrip() + "\n"
