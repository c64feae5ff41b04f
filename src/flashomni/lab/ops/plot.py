"""Speed-up against what is skipped, beside the line of linear speed-up."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

MARKERS = "osD^vP*X"


def draw(csv_path: Path, picture: Path) -> None:
    """Picture of a CSV that ``save`` wrote: a line for each op, shape and baseline."""
    with csv_path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    picture.parent.mkdir(parents=True, exist_ok=True)
    speedups(rows).savefig(picture, dpi=110)


def speedups(rows: Sequence[dict[str, str]]) -> Figure:
    """Each op and shape is a line: ratio against 1 - density, both from a CSV of ``save``."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    lines: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        key = (row["op"], row["shape"], row["baseline"])
        lines.setdefault(key, []).append((1 - float(row["density"]), float(row["ratio"])))
    furthest = max(x for points in lines.values() for x, _ in points)
    skipped = [furthest * step / 50 for step in range(51)]
    axis.plot(skipped, [1 / (1 - x) for x in skipped], "--", color="grey", label="linear")
    for number, ((op, shape, baseline), points) in enumerate(sorted(lines.items())):
        label = f"{op}, {shape}, against {baseline}"
        axis.plot(
            *zip(*sorted(points), strict=True), MARKERS[number % len(MARKERS)] + "-", label=label
        )
    axis.set(
        xlabel="share of the work that is skipped",
        ylabel="speed-up",
        title=rows[0]["gpu"],
        yscale="log",
    )
    axis.set_yticks([1, 2, 4, 8, 10], ["1", "2", "4", "8", "10"])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
