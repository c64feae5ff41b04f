"""``flashomni bench e2e`` on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flashomni.cli._common import console, pick_device, say

if TYPE_CHECKING:
    from flashomni.lab.e2e.methods import Plan


def bench_ranks(
    build: tuple[str, str, str, int, float],
    names: list[str] | None,
    baselines: list[str] | None,
    plan: Plan,
    ulysses: int,
    cfg: int,
    csv: Path | None,
) -> None:
    """Recipes on one card and on all, beside stock blocks on one and diffusers' own on all.

    Args:
        build: model, device, dtype, seed and structure.
        names: of recipes; `lossless` and `balanced` if none.
        baselines: one stock method at most, on one card; its attention is diffusers' on all cards.
        plan: how long to run.
        ulysses: ranks that share a sequence.
        cfg: branches that run at once.
        csv: the first rank's rows go there.

    Raises:
        ValueError: a name is not known, or there is more than one baseline.
    """
    from flashomni.cli._models import built, timed
    from flashomni.lab.e2e.methods import parse_recipe
    from flashomni.lab.e2e.ranks import exchange_seconds, methods_on, stocks_on
    from flashomni.lab.e2e.stock import make_stocks
    from flashomni.lab.e2e.table import GenerationRow
    from flashomni.lab.results import Book
    from flashomni.parallel.launch import joined

    name, device, dtype, seed, structure = build
    recipes = dict(parse_recipe(each) for each in names or ["lossless", "balanced"])
    stocks = make_stocks(baselines or ["eager"])
    if len(stocks) > 1:
        raise ValueError(f"baseline must be one on several ranks, got {', '.join(stocks)}")
    with joined(ulysses * cfg, pick_device(device)) as place:
        console.quiet = place.rank > 0
        book = None if csv is None or place.rank else Book(csv, GenerationRow)
        model = built(name, place.device, dtype, seed, structure)
        attention = next(iter(stocks.values())).attention
        stocks |= stocks_on(place.size, attention, model.transformers)
        graphs = plan.generation > 2  # which is when they replay
        timed(model, stocks, methods_on(recipes, ulysses, cfg, graphs), plan, book)
        config = model.transformers[0].config
        width = config.num_attention_heads * config.attention_head_dim
        nbytes = 2 * model.tokens * width // place.size
        seconds = exchange_seconds(nbytes, place.device)
        say(f"an exchange of {nbytes / 1e6:.1f} MB a rank takes {seconds * 1e3:.3f} ms by itself")
