"""docs/images/pareto.png: PSNR against time, a panel a model, of a CSV of tools/methods.py.

``python tools/pareto.py --csv docs/results/methods.csv``. Settings of one method that differ in a
number are joined where a line says what they have in common; a line down from a point ends at its
worst picture. A peer's settings are "planned" where they are a list of computed steps that a
dynamic programme chose for its forecast, and apart from its own thresholds and intervals.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flashomni.lab import results
from flashomni.lab.fidelity.comparison import Summed
from flashomni.lab.fidelity.equal_time import line_of
from flashomni.lab.viz import save_figure

DOCS = Path(__file__).parents[1] / "docs"
PLANNED = "steps=["  # of a peer's settings
# What a method looks like: label, colour, marker.
LOOKS = {
    "tuned": ("tuned", "#2563eb", "*"),
    "ramp": ("ramp, fitted weights", "#0d9488", "o"),
    "balanced": ("balanced", "#7c3aed", "D"),
    "steps": ("stock, fewer steps", "#6b7280", "s"),
    "diffusers.mag, planned": ("diffusers' MagCache, planned steps", "#d97706", "^"),
    "diffusers.mag": ("diffusers' MagCache, thresholds", "#fbbf24", "^"),
    "diffusers.taylorseer": ("diffusers' TaylorSeer, intervals", "#84cc16", "<"),
    "cache-dit, planned": ("cache-dit TaylorSeer, planned steps", "#dc2626", "v"),
    "cache-dit": ("cache-dit, thresholds and its own masks", "#f9a8d4", "v"),
}
TITLES = {"tiny-image": "pictures, tiny-image", "tiny-video": "videos, tiny-video"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=DOCS / "results" / "methods.csv")
    parser.add_argument("--out", type=Path, default=DOCS / "images" / "pareto.png")
    options = parser.parse_args()
    save_figure(drawn(results.read(options.csv, Summed)), options.out)


def look_of(method: str) -> str | None:
    """Key of what a method looks like; ``None`` is not drawn: presets with other settings, too."""
    line = line_of(method)
    if line == "balanced" != method:
        return None
    planned = f"{line}, planned"
    if planned in LOOKS and PLANNED in method:
        return planned
    if line in LOOKS:
        return line
    return next((key for key in ("tuned-", "ramp-") if line.startswith(key)), "-")[:-1] or None


def drawn(rows: Iterable[results.Cells]) -> Figure:
    """A panel for each model."""
    rows = [row for row in rows if look_of(row["method"]) and row["psnr_db"] != "not finite"]
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, len(TITLES), sharey=True, squeeze=False)[0]
    for axis, (model, title) in zip(panels, TITLES.items(), strict=True):
        mine = [row for row in rows if row["model"] == model]
        for key, (_, colour, marker) in LOOKS.items():
            points = sorted(
                (float(row["seconds"]), float(row["psnr_db"]), float(row["worst_psnr_db"]))
                for row in mine
                if look_of(row["method"]) == key
            )
            if not points:
                continue
            seconds, mean, worst = zip(*points, strict=True)
            style = {"color": colour, "zorder": 3}
            axis.plot(seconds, mean, linewidth=1, alpha=0.5, color=colour)
            axis.scatter(seconds, mean, s=150 if marker == "*" else 50, marker=marker, **style)
            axis.vlines(seconds, worst, mean, colors=colour, linewidth=0.8, alpha=0.35)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("seconds a result")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("PSNR, dB: mean, line to the worst")
    seen = {look_of(row["method"]) for row in rows}
    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=0, label=label)
        for key, (label, colour, marker) in LOOKS.items()
        if key in seen
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


if __name__ == "__main__":
    main()
