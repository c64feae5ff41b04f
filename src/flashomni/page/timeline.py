"""One axis of steps, and above each other in lanes what happened: time, layers, errors, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashomni.page import data_block, escaped, in_seconds
from flashomni.util.words import in_bytes

KINDS = {
    "full": "Full: dense",
    "update": "Update: dense, and chooses what later steps skip",
    "dispatch": "Dispatch: computed in part",
    "bypass": "Cached whole: not run at all",
}
SIGNS = {
    "chooses": ("◆", "chooses the columns that attention visits"),
    "refreshes": ("●", "refreshes what sparse attention misses"),
}
SHADES = 8
TICKS = 7  # labels that fit a phone


def timeline(
    data: Mapping[str, Any],
    dense_seconds: float | None = None,
    errors: Sequence[float | None] = (),
) -> str:
    """Lanes for each branch of a generation, with a legend of the kinds that occur.

    Args:
        data: a summary's values (see :class:`flashomni.engine.Summary`).
        dense_seconds: of a call of the stock model, for a line to compare with.
        errors: how far the latents are from the stock pipeline's, by step.
    """
    steps = data["steps"]
    if not steps:
        return ""
    sides = list(dict.fromkeys(_side(step) for step in steps))
    parts = [_legend(steps)]
    for side in sides:
        own = [step for step in steps if _side(step) == side]
        title = f"<h3>{escaped(side)}</h3>" if len(sides) > 1 else ""
        parts.append(title + _lanes(own, data["layers"], dense_seconds, errors))
    return "".join(parts)


def _side(step: Mapping[str, Any]) -> str:
    parts = (step.get("transformer", ""), f"branch {step['branch']}")
    return ", ".join(part for part in parts if part)


def _legend(steps: Sequence[Mapping[str, Any]]) -> str:
    kinds = Counter(kind for step in steps for kind in step["layer_kinds"])
    total = sum(kinds.values())
    ordered = [kind for kind in (*KINDS, *kinds) if kind in kinds]
    items = [
        f'<li><i class="fo-key fo-{kind}"></i><b>{kinds[kind] / total:.0%}</b> '
        f"{escaped(KINDS.get(kind, kind))}</li>"
        for kind in dict.fromkeys(ordered)
    ]
    if any(0 < share < 0.9995 for step in steps for share in step.get("executed", ())):
        items.append('<li><i class="fo-key fo-scale"></i>0 to 100% of a layer\'s FLOPs</li>')
    signs = {sign for step in steps for sign in _signs(step)}
    items += [f"<li>{sign} {text}</li>" for sign, text in SIGNS.values() if sign in signs]
    return (
        '<ul class="fo-legend" aria-label="Kinds of layers, of all layer calls">'
        f"{''.join(items)}</ul>"
    )


def _signs(step: Mapping[str, Any]) -> list[str]:
    """What became of a step's columns, where its kind does not say it already."""
    does = [word for word in step.get("does", ()) if (step["kind"], word) != ("update", "chooses")]
    return [sign for word, (sign, _) in SIGNS.items() if word in does]


def _lanes(
    steps: Sequence[Mapping[str, Any]],
    layers: Sequence[str],
    dense_seconds: float | None,
    errors: Sequence[float | None],
) -> str:
    lanes = [_seconds(steps, dense_seconds), _marks(steps), _map(steps, layers)]
    for key, label, meaning in (
        ("q_density", "tiles", "computed (S_c)"),
        ("kv_density", "key blocks", "visited (S_s)"),
    ):
        if any(0 < value < 0.9995 for step in steps for value in step[key]):
            lanes.append(_density(steps, layers, key, label, meaning))
    drift = [errors[x["step"]] if x["step"] < len(errors) else None for x in steps]
    kept = [x.get("cache_bytes", 0) + x.get("cache_bytes_host", 0) for x in steps]
    lanes += [
        _line(drift, "error", "of the latents, from dense", _percent, "fo-error"),
        _line(
            [x.get("forecast_error") for x in steps],
            "forecast",
            "error, at Updates",
            _percent,
            "fo-forecast",
        ),
        _line(
            kept if any(kept) else [],
            "cache",
            "after each call",
            in_bytes,
            "fo-memory",
        ),
        _line(
            [x.get("allocated_bytes") for x in steps],
            "memory",
            "allocated on the GPU",
            in_bytes,
            "fo-memory",
        ),
    ]
    body = "".join(lanes) + _axis([step["step"] for step in steps])
    return (
        '<div class="fo-timeline" tabindex=0 role=group '
        'aria-label="By step; arrow keys move through it">'
        f'<p class="fo-readout" aria-live=polite></p>{body}'
        f"{data_block(_values(steps, layers, drift), 'fo-data')}</div>"
    )


