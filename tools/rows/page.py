"""The measured columns of docs/methods.md, of the rows of a CSV."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator

RECIPE = "recipe"
CALIBRATED = ", calibrated"
GUIDED = " (true CFG)"  # two calls a step: rows of their own run
MEASURED = {"tiny-image": "measured, picture", "tiny-video": "measured, video"}


def in_words(row: dict[str, str], dense: float) -> str:
    """A cell of a measured column, of a row of the CSV; the stock pipeline takes ``dense`` s."""
    error = f" ± {float(row['psnr_error']):.1f}" if row["psnr_error"] else ""
    parts = [f"{float(row['psnr_db']):.1f}{error} / {float(row['worst_psnr_db']):.1f} dB"]
    flip = re.search(r"\bflip=([0-9.]+)", row.get("measures", ""))
    if flip:
        parts.append(f"FLIP {float(flip[1]):.3f}")
    if row["computed"]:
        parts.append(f"{float(row['computed']):.3g} computed")
    if row["flops_skipped"]:
        parts.append(f"{float(row['flops_skipped']):.0%} skipped")
    if row.get("attention_spent"):
        parts.append(f"attention {float(row['attention_spent']):.2f}")
    return ", ".join([*parts, f"{dense / float(row['seconds']):.2f}x"])


def _run_of(row: dict[str, str]) -> tuple[str, ...]:
    """What rows of one run have in common: times of others are another machine's, or guided."""
    guided = GUIDED if row["method"].endswith(GUIDED) else ""
    return row["model"], row.get("device", ""), row.get("commit", ""), guided


def cells_of(rows: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    """Column -> recipe -> cell, of the rows of a CSV; one that is not finite says so."""
    found: dict[str, dict[str, str]] = {column: {} for column in MEASURED.values()}
    dense: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        dense.setdefault(_run_of(row), []).append(float(row["dense_seconds"]))
    for row in rows:
        if row["model"] in MEASURED:
            usual = statistics.median(dense[_run_of(row)])  # one alone may have been disturbed
            words = row["psnr_db"] if row["psnr_db"] == "not finite" else in_words(row, usual)
            found[MEASURED[row["model"]]][row["method"]] = words
    return found


def _rows(page: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """``(line, cells, head)`` of each row of a table with recipes and a measured column."""
    head: list[str] = []
    for number, line in enumerate(page.splitlines()):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif RECIPE in head and set(MEASURED.values()) & set(head) and set(line) - set("|-: "):
            yield number, cells, head


def recipes_of(page: str, guided: bool = False) -> Iterator[str]:
    """What the page's tables name to measure, as :func:`Recipe.of` takes it; what guides by two
    calls is apart.
    """
    for _, cells, head in _rows(page):
        found = re.fullmatch(
            rf"`([^`]+)`({re.escape(CALIBRATED)}|{re.escape(GUIDED)})?", cells[head.index(RECIPE)]
        )
        if found and guided == (found[2] == GUIDED):
            yield found[1] + (found[2] or "")


def filled(page: str, figures: dict[str, dict[str, str]]) -> str:
    """The page with these figures, column -> recipe -> cell, in the rows of their recipes."""
    lines = page.splitlines()
    for number, cells, head in _rows(page):
        name = re.sub(r"\[(.*)\]\(.*\)", r"\1", cells[head.index(RECIPE)].replace("`", ""))
        for column, known in figures.items():
            if column in head and name in known:
                cells[head.index(column)] = known[name]
                lines[number] = "| " + " | ".join(cells) + " |"
    return "\n".join(lines) + "\n"
