"""Pictures of what was computed and skipped. Figures are objects: there is no global plot."""

from __future__ import annotations

import base64
import io
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from flashomni.engine import Summary
from flashomni.symbols import Symbols
from flashomni.util.files import write_bytes

KIND_COLOURS = {"full": "#6b7280", "update": "#d97706", "dispatch": "#2563eb"}
MAP = "cividis"  # readable with any colour vision, and in grey


def density_maps(summary: Summary) -> Figure:
    """Density of S_c and S_s, layers x steps; a row of maps for each branch.

    0 in both maps is a layer that was cached whole in that step.
    """
    branches = list(dict.fromkeys(step["branch"] for step in summary.steps))
    layers = len(summary.layers)
    height = max(2.2, 0.16 * layers + 1.4)
    figure = Figure(figsize=(11, height * len(branches)), layout="constrained")
    axes = figure.subplots(len(branches), 2, squeeze=False)
    titles = {
        "q_density": "S_c: share of tiles computed",
        "kv_density": "S_s: share of key blocks visited",
    }
    for row, branch in zip(axes, branches, strict=True):
        steps = [step for step in summary.steps if step["branch"] == branch]
        for axis, (key, title) in zip(row, titles.items(), strict=True):
            values = torch.tensor([step[key] for step in steps]).T  # [layers, steps]
            image = axis.imshow(
                values, cmap=MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest"
            )
            axis.set_title(
                title if len(branches) == 1 else f"{title} ({branch})",
                fontsize=10,
                parse_math=False,
            )
            axis.set_xlabel("step; F marks Full, U Update")
            _step_ticks(axis, steps)
            _layer_ticks(axis, summary.layers)
        figure.colorbar(image, ax=list(row), shrink=0.9, pad=0.01)
    return figure


def _step_ticks(axis: Any, steps: list[dict[str, Any]]) -> None:
    """Label the Updates and the runs of Full steps, and the ends where there is room."""
    room = len(steps) / 25  # about the width of a label
    labels: dict[float, str] = {
        i: f"{step['step']}\nU" for i, step in enumerate(steps) if step["kind"] == "update"
    }
    for kind, run in groupby(enumerate(steps), lambda pair: pair[1]["kind"]):
        members = list(run)
        if kind == "full":
            (i, first), (j, last) = members[0], members[-1]
            span = f"{first['step']}" if i == j else f"{first['step']}-{last['step']}"
            crowded = any(abs((i + j) / 2 - other) < room for other in labels)
            labels[(i + j) / 2] = "\nF" if crowded else f"{span}\nF"
    for i in (0, len(steps) - 1):
        if steps[i]["kind"] == "dispatch" and all(abs(i - j) > room for j in labels):
            labels[i] = str(steps[i]["step"])
    axis.set_xticks(list(labels), list(labels.values()), fontsize=8)


def _layer_ticks(axis: Any, layers: list[str]) -> None:
    """Number the layers inside their group and draw a line between groups."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(layers):
        groups.setdefault(name.rpartition(".")[0], []).append(i)
    ticks, labels = [], []
    for group, members in groups.items():
        short = "single" if "single" in group else "dual" if len(groups) > 1 else "layer"
        stride = max(1, len(members) // 8)
        ticks += members[::stride]
        labels += [f"{short} {i}" for i in range(0, len(members), stride)]
        if members[0]:
            axis.axhline(members[0] - 0.5, color="white", linewidth=1)
    axis.set_yticks(ticks, labels, fontsize=8)


def step_times(summary: Summary, dense_seconds: list[float]) -> Figure:
    """Seconds of each call of the model, coloured by kind, with the dense median as a line."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    axis = figure.subplots()
    for kind, colour in KIND_COLOURS.items():
        where = [i for i, step in enumerate(summary.steps) if step["kind"] == kind]
        if where:
            heights = [summary.steps[i]["seconds"] for i in where]
            axis.bar(where, heights, color=colour, label=kind, width=0.85)
    if dense_seconds:
        median = sorted(dense_seconds)[len(dense_seconds) // 2]
        axis.axhline(median, color="black", linestyle="--", linewidth=1, label="dense, median")
    axis.set_xlabel("call of the model")
    axis.set_ylabel("seconds")
    axis.set_xlim(-0.7, len(summary.steps) - 0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_symbols(symbols: Symbols, batch: int = 0, heads: list[int] | None = None) -> Figure:
    """S_s of some heads as pictures: dark is skipped, and a cached row is hatched grey.

    Args:
        symbols: of one layer.
        batch: which batch item.
        heads: which heads; the first four by default.

    Raises:
        ValueError: no such batch item or head.
    """
    heads = list(range(min(4, symbols.num_heads))) if heads is None else heads
    if not 0 <= batch < symbols.batch:
        raise ValueError(f"batch must be from 0 to {symbols.batch - 1}, got {batch}")
    for head in heads:
        if not 0 <= head < symbols.num_heads:
            raise ValueError(f"heads must be from 0 to {symbols.num_heads - 1}, got {head}")
    figure = Figure(figsize=(2.8 * len(heads), 3.2), layout="constrained")
    grid = symbols.grid
    q_mask, kv_mask = symbols.q_mask()[batch].cpu(), symbols.kv_mask()[batch].cpu()
    for axis, head in zip(figure.subplots(1, len(heads), squeeze=False)[0], heads, strict=True):
        axis.imshow(kv_mask[head], cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
        for row in (~q_mask[head]).nonzero()[:, 0].tolist():
            axis.axhspan(  # facecolor alone: `color` would paint the hatch grey on grey
                row - 0.5, row + 0.5, facecolor="#d1d5db", edgecolor="#4b5563", hatch="///", lw=0
            )
        for span in grid.text_q_ranges:
            for edge in {*span} - {0, grid.num_q_blocks}:
                axis.axhline(edge - 0.5, color="#dc2626", linewidth=1)
                axis.axvline(edge - 0.5, color="#dc2626", linewidth=1)
        axis.set_title(f"head {head}", fontsize=10)
        axis.set_xlabel("key block")
    figure.axes[0].set_ylabel("query block")
    return figure


def difference(reference: Tensor, image: Tensor) -> tuple[Tensor, float]:
    """Amplified absolute difference in [0, 1], shape of the inputs, and the amplification.

    The factor is a power of 2 that brings the 99.9th percentile near 1, at most 256. A difference
    that is not known, of values that are not finite, is shown as none.
    """
    gap = (reference.float() - image.float()).abs().nan_to_num(0.0, 1.0, 0.0)
    sample = gap.flatten()[:: max(1, gap.numel() // 1_000_000)]
    high = float(sample.quantile(0.999))
    factor = 1.0
    while factor < 256 and 0 < high * factor * 2 <= 1:
        factor *= 2
    return (gap * factor).clamp(0, 1), factor


def heat(values: Tensor) -> Tensor:
    """``[F, H, W]`` in [0, 1] as colours ``[F, 3, H, W]``: black is 0."""
    from matplotlib import colormaps

    colours = colormaps["magma"](values.numpy())[..., :3]
    return torch.from_numpy(colours).permute(0, 3, 1, 2).float()


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return write_bytes(path, buffer.getvalue())


def data_uri(path: Path) -> str:
    """A picture's file as a URI that a page can hold."""
    kind = path.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