def _lane(name: str, below: str, plot: str, height: str, kind: str = "") -> str:
    return (
        f'<div class="fo-lane {kind}"><div class="fo-name"><b>{escaped(name)}</b>'
        f'<span>{escaped(below)}</span></div><div class="fo-plot" style="height:{height}">'
        f"{plot}</div></div>"
    )


def _svg(width: int, height: int, inside: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role=img '
        f'aria-label="{escaped(label)}">{inside}</svg>'
    )


def _seconds(steps: Sequence[Mapping[str, Any]], dense: float | None) -> str:
    """Bars, coloured by kind; what a stock call takes is a line."""
    times = [step["seconds"] or 0.0 for step in steps]  # null: it was under way
    top = max([*times, dense or 0.0, 1e-9]) * 1.04
    bars = []
    for i, step in enumerate(steps):
        height = max(100 * times[i] / top, 1)
        kind = "bypass" if step["kind"] == "dispatch" and _all_cached(step) else step["kind"]
        bars.append(
            f'<rect class="fo-{escaped(kind)}" x="{i + 0.1:g}" width=".8" '
            f'y="{100 - height:.2f}" height="{height:.2f}"/>'
        )
    line = ""
    if dense:
        line = f'<div class="fo-rule" style="top:{100 * (1 - dense / top):.1f}%"></div>'
    label = f"seconds of each call: {min(times):.3g} to {max(times):.3g}"
    plot = _svg(len(steps), 100, "".join(bars), label) + line
    below = f"up to {in_seconds(max(times))}" + (
        f"; dashed: dense, {in_seconds(dense)}" if dense else ""
    )
    return _lane("time", below, plot, "6.5rem")


def _all_cached(step: Mapping[str, Any]) -> bool:
    return bool(step["layer_kinds"]) and set(step["layer_kinds"]) == {"bypass"}


def _marks(steps: Sequence[Mapping[str, Any]]) -> str:
    """A letter for each step that is no Dispatch, and what became of its columns."""
    letters = []
    for i, step in enumerate(steps):
        above = "".join(_signs(step))
        letter = {"full": "F", "update": "U"}.get(step["kind"], "")
        if letter or above:
            place = 100 * (i + 0.5) / len(steps)
            letters.append(
                f'<span class="fo-ink-{escaped(step["kind"])}" style="left:{place:.2f}%">'
                f"{letter}<small>{above}</small></span>"
            )
    return _lane("", "", "".join(letters), "1.35rem", "fo-marks")


def _groups(layers: Sequence[str]) -> dict[str, int]:
    """How many layers there are of each sort, in order."""
    return dict(Counter(name.rpartition(".")[0] or name for name in layers))


