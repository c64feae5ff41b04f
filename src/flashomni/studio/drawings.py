"""What a page shows beside pictures, as HTML and SVG: progress, figures, maps, bars, tables.

Everything that somebody typed, and everything that a model or an error says, is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from flashomni.lab.viz import KIND_COLOURS, MAP
from flashomni.studio.events import Progress, Waiting
from flashomni.studio.outcome import Outcome, Row
from flashomni.util.words import in_bytes

KINDS = {
    "full": "computed",
    "update": "computed and kept for the cache",
    "dispatch": "taken from the cache",
}
DENSE = "#9ca3af"
REST = "#d1d5db"  # what is no call of the model
WHOLE = "transparent"  # a layer that is cached whole, over the hatched ground
NOTES = 6
LONGEST_ROW = 40  # rows of a map that are drawn high enough to be pointed at


def text(message: str, kind: str = "") -> str:
    """A line of text; kind ``error`` is announced."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="fo-line {kind}" role="{role}">{html.escape(message)}</p>' if message else ""


def welcome() -> str:
    """Where results will be, before there is one."""
    return (
        '<div class="fo-stage fo-empty"><b>Nothing generated yet</b><span>Press <em>Compare</em>: '
        "the picture comes once from the stock pipeline and once accelerated, from the same noise."
        "</span></div>"
    )


def stage(event: Progress | Waiting, last: Image.Image | None, seconds: float) -> str:
    """What is going on.

    Args:
        event: the newest.
        last: the newest preview.
        seconds: since the run began.
    """
    if isinstance(event, Waiting):
        before = "1 run comes" if event.place == 1 else f"{event.place} runs come"
        return _staged(f"waiting: {before} first", None, None, seconds)
    share = event.done / event.total if event.total else None
    count = f" \N{MIDDLE DOT} {event.done} of {event.total}" if event.total else ""
    return _staged(f"{event.stage}{count}", share, last, seconds)


def _staged(words: str, share: float | None, picture: Image.Image | None, seconds: float) -> str:
    width = "" if share is None else f"width:{share:.1%}"
    now = "" if share is None else f' aria-valuenow="{100 * share:.0f}"'
    image = ""
    if picture is not None:
        buffer = io.BytesIO()
        picture.save(buffer, format="WEBP", quality=80)
        data = base64.b64encode(buffer.getvalue()).decode()
        image = f'<img class="fo-preview" alt="so far" src="data:image/webp;base64,{data}">'
    return (
        f'<div class="fo-stage">{image}<div class="fo-now" role="status"><span>'
        f"{html.escape(words)}</span><span>{seconds:.0f} s</span></div>"
        f'<div class="fo-bar {"" if width else "fo-moving"}" role="progressbar" '
        f'aria-label="progress" aria-valuemin="0" aria-valuemax="100"{now}>'
        f'<i style="{width}"></i></div></div>'
    )


def figures(outcome: Outcome) -> str:
    """The figures that matter, the largest first, and the notes."""
    summary, dense = outcome.summary, outcome.dense
    cards = []
    if outcome.speedup is not None and dense is not None:
        cards.append(
            (f"{outcome.speedup:.2f}\N{MULTIPLICATION SIGN}", "speed-up",
             f"{dense.seconds:.2f} s \N{RIGHTWARDS ARROW} {outcome.seconds:.2f} s")
        )  # fmt: skip
    else:
        cards.append((f"{outcome.seconds:.2f} s", "accelerated", "no dense run to compare with"))
    distance = outcome.distance
    if distance is not None:
        known = "not known" if distance.psnr_db is None else f"{distance.psnr_db:.1f} dB"
        psnr = "identical" if distance.identical else known
        ssim = "" if distance.ssim is None else f"SSIM {distance.ssim:.4f}"
        cards.append((psnr, "PSNR to dense", ssim))
    if outcome.flip is not None:
        cards.append((f"{outcome.flip:.3f}", "FLIP, mean", "0 is equal"))
    skipped = f"attention spent {summary.attention_spent:.0%}"
    cards.append((f"{summary.flops_skipped:.0%}", "FLOPs of blocks skipped", skipped))
    host = f" + {in_bytes(summary.cache_bytes_host)} host" if summary.cache_bytes_host else ""
    cards.append((in_bytes(summary.cache_bytes), "cache, peak", host))
    shown = "".join(
        f'<div class="fo-card"><b>{html.escape(value)}</b><span>{html.escape(name)}</span>'
        f"<small>{html.escape(detail)}</small></div>"
        for value, name, detail in cards
    )
    notes = list(outcome.notes)
    if outcome.reused:
        notes.insert(0, "the dense result is of an earlier run: prompt, seed and size are the same")
    return f'<div class="fo-cards" data-testid="figures">{shown}</div>{_notes(notes)}'


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    lines = [html.escape(note) for note in notes[:NOTES]]
    if len(notes) > NOTES:
        lines.append(f"and {len(notes) - NOTES} more")
    return f'<ul class="fo-notes">{"".join(f"<li>{line}</li>" for line in lines)}</ul>'


