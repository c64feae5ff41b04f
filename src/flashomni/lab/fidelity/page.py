"""What an evaluation looks like: fidelity against time, a sheet of pictures, one HTML page."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from flashomni.lab import metrics
from flashomni.lab.fidelity.campaign import Campaign
from flashomni.lab.fidelity.methods import DENSE, FAMILIES, parse_method
from flashomni.lab.fidelity.result import Case, Result
from flashomni.lab.fidelity.table import Row
from flashomni.lab.pages import page
from flashomni.lab.viz import data_uri, save_figure
from flashomni.util.files import published, write_text
from flashomni.util.words import one_line

COLOURS = dict(zip(FAMILIES, ("#2563eb", "#0d9488", "#6b7280", "#d97706"), strict=True))
MARKERS = dict(zip(FAMILIES, ("*", "o", "s", "^"), strict=True))
COLUMNS = {
    "recipe": "method", "seconds": "seconds", "speedup": "speed-up", "psnr_db": "PSNR, dB",
    "worst_psnr_db": "worst", "ssim": "SSIM", "lpips": "LPIPS", "flip": "FLIP",
    "temporal_db": "temporal, dB", "caption_score": "caption", "flops_skipped": "FLOPs skipped",
    "generations": "pictures",
}  # fmt: skip
SHEET_ROWS, SHEET_COLUMNS = 4, 8


def pareto(rows: Sequence[Row], x: str = "speedup", label: str = "measured speed-up") -> Figure:
    """PSNR against ``x``; the line joins what nothing else beats in both."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axis = figure.subplots()
    points = [row for row in rows if isinstance(row.psnr_db, float)]
    for family in FAMILIES:
        mine = [row for row in points if row.family == family]
        if mine:
            axis.scatter(
                [getattr(row, x) for row in mine],
                [float(row.psnr_db) for row in mine],
                s=170 if family == "presets" else 55,
                color=COLOURS[family],
                marker=MARKERS[family],
                label=family,
                zorder=3,
            )
    for row in points:
        axis.annotate(
            one_line(row.recipe, 60),
            (getattr(row, x), float(row.psnr_db)),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=7.5,
            parse_math=False,
            color=COLOURS[row.family],
        )
    front = frontier(points, x)
    axis.plot(
        [getattr(row, x) for row in front],
        [float(row.psnr_db) for row in front],
        color="black",
        linewidth=0.8,
        alpha=0.5,
        zorder=1,
    )
    axis.set_xlabel(label)
    axis.set_ylabel("PSNR against the stock pipeline, dB (mean)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper right")
    return figure


def frontier(rows: Sequence[Row], x: str) -> list[Row]:
    """Rows that no other row beats in both ``x`` and PSNR, by ``x``."""
    best, chosen = float("-inf"), []
    for row in sorted(rows, key=lambda row: (-getattr(row, x), -float(row.psnr_db))):
        if float(row.psnr_db) > best:
            best = float(row.psnr_db)
            chosen.append(row)
    return chosen[::-1]


def sheet(campaign: Campaign, rows: Sequence[Row]) -> Figure:
    """The stock pipeline's pictures and each method's, for a few prompts."""
    decibels = {(r.method, r.prompt, r.seed): r.psnr_db for r in campaign.results()}

    def draw(axis: Axes, path: Path, case: Case) -> str:
        axis.imshow(Image.open(path))
        decibel = decibels.get((case.method.name, case.prompt, case.seed))
        return "" if decibel is None else f"{decibel:.1f} dB"

    return _sheet(campaign, draw)


def differences(campaign: Campaign, rows: Sequence[Row]) -> Figure:
    """Where each method's pictures differ from the stock pipeline's: maps of FLIP.

    Of the pictures as they were saved; black is equal, yellow as far apart as can be.
    """
    stock = parse_method(DENSE)

    def draw(axis: Axes, path: Path, case: Case) -> str:
        reference = campaign.picture(Case(stock, case.prompt, case.seed))
        if not reference.exists():
            return ""
        found = metrics.flip_map(_pixels(reference), _pixels(path))[0]
        axis.imshow(found.numpy(), cmap="magma", vmin=0.0, vmax=1.0)
        return f"FLIP {float(found.mean()):.4f}"

    return _sheet(campaign, draw)


