"""What an adapter is worth: the same classes with it (tier C) and without (tier A), in one process.

``python tools/tiers.py --csv FILE`` on a card: two models that share their weights, one accelerated
by the adapter of its class, the other by what its first call shows; generations of both and of
stock in turn, from the same noise. Real widths and sequences, random weights; fewer blocks where
time is short. ``--csv FILE --write`` puts its rows into docs/results/tiers.csv, where those of the
same model and recipe are replaced, and makes the table of docs/models.md; ``--device cpu`` is a try
on small models.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tier.cases import CASES, Inputs
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import flashomni
from flashomni import Blocks
from flashomni.lab import results
from flashomni.lab.results import Book, origin, read
from flashomni.models import adapters
from flashomni.util.files import write_text

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "results" / "tiers.csv"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- tiers: tools/tiers.py -->", "<!-- end of tiers -->"
EVERY = "interval=3,warmup=0.2"
RECIPES = {
    "lossless": "lossless",
    "taylorseer": f"taylorseer:{EVERY}",
    "topk": f"topk:q_density=0.5,kv_density=0.5,{EVERY}",
    "balanced": "balanced:min_steps=0",
}


@dataclass(frozen=True)
class Row:
    """One recipe on one class, with its adapter or without (``tier``).

    ``ms`` is the mean step of a generation, ``full_ms`` and ``least_ms`` the medians of its dense
    steps and of its cheapest kind (by the engine's clock). ``error`` is the difference of its
    output from stock's, ``between`` that of the two tiers' outputs, as shares of stock's norm;
    ``psnr_db`` is that of the two, over stock's range.
    """

    model: str
    tokens: int
    blocks: int
    recipe: str
    tier: str
    steps: int
    ms: float
    stock_ms: float
    full_ms: float
    least_ms: float
    error: float
    between: float
    largest: float
    psnr_db: float
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str


@contextlib.contextmanager
def defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """What is made here is made on ``device`` in ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


def made(case: str, device: torch.device) -> tuple[str, list[nn.Module], Inputs]:
    """What tables call it, two models of the same weights, and the arguments of the first call."""
    import diffusers

    name, cls, size, inputs = CASES[case]()
    if device.type == "cpu":
        torch.manual_seed(0)
        model, given = adapters()[cls].tiny()
        twin = type(model).from_config(model.config)
        name, given = f"small {cls}", dict(given)
    else:
        with defaults(device, torch.bfloat16):
            model, given = getattr(diffusers, cls)(**size), inputs()
        with torch.device("meta"):
            twin = type(model).from_config(model.config)
        for key in ("img_ids", "txt_ids", "guidance"):
            if key in given:
                given[key] = given[key].float()
    twin.load_state_dict(model.state_dict(), assign=True)
    for path, module in model.named_modules():  # buffers that no state holds: RoPE's tables
        other = twin.get_submodule(path)
        for key, buffer in module.named_buffers(recurse=False):
            setattr(other, key, buffer)
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(other, key, value)
    return name, [model.eval(), twin.eval()], given


class Lengths(TorchFunctionMode):
    """Queries of every attention that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.add((args[0] if args else kwargs["query"]).shape[-2])
        return func(*args, **(kwargs or {}))


def generation(model: nn.Module, given: Inputs, steps: int, engine: Any = None) -> Tensor:
    """A plain loop over the model, down from its first timestep."""
    cls = adapters()[type(model).__name__]
    x, time_of = given[cls.latents].clone(), "timestep" if "timestep" in given else "t"
    for step in range(steps):
        if engine is not None:
            engine.step(step, steps)
        at = {cls.latents: x, time_of: given[time_of] * (1 - step / steps)}
        out = model(**{**given, **at}, return_dict=False)[0]
        out = torch.stack(out) if isinstance(out, list) else out
        x[tuple(slice(0, size) for size in out.shape)] -= out / steps
    return x


def clocked(device: torch.device, run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds from an idle device to an idle device."""
    waits = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    waits()
    start = time.perf_counter()
    out = run()
    waits()
    return time.perf_counter() - start, out


def compared(
    recipe: str, models: list[nn.Module], given: Inputs, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """The figures of both tiers with one recipe."""
    device = next(models[0].parameters()).device
    engines = [
        flashomni.accelerate(models[0], RECIPES[recipe], graphs=False, blocks=Blocks()),
        flashomni.accelerate(models[1], RECIPES[recipe], graphs=False),
    ]
    try:
        seconds: list[list[float]] = [[], []]
        outs: list[Tensor] = []
        for turn in range(rounds + 1):
            outs = []
            for model, engine, found in zip(models, engines, seconds, strict=True):
                took, out = clocked(
                    device, lambda m=model, e=engine: generation(m, given, steps, e)
                )
                outs.append(out)
                if turn:  # the first compiles
                    found.append(took)
        kinds = [
            {kind: 1e3 * v["median"] for kind, v in e.report().seconds_by_kind.items()}
            for e in engines
        ]
    finally:
        for engine in engines:
            engine.remove()
    for model in models:
        assert flashomni.engine_of(model) is None
    return [
        {"tier": tier, "out": out, "ms": round(1e3 * statistics.median(took) / steps, 3),
         "full_ms": round(kind.get("full", 0.0) or max(kind.values()), 3),
         "least_ms": round(min(kind.values()), 3)}
        for tier, out, took, kind in zip(("A", "C"), outs, seconds, kinds, strict=True)
    ]  # fmt: skip


def measure(case: str, args: argparse.Namespace, until: float) -> Iterator[list[Row]]:
    """Rows of a class, recipe by recipe."""
    device = torch.device(args.device)
    name, models, given = made(case, device)
    about = origin(device, f"python tools/tiers.py --csv {KEPT.name}")
    with Lengths() as lengths:
        generation(models[0], given, 1)
    blocks = len(adapters()[type(models[0]).__name__].sites(models[0]))
    took, stock = clocked(device, lambda: generation(models[0], given, args.steps))
    for recipe in args.recipes:
        if time.time() + took * (2 * args.rounds + 4) > until:
            print(f"{name}: {recipe} left out, no time", flush=True)
            continue
        found = compared(recipe, models, given, args.steps, args.rounds)
        again, _ = clocked(device, lambda: generation(models[0], given, args.steps))
        base = stock.float()
        a, c = (each.pop("out").float() for each in found)
        off = float((a - c).square().mean())
        span = float(base.max() - base.min())
        both = {
            "stock_ms": round(1e3 * (took + again) / 2 / args.steps, 3),
            "between": share(a - c, base),
            "largest": float(f"{float((a - c).abs().max()):.2e}"),
            "psnr_db": round(10 * math.log10(span**2 / off), 1) if off else math.inf,
        }
        yield [
            Row(name, max(lengths.seen), blocks, recipe, steps=args.steps, **tier, **both,
                error=share(out - base, base), **about)
            for tier, out in zip(found, (a, c), strict=True)
        ]  # fmt: skip


def share(off: Tensor, base: Tensor) -> float:
    """A difference as a share of the norm."""
    return float(f"{float(off.norm() / base.norm()):.2e}")


def table(rows: list[dict[str, str]]) -> str:
    """The section of docs/models.md, of the rows of the CSV."""
    if not rows:
        return "Not measured yet.\n"
    pairs = {(row["model"], row["recipe"]): {} for row in rows}
    for row in rows:
        pairs[row["model"], row["recipe"]][row["tier"]] = row
    lines = [
        "| model | recipe | stock | without: a step | with: a step | adapter's gain | "
        "dense step | cheapest step | the two differ | from stock |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for a, c in ((pair["A"], pair["C"]) for pair in pairs.values()):
        size = f"{a['model']} ({int(a['tokens']):,} tokens, {a['blocks']} blocks)"
        lines.append(
            f"| {size} | `{RECIPES[a['recipe']]}` | {ms(a['stock_ms'])} | {ms(a['ms'])} | "
            f"{ms(c['ms'])} | {float(a['ms']) / float(c['ms']):.2f}x | "
            f"{ms(a['full_ms'])}, {ms(c['full_ms'])} | {ms(a['least_ms'])}, {ms(c['least_ms'])} | "
            f"{differ(a)} | {float(a['error']):.1e}, {float(c['error']):.1e} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{'; '.join(origins(rows))}; bf16, milliseconds; one process, generations in turn, no "
            "CUDA graphs, random weights. *Differ*: norm of the difference of the two outputs as a "
            "share of stock's, and PSNR over its range. *From stock*: likewise, without and with "
            "the adapter: of random weights, so no measure of quality.",
            "",
        ]
    )


def origins(rows: list[dict[str, str]]) -> list[str]:
    """What rows were measured on, with their models where that is not one for all."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        about = f"{row['gpu']}, torch {row['torch']}, {row['steps']} steps"
        found.setdefault(about, {})[row["model"]] = None
    if len(found) == 1:
        return list(found)
    return [f"{' and '.join(models)}: {about}" for about, models in found.items()]


def taken(path: Path) -> None:
    """Keep the rows of a run, in the place of those of the same model and recipe."""
    new = read(path, Row)
    fresh = {(row["model"], row["recipe"]) for row in new}
    old = [row for row in read(KEPT, Row) if (row["model"], row["recipe"]) not in fresh]
    write_text(KEPT, results.text(results.columns(Row), [*old, *new]))


def differ(row: dict[str, str]) -> str:
    share, decibels = float(row["between"]), float(row["psnr_db"])
    return f"{share:.1e}, {decibels:.0f} dB" if share else "equal"


def ms(text: str) -> str:
    return f"{float(text):.1f}"


def page(text: str) -> str:
    """docs/models.md with the section as the kept rows make it."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{table(read(KEPT, Row))}\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2, help="timed, after one that compiles")
    parser.add_argument("--seconds", type=float, default=115, help="nothing is begun later")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--write", action="store_true", help="the section of the page, of the CSV")
    args = parser.parse_args()
    if args.write:
        if args.csv is not None:
            taken(args.csv)
        write_text(PAGE, page(PAGE.read_text("utf-8")))
        return
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    start, rows = time.time(), list[Row]()
    book = None if args.csv is None else Book(args.csv, Row)
    for case in args.models:
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        try:
            for found in measure(case, args, start + args.seconds):
                rows += found
                a, c = found
                print(
                    f"{a.model} {a.tokens} tokens {a.blocks} blocks {a.recipe}: stock "
                    f"{a.stock_ms:.1f}, A {a.ms:.1f}, C {c.ms:.1f} ms a step (dense "
                    f"{a.full_ms:.1f}, {c.full_ms:.1f}; least {a.least_ms:.1f}, "
                    f"{c.least_ms:.1f}); A to C "
                    f"{a.between:.1e} {a.psnr_db:.0f} dB; to stock {a.error:.1e}, {c.error:.1e}",
                    flush=True,
                )
                if book is not None:
                    book.write(rows)
        except Exception as error:  # the others are measured all the same
            print(f"{case}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