def density(outcome: Outcome) -> str:
    """Layers by steps: what was computed, and what of the keys was visited."""
    summary = outcome.summary
    parts = []
    branches = list(dict.fromkeys(step["branch"] for step in summary.steps))
    for branch in branches:
        steps = [step for step in summary.steps if step["branch"] == branch]
        for key, title in (
            ("q_density", "Tiles computed, of each layer in each step"),
            ("kv_density", "Key blocks visited"),
        ):
            suffix = f" \N{MIDDLE DOT} {branch}" if len(branches) > 1 else ""
            parts.append(_map(steps, summary.layers, key, title + suffix))
    return f'<div class="fo-maps" data-testid="density">{"".join(parts)}</div>{_kinds()}{_scale()}'


def _map(steps: Sequence[dict[str, Any]], layers: Sequence[str], key: str, title: str) -> str:
    """One map: a strip of kinds over a cell for each layer and step, alike neighbours in one."""
    colours = colormaps[MAP]
    columns, rows = len(steps), max(len(layers), 1)
    cells = []
    for row, name in enumerate(layers):
        values = [
            (step[key][row], step["layer_kinds"][row]) if row < len(step[key]) else (0.0, "bypass")
            for step in steps
        ]
        for at, width, (value, kind) in _runs([(round(v, 2), kind) for v, kind in values]):
            whole = kind == "bypass"
            words = "cached whole" if whole else f"{value:.0%}"
            says = f"{name}, {_span(steps, at, width)}: {words}"
            cells.append(_rect(at, row, width, WHOLE if whole else to_hex(colours(value)), says))
    kinds = [
        _rect(at, 0, width, KIND_COLOURS.get(kind, REST),
              f"{_span(steps, at, width)}: {kind}, {KINDS.get(kind, '')}")
        for at, width, kind in _runs([step["kind"] for step in steps])
    ]  # fmt: skip
    height = (12 if rows <= LONGEST_ROW else 8) * rows
    label = html.escape(f"{title}: {rows} layers, {columns} steps")
    first, last = steps[0]["step"], steps[-1]["step"]
    return f"""
<figure><figcaption>{html.escape(title)}</figcaption><div class="fo-map">
  <div class="fo-layers">{_groups(layers)}</div>
  <div>
    <svg class="fo-strip" viewBox="0 0 {columns} 1" preserveAspectRatio="none"
      aria-hidden="true">{"".join(kinds)}</svg>
    <svg class="fo-cells" viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" role="img"
      aria-label="{label}" style="height:{height}px">{"".join(cells)}</svg>
    <div class="fo-ends"><span>step {first}</span><span>{last}</span></div>
  </div>
</div></figure>"""