def _pixels(path: Path) -> Tensor:
    """A picture of a file: ``[1, 3, H, W]`` in [0, 1]."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    return pixels.permute(2, 0, 1)[None] / 255


def _sheet(campaign: Campaign, draw: Callable[[Axes, Path, Case], str]) -> Figure:
    """A picture for each method, the stock pipeline first, and for each of a few prompts.

    Args:
        draw: draws the picture of a file, of a case; gives a line for its title.
    """
    seed = campaign.seeds[0]
    methods = [parse_method(DENSE), *campaign.methods][: SHEET_COLUMNS * 4]
    # One line of methods has room for more prompts than several.
    prompts = campaign.prompts[: SHEET_ROWS if len(methods) <= SHEET_COLUMNS else 2]
    width = min(len(methods), SHEET_COLUMNS)
    lines = -(-len(methods) // width) * len(prompts)
    figure = Figure(figsize=(1.75 * width, 1.95 * lines), layout="constrained")
    axes = figure.subplots(lines, width, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for column, method in enumerate(methods):
        for line, prompt in enumerate(prompts):
            path = campaign.picture(Case(method, prompt, seed))
            if not path.exists():
                continue
            axis = axes[column // width * len(prompts) + line][column % width]
            value = draw(axis, path, Case(method, prompt, seed))
            name = textwrap.fill(one_line(method.name, 120), 30)
            axis.set_title(f"{name}\n{value}".rstrip(), fontsize=6, parse_math=False)
    return figure


def write_page(campaign: Campaign, rows: Sequence[Row], folder: str | Path, command: str) -> Path:
    """Write ``pareto.png``, ``sheet.png`` and ``index.html`` together; return the page's path."""
    folder = Path(folder)
    with published(folder) as stage:
        _write_files(campaign, rows, stage, command)
    return folder / "index.html"


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader of the rows must know, a sentence each; what is worst first."""
    found = [f"{r.method}, {r.prompt!r}, seed {r.seed}: {r.failure}" for r in results if r.failure]
    half = sum(not result.bracketed for result in results)
    if half:
        found.append(
            f"{half} of {len(results)} results are of a campaign that was stopped: their speed-up "
            "is against the stock run before them alone"
        )
    return found


def _write_files(campaign: Campaign, rows: Sequence[Row], folder: Path, command: str) -> None:
    pictures = {
        "pareto": save_figure(pareto(rows), folder / "pareto.png"),
        "sheet": save_figure(sheet(campaign, rows), folder / "sheet.png"),
    }
    why_no_flip = metrics.why_no_flip()
    if why_no_flip is None:
        pictures["flip"] = save_figure(differences(campaign, rows), folder / "flip.png")
    why = metrics.why_no_lpips()
    lines = [
        *notes(campaign.results()),
        *([] if why is None else [f"LPIPS was not measured: {why}"]),
        *([] if why_no_flip is None else [f"FLIP was not measured: {why_no_flip}"]),
    ]
    remarks = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    shown = [name for name in COLUMNS if any(getattr(row, name) != "" for row in rows)]
    images = {name: data_uri(path) for name, path in pictures.items()}
    text = page(
        "evaluation",
        {**images, "flip": _picture(images.get("flip", ""))},
        title=html.escape(f"{campaign.model}, {rows[0].device}"),
        head="".join(f"<th>{html.escape(COLUMNS[name])}</th>" for name in shown),
        rows="".join(_table_row(row, shown) for row in rows),
        notes=f"<h2>Notes</h2><ul>{remarks}</ul>" if remarks else "",
        prompts="".join(f"<li>{html.escape(prompt)}</li>" for prompt in campaign.prompts),
        seeds=html.escape(" ".join(map(str, campaign.seeds))),
        versions=html.escape(f"torch {rows[0].torch}, diffusers {rows[0].diffusers}"),
        commit=html.escape(rows[0].commit),
        command=html.escape(command),
    )
    write_text(folder / "index.html", text)


def _picture(uri: str) -> str:
    """The section of the maps of FLIP, if there are any."""
    if not uri:
        return ""
    return (
        "<h2>Differences that are seen</h2><p>FLIP of each pixel, 0 black to 1 yellow.</p>"
        f'<div class="fo-scroll" tabindex=0><img class="fo-plot" src="{uri}" alt="maps of FLIP">'
        "</div>"
    )


def _table_row(row: Row, shown: Sequence[str]) -> str:
    def show(name: str) -> str:
        value = getattr(row, name)
        if name in ("flops_skipped", "caption_score") and value != "":
            return f"{value:.1%}"
        return f"{value:.2f}x" if name == "speedup" else str(value)

    return "<tr>" + "".join(f"<td>{html.escape(show(name))}</td>" for name in shown) + "</tr>"
