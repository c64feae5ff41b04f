"""A step on 4 and 8 cards, computed from what was measured on one and on two.

``python tools/scaling_model.py --exchange hunyuan-33k=0.81`` reads docs/results/scaling.csv, the
rows of ``bench e2e --ulysses 2`` (and of 4, beside which what is computed is shown), and prints
both tables; with ``--write`` they become the section
of docs/scaling.md. ``--exchange`` is the median time in ms of one all-to-all by itself on the two
cards, of a rank's share of q (:func:`flashomni.lab.e2e.ranks.exchange_seconds`): it gives the
bandwidth.

A step on P cards is taken to be ``rest + shared / P + exchange(P)``. The exchange is bytes sent
over that bandwidth, none of it hidden; rest and shared follow from the two measured times.
docs/scaling.md counts the bytes: four all-to-alls for each attention that is computed, and one
all-gather.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashomni.lab import results
from flashomni.lab.e2e.methods import GENERATION
from flashomni.lab.e2e.models import MODELS
from flashomni.lab.e2e.table import GenerationRow
from flashomni.util.files import write_text

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "docs" / "results" / "scaling.csv"
PAGE = ROOT / "docs" / "scaling.md"
HEADING = "## Measured, and computed for more"
BEFORE = "## What is exact"  # the section that it stands in front of
MORE = (4, 8)
VALUE = 2  # bytes, of bf16
PAIR = ", 2 cards"
SEVERAL = re.compile(r", (\d+) cards$")
ALONE = "eager"  # diffusers on one card
Key = tuple[str, str]  # model and recipe


@dataclass(frozen=True)
class Step:
    """The mean step of one recipe, on one card and on two.

    Args:
        one: seconds on one card.
        two: seconds on two cards.
        attentions: computed in it.
        size: bytes of a sequence's q, all heads.
        bandwidth: bytes a second that a process sends, measured.
    """

    one: float
    two: float
    attentions: float
    size: float
    bandwidth: float

    def sent(self, cards: int) -> float:
        """Bytes that a process sends to others: docs/scaling.md has the sum."""
        return (4 * self.attentions / cards + 1) * self.size * (cards - 1) / cards

    def exchange(self, cards: int) -> float:
        """Seconds that this takes."""
        return self.sent(cards) / self.bandwidth

    @property
    def rest(self) -> float:
        """Seconds that do not become less with more cards."""
        return max(2 * (self.two - self.exchange(2)) - self.one, 0.0)

    def on(self, cards: int) -> float:
        """Seconds of a step on that many cards.

        Args:
            cards: at least two.
        """
        shared = 2 * (self.two - self.exchange(2) - self.rest)
        return self.rest + shared / cards + self.exchange(cards)


def steps_of(data: Sequence[results.Cells], exchange: Mapping[str, float]) -> dict[Key, Step]:
    """Recipes that were measured on one card and on two.

    Args:
        data: rows of ``bench e2e --ulysses 2``, each once for every baseline.
        exchange: milliseconds of an all-to-all of each model, by its name.

    Raises:
        ValueError: an exchange is missing, or is of a model without rows.
    """
    means = {(row["model"], row["recipe"]): row for row in data if row["step_kind"] == GENERATION}
    models = {row["model"]: int(row["tokens"]) for row in data}
    if set(exchange) != set(models):
        given = ", ".join(sorted(exchange)) or "none"
        raise ValueError(f"exchange must be of {', '.join(sorted(models))}, got {given}")
    found = {}
    for (model, recipe), one in means.items():
        two = means.get((model, recipe + PAIR))
        if two is None:
            continue
        layers, width = shape_of(model)
        size = models[model] * width * VALUE
        found[model, recipe] = Step(
            one=float(one["ms"]) / 1e3,
            two=float(two["ms"]) / 1e3,
            attentions=layers * float(one["density"] or 1),
            size=size,
            bandwidth=size / 4 / (exchange[model] / 1e3),  # half of a half goes to the other card
        )
    return found


def shape_of(model: str) -> tuple[int, int]:
    """Attentions in a call of the transformer, and features of all of their heads."""
    config = MODELS[model].config
    layers = config["num_layers"] + config.get("num_single_layers", 0)
    return layers, config["num_attention_heads"] * config["attention_head_dim"]


def section(data: Sequence[results.Cells], exchange: Mapping[str, float]) -> str:
    """Both tables, as Markdown under their heading.

    Raises:
        ValueError: as :func:`steps_of`, or nothing was measured on one card and on two.
    """
    steps = steps_of(data, exchange)
    if not steps:
        raise ValueError("the rows have no recipe both on one card and on 2 cards")
    means = _means(data)
    seen = {n for n in MORE for _, recipe in means if recipe.endswith(f", {n} cards")}
    columns = [(n, is_seen) for n in MORE for is_seen in (False, True) if n in seen or not is_seen]
    names = (f"{n} cards" + ", measured" * is_seen for n, is_seen in columns)
    computed = [["model", "recipe", "sent on 2 cards", *names]]
    for (model, recipe), step in steps.items():
        cells = []
        for n, is_seen in columns:
            row = means.get((model, f"{recipe}, {n} cards")) if is_seen else None
            seconds = float(row["ms"]) / 1e3 if row else step.on(n)
            shown = f"{seconds * 1e3:,.0f} ms, {step.one / seconds:.2f}x"
            cells.append(shown if row or not is_seen else "")
        computed.append([model, f"`{recipe}`", f"{step.sent(2) / 1e6:,.0f} MB", *cells])
    bandwidths = {model: step.bandwidth / 1e9 for (model, _), step in steps.items()}
    return SECTION.format(
        heading=HEADING,
        gpu=data[0]["gpu"],
        versions=f"torch {data[0]['torch']}, commit `{data[0]['commit']}`",
        commands="\n".join(dict.fromkeys(row["command"] for row in data)),
        measured=_table(_measured(data)),
        computed=_table(computed),
        speeds=", ".join(f"{model} {value:,.0f} GB/s" for model, value in bandwidths.items()),
        command=" ".join(f"--exchange {model}={ms:g}" for model, ms in sorted(exchange.items())),
    )


def _means(data: Sequence[results.Cells]) -> dict[Key, results.Cells]:
    """The row of a whole generation, by model and method; its baseline is any."""
    return {(row["model"], row["recipe"]): row for row in data if row["step_kind"] == GENERATION}


def _measured(data: Sequence[results.Cells]) -> list[list[str]]:
    """A row a method and number of cards: its mean step, beside one card's and diffusers'."""
    means = _means(data)
    plans = [recipe for _, recipe in means if recipe.startswith("diffusers ")]
    names = list(dict.fromkeys(map(_short, plans)))
    head = ["model", "method", "cards", "a step", "one card", "faster"]
    rows = [[*head, *(f"than {name}" for name in names)]]
    for (model, recipe), row in means.items():
        several = SEVERAL.search(recipe)
        if several is None:
            continue
        alone, ms = recipe[: several.start()], float(row["ms"])
        one = means.get((model, ALONE if recipe in plans else alone))
        ratios = dict.fromkeys(names, "")
        for other in plans:
            if (model, other) in means and other.endswith(several[0]):
                ratios[_short(other)] = f"{float(means[model, other]['ms']) / ms:.2f}x"
        beside = (
            [f"{float(one['ms']):,.0f} ms", f"{float(one['ms']) / ms:.2f}x"] if one else ["", ""]
        )
        label = alone if recipe in plans else f"`{alone}`"
        rows.append([model, label, several[1], f"{ms:,.0f} ms", *beside, *ratios.values()])
    return rows


def _short(name: str) -> str:
    """A baseline's name without its cards, and without whose plan it is."""
    return re.sub(r" \(.*?\)", "", SEVERAL.sub("", name))