def _runs(values: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """``(where it begins, how long it is, value)`` of each run of equal values."""
    found, at = [], 0
    for value, run in groupby(values):
        width = len(list(run))
        found.append((at, width, value))
        at += width
    return found


def _rect(x: float, y: float, width: float, fill: str, says: str, height: float = 1.0) -> str:
    return (
        f'<rect x="{x:g}" y="{y:.4g}" width="{width:g}" height="{height:.4g}" fill="{fill}">'
        f"<title>{html.escape(says)}</title></rect>"
    )


def _span(steps: Sequence[dict[str, Any]], at: int, width: int) -> str:
    """Which steps a run of calls is."""
    first, last = steps[at]["step"], steps[at + width - 1]["step"]
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _groups(layers: Sequence[str]) -> str:
    """The lists that layers belong to, each as high as it is long."""
    runs = [(stem, len(list(run))) for stem, run in groupby(layers, lambda n: n.rpartition(".")[0])]
    other = "dual" if len(runs) > 1 else "layers"
    return "".join(
        f'<span style="flex:{count}" title="{html.escape(stem)}, {count}">'
        f"{'single' if 'single' in stem else other}</span>"
        for stem, count in runs
    )


def _kinds() -> str:
    keys = [(KIND_COLOURS[kind], f"{kind}: {says}") for kind, says in KINDS.items()]
    return _legend(keys)


def _legend(keys: Sequence[tuple[str, str]]) -> str:
    items = (f'<li><i style="background:{c}"></i>{html.escape(says)}</li>' for c, says in keys)
    return f'<ul class="fo-legend">{"".join(items)}</ul>'


def _scale() -> str:
    colours = colormaps[MAP]
    stops = ", ".join(to_hex(colours(i / 8)) for i in range(9))
    return (
        '<ul class="fo-legend"><li><i class="fo-hatched"></i>cached whole</li><li><i '
        f'class="fo-wide" style="background:linear-gradient(90deg, {stops})"></i>0 to 100 %'
        "</li></ul>"
    )


def times(outcome: Outcome) -> str:
    """Where the seconds went: both generations as bars, and every call of the model."""
    calls = outcome.summary.steps
    parts = [(kind, sum(c["seconds"] for c in calls if c["kind"] == kind)) for kind in KINDS]
    rows = [("accelerated", outcome.seconds, parts)]
    if outcome.dense is not None:
        dense = outcome.dense
        rows.insert(0, ("dense", dense.seconds, [("dense", sum(dense.call_seconds))]))
    longest = max(seconds for _, seconds, _ in rows) or 1.0
    bars = "".join(_bar(*row, longest) for row in rows)
    keys = [(DENSE, "dense call")] if outcome.dense is not None else []
    keys += [(KIND_COLOURS[kind], kind) for kind, seconds in parts if seconds]
    keys.append((REST, "the rest: text encoders, VAE, scheduler"))
    return (
        f'<div class="fo-times" data-testid="times">{bars}{_legend(keys)}'
        f"<h4>Each call of the model</h4>{_calls(outcome)}{_by_op(outcome)}</div>"
    )


def _bar(name: str, seconds: float, parts: Sequence[tuple[str, float]], longest: float) -> str:
    colours = {"dense": DENSE, **KIND_COLOURS}
    rest = max(seconds - sum(value for _, value in parts), 0.0)
    pieces = "".join(
        f'<i style="width:{value / longest:.2%};background:{colours.get(kind, REST)}" '
        f'title="{kind}: {value:.2f} s"></i>'
        for kind, value in (*parts, ("the rest", rest))
        if value
    )
    return (
        f'<div class="fo-total"><span>{name}</span><div>{pieces}</div>'
        f"<span>{seconds:.2f} s</span></div>"
    )


def _calls(outcome: Outcome) -> str:
    """A bar a call, and the median of the dense ones as a line."""
    calls = outcome.summary.steps
    dense = sorted(outcome.dense.call_seconds) if outcome.dense is not None else []
    median = dense[len(dense) // 2] if dense else 0.0
    top = 1.05 * max([median, *(call["seconds"] for call in calls)]) or 1.0
    bars = []
    for i, call in enumerate(calls):
        seconds, kind = call["seconds"], call["kind"]
        says = f"step {call['step']}, {kind}: {1000 * seconds:.1f} ms"
        share, colour = seconds / top, KIND_COLOURS.get(kind, REST)
        bars.append(_rect(i + 0.08, 1 - share, 0.84, colour, says, share))
    line = ""
    if median:
        at = f"{1 - median / top:.4f}"
        line = f'<line x1="0" x2="{len(calls)}" y1="{at}" y2="{at}" class="fo-median"/>'
    dashed = f"dashed: dense, median {1000 * median:.1f} ms" if median else ""
    return f"""
<svg class="fo-calls" role="img" aria-label="seconds of each call" preserveAspectRatio="none"
  viewBox="0 0 {max(len(calls), 1)} 1">{"".join(bars)}{line}</svg>
<div class="fo-ends"><span>step 0</span><span>{dashed}</span></div>"""


def _by_op(outcome: Outcome) -> str:
    summary = outcome.summary
    rows = [
        (op, f"{dense / 1e9:.1f}", f"{summary.flops_executed[op] / 1e9:.1f}",
         f"{1 - summary.flops_executed[op] / dense:.0%}")
        for op, dense in summary.flops_dense.items()
        if dense
    ]  # fmt: skip
    return _table(("op", "GFLOP, dense", "executed", "skipped"), rows)


def history(rows: Sequence[Row]) -> str:
    """What this page has tried, the newest first."""
    if not rows:
        return text("Every run of this page gets a line here.")
    lines = []
    for row in reversed(rows):
        psnr = "" if row.psnr_db is None else f"{row.psnr_db:.2f}"
        lines.append(
            (
                row.recipe,
                f"{row.computed} of {row.steps}",
                f"{row.seconds:.2f}",
                "" if row.speedup is None else f"{row.speedup:.2f}\N{MULTIPLICATION SIGN}",
                "identical" if row.psnr_db == math.inf else psnr,
                "" if row.flip is None else f"{row.flip:.4f}",
                f"{row.skipped:.0%}",
            )
        )
    head = ("recipe", "computed", "seconds", "speed-up", "PSNR", "FLIP", "skipped")
    return f'<div data-testid="history">{_table(head, lines)}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="fo-scroll"><table class="fo-table"><thead><tr>{names}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
