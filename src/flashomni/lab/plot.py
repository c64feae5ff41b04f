"""Pictures of the CSVs: speed of ops, seconds of generations, parts of a step, sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from flashomni.lab import results
from flashomni.lab.e2e.parts import PARTS
from flashomni.lab.fidelity.peers import PEERS

Rows = Sequence[dict[str, str]]
MARKERS = "osD^vP*X"
LINE = 46  # letters of a label


def draw(csv_path: Path, picture: Path) -> None:
    """Picture of a CSV of ops, generations, parts or sparsities: its columns tell which."""
    rows = results.read(csv_path)
    kinds = {"ratio": speedups, "speedup": generations, "part": parts, "normalised": sparsities}
    make = next(make for column, make in kinds.items() if column in rows[0])
    picture.parent.mkdir(parents=True, exist_ok=True)
    make(rows).savefig(picture, dpi=110)


def speedups(rows: Sequence[dict[str, str]]) -> Figure:
    """Each op and shape is a line: ratio against 1 - density, both of ops."""
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


def generations(rows: Rows) -> Figure:
    """A bar for each method of each model, with its ratio to each baseline beside it.

    Of several runs of the same method the last counts.
    """
    whole = [row for row in rows if row["step_kind"] == "generation"]
    models = list(dict.fromkeys(row["model"] for row in whole))
    figure = Figure(figsize=(9, 1 + 0.45 * len({(r["model"], r["recipe"]) for r in whole})))
    figure.set_layout_engine("constrained")
    for axis, model in zip(figure.subplots(len(models), squeeze=False)[:, 0], models, strict=True):
        mine = [row for row in whole if row["model"] == model]
        stock = {row["baseline"] for row in mine}
        names = list(dict.fromkeys(row["recipe"] for row in mine))
        longest = max(float(row["generation_s"]) for row in mine)
        for place, name in enumerate(names):
            found = [row for row in mine if row["recipe"] == name]
            timed = found[-1]["generation_s"]  # ratios of other runs would not fit this time
            last = {row["baseline"]: row for row in found if row["generation_s"] == timed}
            seconds = float(timed)
            axis.barh(place, seconds, color=_color(name, stock))
            ratios = ", ".join(
                f"{float(row['speedup']):.2f}x {base}" for base, row in last.items() if base != name
            )
            axis.text(seconds, place, f" {seconds:.1f} s, {ratios}", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), [_wrapped(name) for name in names], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.6 * longest)  # room for the text behind the longest bar
        axis.set(title=f"{model}, {mine[-1]['gpu']}", xlabel="seconds a generation")
    return figure


def _color(name: str, stock: set[str]) -> str:
    if name in stock:
        return "silver"
    return "tab:orange" if name.partition(":")[0] in PEERS else "tab:blue"


def _wrapped(name: str) -> str:
    """A long name in lines that break behind a comma."""
    lines = [""]
    for piece in name.replace(",", ",\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(piece) > LINE:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def parts(rows: Rows) -> Figure:
    """A bar for each method and kind of step, stacked from its parts; a panel for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    bars = list(dict.fromkeys((r["model"], r["method"], r["step_kind"]) for r in rows))
    names = [part for part in PARTS if any(row["part"] == part for row in rows)]
    figure = Figure(figsize=(10, 1.4 + 0.5 * len(bars)), layout="constrained")
    for axis, model in zip(figure.subplots(len(models), squeeze=False)[:, 0], models, strict=True):
        mine = [bar for bar in bars if bar[0] == model]
        left = [0.0] * len(mine)
        for name in names:
            last = {
                (r["model"], r["method"], r["step_kind"]): float(r["ms"])
                for r in rows
                if r["part"] == name
            }
            widths = [last.get(bar, 0.0) for bar in mine]
            color = f"C{PARTS.index(name)}"
            axis.barh(range(len(mine)), widths, left=left, label=name, color=color)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, total in enumerate(left):
            axis.text(total, place, f" {total:.1f}", va="center", fontsize=8)
        labels = [_wrapped(f"{method}, {kind}") for _, method, kind in mine]
        axis.set_yticks(range(len(mine)), labels, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set(title=model, xlabel="ms a step, by kernel")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def sparsities(rows: Rows) -> Figure:
    """Time of a Dispatch step against the sparsity of attention, beside the linear line."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        point = (1 - float(row["density"]), float(row["normalised"]))
        lines.setdefault((row["model"], row["mode"]), []).append(point)
    axis.plot([0, 1], [1, 0], "--", color="grey", label="linear")
    for number, ((model, mode), points) in enumerate(sorted(lines.items())):
        marker = MARKERS[number % len(MARKERS)] + "-"
        axis.plot(*zip(*sorted(points), strict=True), marker, label=f"{model}, {mode}")
    axis.set(
        xlabel="sparsity: share of (query, key) pairs that is skipped",
        ylabel="Dispatch step / our dense step",
        title=rows[0]["gpu"],
        ylim=(0, None),
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