SECTION = """{heading}

{gpu}, cards of one host, NCCL, {versions}, bf16, random weights, 50 steps, no CUDA graphs
([rows](results/scaling.csv)). Times are those of a step: of stock methods and of `lossless`, whose
steps are alike, the median of those behind a warm-up, one card and several in turn (the commands
take one after the other); of other recipes the mean of a whole generation, and of several
generations the median. "Than" compares with diffusers' context parallelism on as many cards.
diffusers has no plan for HunyuanVideo: its stock blocks run under ours.

{measured}

```
{commands}
```

**Computed, not measured**, but for a column that says so: the same on 4 and 8 cards of one host,
and how many times faster than on one.

{computed}

A step on P cards is taken to be rest + shared / P + exchange(P). The exchange is
[what is sent](#what-it-costs) over the bandwidth of one all-to-all by itself on the two cards
({speeds} from a process), as if none of it were hidden
behind computing; rest and shared are what the times on one and on two cards leave. Not in it: that
messages become smaller, that kernels have fewer rows each, that [a host](#what-it-costs) has to
launch them in the time of a step, and hosts that do not connect all of their cards alike. Where
tiles are cached within computed layers, more is sent than the share of attention that is counted
here.

```
python tools/scaling_model.py {command} --write
```
"""


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def put_in(page: str, text: str) -> str:
    """A page with the section in the place of its older self, or before ``BEFORE``.

    Raises:
        ValueError: the page has neither.
    """
    older = re.search(rf"^{re.escape(HEADING)}\n.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    if older is not None:
        return f"{page[: older.start()]}{text}\n{page[older.end() :]}"
    at = page.find(f"{BEFORE}\n")
    if at < 0:
        raise ValueError(f"the page needs a heading {BEFORE!r}")
    return f"{page[:at]}{text}\n{page[at:]}"


def exchange_of(pairs: Sequence[str]) -> dict[str, float]:
    """``--exchange``: milliseconds by model.

    Raises:
        ValueError: not ``model=ms``, or not more than 0.
    """
    found = {}
    for pair in pairs:
        model, _, value = pair.partition("=")
        if model not in MODELS or not re.fullmatch(r"\d*\.?\d+", value) or not float(value):
            raise ValueError(f"exchange must be MODEL=MILLISECONDS, got {pair!r}")
        found[model] = float(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--exchange", action="append", default=[], metavar="MODEL=MS")
    parser.add_argument("--csv", type=Path, default=DATA, help="rows of bench e2e --ulysses 2")
    parser.add_argument("--write", action="store_true", help="put the section into docs/scaling.md")
    options = parser.parse_args()
    data = results.read(options.csv, GenerationRow)
    if not data:
        sys.exit(f"{options.csv} has no rows: measure with `bench e2e --ulysses 2` first")
    try:
        text = section(data, exchange_of(options.exchange))
    except ValueError as error:
        sys.exit(str(error))
    if options.write:
        write_text(PAGE, put_in(PAGE.read_text(encoding="utf-8"), text))
    else:
        print(text)


if __name__ == "__main__":
    main()
