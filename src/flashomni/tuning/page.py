"""A page of a tuning run that holds all it needs: the front, predictions, pictures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from flashomni.lab.pages import page
from flashomni.lab.viz import data_uri, save_figure
from flashomni.tuning.run import Tuned
from flashomni.tuning.settings import Point
from flashomni.tuning.validate import KINDS, picture_path
from flashomni.util.files import published, write_text

COLUMNS = (
    "computed", "schedule", "source", "speed-up", "PSNR, dB", "worst", "ramp, dB", "gain",
    "ramp, fitted weights", "predicted, dB", "measured, dB",
)  # fmt: skip


def front(points: Sequence[Point]) -> Figure:
    """PSNR against speed-up, and the prediction against what was measured."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    speed = [point.verdict.speedup for point in points]
    tuned = [point.verdict.psnr_db for point in points]
    errors = [point.verdict.error_db or 0.0 for point in points]
    left.errorbar(
        speed, tuned, yerr=errors, fmt="*-", markersize=11,
        color="#2563eb", label="tuned (bar: error of the gain)",
    )  # fmt: skip
    ramp = [point.verdict.ramp_db for point in points]
    left.plot(speed, ramp, "s--", color="#6b7280", label="ramp, as many steps")
    both = [p for p in points if p.verdict.same_weights_db is not None]
    if both:
        left.plot(
            [p.verdict.speedup for p in both],
            [p.verdict.same_weights_db for p in both],
            "o:", color="#0d9488", label="ramp, fitted weights",
        )  # fmt: skip
    left.set(xlabel="measured speed-up", ylabel="PSNR on held-back prompts, dB")
    left.legend(frameon=False)
    predicted = [point.predicted_db for point in points]
    right.plot(predicted, [point.measured_db for point in points], "*", color="#2563eb")
    ends = [min(predicted), max(predicted)]
    right.plot(ends, ends, "--", color="#6b7280", linewidth=0.8)
    right.set(xlabel="predicted, dB of the final latents", ylabel="measured on tuning prompts")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def in_words(point: Point) -> str:
    """What became of sparse attention, a sentence."""
    start = f"{point.computed} computed steps: sparse attention"
    if point.spent is None:
        return f"{start} was not tried, or did not pay with fewer steps"
    if point.recipe.groups and point.recipe.at_output:
        return f"{start} pays, {point.spent.chosen.words if point.spent.chosen else ''}"
    if point.spent.chosen is not None:
        return (
            f"{start} does not pay on prompts kept back, {point.spent.chosen.words} on the others"
        )
    best = max(point.spent.tried, key=lambda tried: tried.surplus, default=None)
    return f"{start} does not pay" + ("" if best is None else f"; at best {best.words}")


def of_layers(point: Point) -> str:
    """What became of groups of layers, a sentence."""
    start = f"{point.computed} computed steps: groups of layers"
    found = point.divided
    if found is None:
        return f"{start} were not tried"
    where = " and ".join(
        f"{part} ({100 * share:.0f} %)"
        for part, share in zip(found.parts, found.shares, strict=True)
    )
    said = [each.in_short for each in found.tried]
    if all(each.tiles for each in found.tried) and found.predicted_db is not None:
        said.insert(0, f"the best division is expected at {found.predicted_db:+.2f} dB")
    verdict = "do not pay"
    if found.chosen is not None:
        pays = bool(point.recipe.groups) and not point.recipe.at_output
        verdict = f"pay, {found.chosen.words}" if pays else "do not pay on prompts kept back"
    start = f"{start} {where} of a step {verdict}"
    alone = ", ".join(f"{each:.2f}" for each in found.alone)
    said.append(f"alone a step old they change the output {alone} times as much as all layers")
    return f"{start} (seconds, dB, over plans that take as long): {'; '.join(said)}"


def _notes(point: Point) -> list[str]:
    found = [in_words(point), of_layers(point)]
    if point.spent is not None and point.spent.by_layer:
        found.append(
            "squared error in runs of layers, over that without sparse attention, of "
            + point.spent.by_layer
        )
    return found


def write_page(
    found: Tuned, folder: Path, title: str, prompts: Sequence[str], about: str, command: str
) -> Path:
    """Write ``index.html`` and ``front.png`` into the folder; return the page's path.

    Args:
        found: what tuning found.
        folder: of the run, with the pictures of its points.
        title: of the page.
        prompts: that were kept back.
        about: what was run, a sentence.
        command: that does it again.
    """
    with published(folder) as stage:
        drawn = save_figure(front(found.points), stage / "front.png")
        refused = [point for point in found.points if not point.verdict.beats]
        notes = "".join(
            f"<li>{point.computed} computed steps: no recipe, the ramp is as good</li>"
            for point in refused
        )
        notes += "".join(
            f"<li>{html.escape(text)}</li>" for point in found.points for text in _notes(point)
        )
        text = page(
            "tuning",
            {"front": data_uri(drawn)},
            title=html.escape(title),
            prompt=html.escape(f"Tuned in {found.seconds:.0f} s."),
            notes=f"<h2>Notes</h2><ul>{notes}</ul>" if notes else "",
            head="".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS),
            rows="".join(_row(point) for point in found.points),
            shown="".join(_pictures(folder, point) for point in found.points),
            about=html.escape(about),
            prompts="".join(f"<li>{html.escape(text)}</li>" for text in prompts),
            command=html.escape(command),
        )
        write_text(stage / "index.html", text)
    return folder / "index.html"


def _row(point: Point) -> str:
    verdict = point.verdict
    same = "" if verdict.same_weights_db is None else f"{verdict.same_weights_db:.2f}"
    cells = (
        point.computed, " ".join(map(str, point.recipe.schedule.to_dict()["steps"])),
        point.source, f"{verdict.speedup:.2f}x", f"{verdict.psnr_db:.2f}",
        f"{verdict.worst_db:.2f}", f"{verdict.ramp_db:.2f}",
        verdict.gain, same,
        f"{point.predicted_db:.2f}", f"{point.measured_db:.2f}",
    )  # fmt: skip
    return "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>"


def _pictures(folder: Path, point: Point) -> str:
    found = [picture_path(folder, point.computed, kind) for kind in KINDS]
    shown = [(kind, path) for kind, path in zip(KINDS, found, strict=True) if path.exists()]
    figures = "".join(
        f'<figure><img src="{data_uri(path)}" alt="{kind}"><figcaption>{kind}, {point.computed} '
        "computed steps</figcaption></figure>"
        for kind, path in shown
    )
    return f'<div class="fo-pictures">{figures}</div>'