def _map(steps: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> str:
    """Layers by steps, coloured by kind; the stronger, the more of its FLOPs was executed."""

    def look(step: Mapping[str, Any], layer: int) -> tuple[str, int]:
        kind = step["layer_kinds"][layer]
        shares = step.get("executed")
        share = 1.0 if kind == "bypass" or shares is None else shares[layer]
        return f"fo-{kind}", _shade(share)

    label = "what each layer did in each step"
    return _cells("layers", f"{len(layers)}, first on top", steps, layers, look, label)


def _density(
    steps: Sequence[Mapping[str, Any]], layers: Sequence[str], key: str, name: str, meaning: str
) -> str:
    def look(step: Mapping[str, Any], layer: int) -> tuple[str, int]:
        cached = step["layer_kinds"][layer] == "bypass"
        return ("fo-bypass", SHADES) if cached else ("fo-density", _shade(step[key][layer]))

    return _cells(name, meaning, steps, layers, look, f"{name} {meaning}, by layer and step")


def _shade(share: float) -> int:
    return max(0, min(SHADES, round(share * SHADES)))


def _cells(
    name: str,
    below: str,
    steps: Sequence[Mapping[str, Any]],
    layers: Sequence[str],
    look: Callable[[Mapping[str, Any], int], tuple[str, int]],
    label: str,
) -> str:
    """One path for all cells that look alike, with a run of equal ones as one rectangle."""
    paths: dict[tuple[str, int], list[str]] = {}
    for layer in range(len(layers)):
        looks = [look(s, layer) if layer < len(s["layer_kinds"]) else None for s in steps]
        start = 0
        for i in range(1, len(looks) + 1):
            if i < len(looks) and looks[i] == looks[start]:
                continue
            what = looks[start]
            if what is not None:
                paths.setdefault(what, []).append(f"M{start} {layer}h{i - start}v1h{start - i}z")
            start = i
    inside = "".join(
        f'<path class="{kind}" fill-opacity="{0.16 + 0.84 * shade / SHADES:.2f}" d="{"".join(d)}"/>'
        for (kind, shade), d in paths.items()
    )
    lines, at, names = "", 0, []
    for group, count in _groups(layers).items():
        if at:
            lines += f'<path class="fo-cut" d="M0 {at}h{len(steps)}"/>'
        names.append(f"{group.rpartition('.')[2]} {count}")
        at += count
    height = f"{min(max(len(layers) * 0.55, 4.5), 26):.1f}rem"
    caption = f"{label}; {', '.join(names)}"
    plot = _svg(len(steps), len(layers), inside + lines, caption)
    return _lane(name, below, plot, height, "fo-map")


def _line(
    values: Sequence[float | None],
    name: str,
    below: str,
    form: Callable[[float], str],
    kind: str,
) -> str:
    """A line through what is known, with a point at each; nothing where nothing is."""
    known = [(i, value) for i, value in enumerate(values) if value is not None]
    if not known:
        return ""
    top = max(value for _, value in known) or 1.0
    points = [(i + 0.5, 100 - 92 * value / top) for i, value in known]
    path = "L".join(f"{x:g} {y:.2f}" for x, y in points)
    area = f"M{points[0][0]:g} 100L{path}L{points[-1][0]:g} 100z"
    dots = "".join(f"M{x:g} {y:.2f}h0" for x, y in points) if len(points) <= 60 else ""
    inside = (
        f'<path class="fo-area" d="{area}"/><path class="fo-stroke" d="M{path}"/>'
        f'<path class="fo-dots" d="{dots}"/>'
    )
    most = form(max(value for _, value in known))
    plot = _svg(len(values), 100, inside, f"{name}, {below}: up to {most}")
    return _lane(name, f"{below}; up to {most}", plot, "4rem", kind)


def _percent(value: float) -> str:
    return f"{value:.2%}" if value < 0.1 else f"{value:.0%}"


def _axis(numbers: Sequence[int]) -> str:
    count = len(numbers)
    stride = next(
        s * 10**p for p in range(6) for s in (1, 2, 5) if count / (s * 10**p) <= TICKS + 1
    )
    labels = "".join(
        f'<span style="left:{100 * (i + 0.5) / count:.2f}%">{number}</span>'
        for i, number in enumerate(numbers)
        if number % stride == 0
    )
    return (
        '<div class="fo-lane fo-axis"><div class="fo-name">step</div>'
        f'<div class="fo-plot">{labels}</div></div>'
    )


def _values(
    steps: Sequence[Mapping[str, Any]],
    layers: Sequence[str],
    drift: Sequence[float | None],
) -> dict[str, Any]:
    """What the script shows of a step that is pointed at."""

    def rounded(values: Sequence[float]) -> list[float]:
        return [round(value, 3) for value in values]

    return {
        "layers": list(layers),
        "steps": [
            {
                "step": step["step"],
                "kind": step["kind"],
                "seconds": in_seconds(step["seconds"] or 0.0),
                "kinds": step["layer_kinds"],
                "q": rounded(step["q_density"]),
                "kv": rounded(step["kv_density"]),
                "executed": rounded(step.get("executed", [])),
                "does": list(step.get("does", ())),
                "error": None if off is None else _percent(off),
                "cache": in_bytes(step.get("cache_bytes", 0) + step.get("cache_bytes_host", 0)),
            }
            for step, off in zip(steps, drift, strict=True)
        ],
    }
