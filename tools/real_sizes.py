"""The tables of docs/performance.md of later models at real size, of their CSVs.

``flashomni bench e2e --model flux2-1024 --csv FILE`` and ``python tools/wan22.py --csv FILE``
measure; ``python tools/real_sizes.py --e2e FILE --wan FILE`` puts such rows into
docs/results/later.csv and docs/results/wan22.csv, where those of the same model and recipe are
replaced, and makes the tables of them. Without files it makes the tables anew.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flashomni.lab import results
from flashomni.lab.e2e.models import MODELS
from flashomni.lab.e2e.table import GenerationRow
from flashomni.util.files import write_text

sys.path.append(str(Path(__file__).parent))
from wan22 import Row as WanRow

ROOT = Path(__file__).parents[1]
LATER = ROOT / "docs" / "results" / "later.csv"
WAN = ROOT / "docs" / "results" / "wan22.csv"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- later models: tools/real_sizes.py -->", "<!-- end of later models -->"
NOTHING = "Not measured yet."
Cells = dict[str, str]


def take(path: Path, kept: Path, row: type, key: tuple[str, ...]) -> None:
    """Rows of a run, in the place of those that agree with one of them in the ``key``."""
    new = results.read(path, row)
    keys = {tuple(each[name] for name in key) for each in new}
    old = [
        each for each in results.read(kept, row) if tuple(each[name] for name in key) not in keys
    ]
    write_text(kept, results.text(results.columns(row), [*old, *new]))


def of_generations(rows: list[Cells]) -> str:
    """One line for each method of each model."""
    lines = [
        "| model | method | ms by step | generation | against eager | density | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    methods: dict[tuple[str, str], list[Cells]] = {}
    for row in rows:
        methods.setdefault((row["model"], row["recipe"]), []).append(row)
    last = ""
    for (model, method), kinds in methods.items():
        whole = next(row for row in kinds if row["step_kind"] == "generation")
        steps = [row for row in kinds if row is not whole]
        ms = ", ".join(f"{row['step_kind'].capitalize()} {number(row['ms'])}" for row in steps)
        size = MODELS.get(model)
        note = f", {size.note}" if size is not None and size.note else ""
        name = f"{model} ({int(whole['tokens']):,} tokens{note})" if model != last else ""
        last = model
        cells = (
            name, f"`{method}`", ms, f"{float(whole['generation_s']):.2f} s",
            f"{float(whole['speedup']):.2f}x", number(whole["density"], 3),
            number(whole["peak_gib"]),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", origin(rows), ""])


def of_wan(rows: list[Cells]) -> str:
    """One line for each generation of Wan 2.2."""
    lines = [
        "| Wan 2.2 A14B | recipe | steps | calls, computed | stock, a call | ms a call: dense, "
        "least | generation | stock | | FLOPs skipped | peak GiB |",
        f"|{'---|' * 11}",
    ]
    for row in rows:
        cells = (
            f"{int(row['tokens']):,} tokens, {row['blocks']} of 40 blocks of each transformer",
            f"`{row['recipe']}`", row["steps"], f"{row['calls']}, {row['computed']}",
            f"{number(row['stock_ms'])} ms", f"{number(row['full_ms'])}, {number(row['least_ms'])}",
            f"{float(row['seconds']):.1f} s", f"{float(row['stock_s']):.0f} s",
            f"{float(row['speedup']):.2f}x", f"{float(row['flops_skipped']):.0%}",
            number(row["peak_gib"]),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", origin(rows), ""])


def origin(rows: list[Cells]) -> str:
    about = dict.fromkeys(f"{row['gpu']}, torch {row['torch']}, `{row['commit']}`" for row in rows)
    return f"{'; '.join(about)}; random weights, bf16. Stock is its median call, times the calls."


def number(text: str, digits: int = 1) -> str:
    return f"{float(text):,.{digits}f}" if text else ""


def page(text: str) -> str:
    """The page with its section as the kept rows make it."""
    tables = [
        make(rows)
        for path, row, make in ((LATER, GenerationRow, of_generations), (WAN, WanRow, of_wan))
        if (rows := results.read(path, row))
    ]
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    inside = "\n".join(tables) if tables else f"{NOTHING}\n"
    return f"{head}{BEGIN}\n\n{inside}\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--e2e", type=Path, help="of bench e2e")
    parser.add_argument("--wan", type=Path, help="of tools/wan22.py")
    options = parser.parse_args()
    if options.e2e is not None:
        take(options.e2e, LATER, GenerationRow, ("model", "recipe"))
    if options.wan is not None:
        take(options.wan, WAN, WanRow, ("recipe", "blocks", "steps"))
    write_text(PAGE, page(PAGE.read_text("utf-8")))


if __name__ == "__main__":
    main()
