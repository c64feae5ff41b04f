"""Parts of pages about a generation: figures, per-op bars, calls by kind, how to do it again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flashomni.page import (
    document,
    escaped,
    fold,
    in_seconds,
    section,
    style,
    table,
    warnings,
)
from flashomni.page.timeline import timeline
from flashomni.util.words import in_bytes

OPS = {
    "qkv": "K and V projections",
    "attention": "attention",
    "gemm_q": "Q projection",
    "gemm_o": "output projection",
    "mlp": "MLP",
}


def figures(rows: Iterable[Sequence[str]]) -> str:
    """Figures in a list: name, value, and what it means where that is not plain."""
    items = []
    for name, value, *meaning in rows:
        below = f"<small>{escaped(meaning[0])}</small>" if meaning and meaning[0] else ""
        items.append(f"<div><dt>{escaped(name)}{below}</dt><dd>{escaped(value)}</dd></div>")
    return f"<dl>{''.join(items)}</dl>"


def race(rows: Sequence[tuple[str, float, bool]]) -> str:
    """Seconds as bars of one scale: name, seconds, whether it is ours."""
    longest = max(seconds for _, seconds, _ in rows) or 1.0
    return (
        '<div class="fo-race">'
        + "".join(
            f"<span>{escaped(name)}</span>"
            f'<i class="{"fo-ours" if ours else ""}" style="width:{100 * seconds / longest:.1f}%">'
            "</i>"
            f"<b>{in_seconds(seconds)}</b>"
            for name, seconds, ours in rows
        )
        + "</div>"
    )


def ops(data: Mapping[str, Any]) -> str:
    """Bars of each op's FLOPs: what dense would be, and of it what was executed."""
    dense, executed = data["flops_dense"], data["flops_executed"]
    most = max(dense.values(), default=0.0)
    if not most:
        return ""
    rows = []
    for op, whole in sorted(dense.items(), key=lambda pair: -pair[1]):
        if not whole:
            continue
        done = executed[op]
        rows.append(
            f"<li><b>{escaped(OPS.get(op, op))}</b>"
            f'<div role=img aria-label="{done / whole:.0%} of {_flop(whole)} executed">'
            f'<i style="width:{100 * whole / most:.2f}%"></i>'
            f'<i style="width:{100 * done / most:.2f}%"></i></div>'
            f"<span><b>{1 - done / whole:.1%}</b> skipped of {_flop(whole)}</span></li>"
        )
    return f'<ul class="fo-ops">{"".join(rows)}</ul>'


def _flop(count: float) -> str:
    return f"{count / 1e12:.1f} TFLOP" if count >= 1e12 else f"{count / 1e9:.1f} GFLOP"


def calls(seconds_by_kind: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """Rows (kind, calls, seconds, median ms, mean ms, mean against dense).

    The ratio is of means: Dispatches are of two sorts (sparse, or cached whole), and the median
    sees only the commoner one. It is empty if no dense call was timed.
    """
    means = {
        kind: times["total"] / times["count"] if times["count"] else 0.0
        for kind, times in seconds_by_kind.items()
    }
    dense = means.get("dense")
    return [
        (
            kind,
            f"{times['count']:.0f}",
            f"{times['total']:.2f}",
            f"{times['median'] * 1e3:.1f}",
            f"{means[kind] * 1e3:.1f}",
            f"{dense / means[kind]:.2f}x" if dense and means[kind] else "",
        )
        for kind, times in seconds_by_kind.items()
    ]


def by_step(
    data: Mapping[str, Any],
    dense_seconds: float | None = None,
    errors: Sequence[float | None] = (),
) -> str:
    """The section of the timeline; see :func:`flashomni.page.timeline.timeline`."""
    return section(
        "Step by step",
        timeline(data, dense_seconds, errors),
        "Every call of the model, from left to right. In the map a cell is one layer in one step; "
        "its colour is what the layer did, and the stronger it is, the more of the layer's FLOPs "
        "were executed.",
    )


def by_op(data: Mapping[str, Any]) -> str:
    """The sections of FLOPs by op and of seconds by kind."""
    head = ("calls of the model", "count", "seconds", "median ms", "mean ms", "mean vs dense")
    every = data["seconds_by_kind"].items()  # of a call under way the time is not known
    timed = {k: v for k, v in every if v["count"] and v["total"] is not None}
    return section(
        "Operation by operation",
        ops(data),
        "FLOPs of the transformer blocks over all steps, the extra projections of Updates "
        "included. The pale bar is the dense model, the strong one what was executed.",
    ) + section(
        "Where the time went",
        table(head, calls(timed)) if timed else "",
        "A Full step runs dense; an Update runs dense and chooses what later steps skip; a "
        "Dispatch computes only that. The last column divides the mean of the stock model's calls "
        "by theirs.",
    )


def again(data: Mapping[str, Any]) -> str:
    """How to do it again: command, recipe, versions."""
    command = data.get("command")
    versions = data.get("versions")
    return section(
        "To do it again",
        (f"<pre>{escaped(command)}</pre>" if command else "")
        + fold("Recipe", f"<pre>{escaped(json.dumps(data['recipe'], indent=2))}</pre>")
        + (fold("Versions", table((), versions.items())) if versions else ""),
    )


def summary_figures(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a summary has to say in a few numbers."""
    seconds = sum(step["seconds"] or 0.0 for step in data["steps"])
    kinds = [kind for step in data["steps"] for kind in step["layer_kinds"]]
    dense = data["flops_dense"].get("attention")
    spent = data["flops_executed"]["attention"] / dense if dense else 0.0
    rows = [
        ("in the model", in_seconds(seconds)),
        ("calls of the model", str(len(data["steps"]))),
        ("layers cached whole", f"{kinds.count('bypass') / max(len(kinds), 1):.1%}"),
        ("attention spent, of dense", f"{spent:.3f}"),
        ("cache, peak", in_bytes(data["cache_bytes"])),
    ]
    if data["cache_bytes_host"]:
        rows.append(("cache in host memory", in_bytes(data["cache_bytes_host"])))
    if data.get("generation", 1) > 1:
        rows.append(("generation", f"{data['generation']}, the last one"))
    return [*rows, ("tier", str(data["tier"]))]


def summary_body(data: Mapping[str, Any]) -> str:
    """A generation that nothing was compared with: for a page or a notebook."""
    title = f"{escaped(data['model'])} <span>· {escaped(data['recipe']['name'])}</span>"
    return (
        f"<h1>{title}</h1>{warnings(data['notes'])}"
        f'<div class="fo-speed" style="margin-top:1.4rem">{data["flops_skipped"]:.1%}'
        "<small>of the transformer blocks' FLOPs were skipped</small></div>"
        f'<div class="fo-figures">{figures(summary_figures(data))}</div>'
        f"{by_step(data)}{by_op(data)}{again(data)}"
    )


def summary_page(data: Mapping[str, Any]) -> str:
    """:func:`summary_body` as a document."""
    brand = '<header class="fo-brand"><b>FlashOmni</b><span>report of a generation</span></header>'
    return document(f"{data['model']}, recipe {data['recipe']['name']}", brand + summary_body(data))


def summary_fragment(data: Mapping[str, Any]) -> str:
    """:func:`summary_body` for a page of somebody else, such as a notebook."""
    return f'{style()}<div class="fo">{summary_body(data)}</div>'
