"""Speed of the Hopper GEMMs against cuBLAS: correctness first, CUDA graphs, interleaved, medians.

    python benchmarks/gemm_h200.py [--tokens 33024,4608] [--rounds 9] [--out rows.json]

Every call is timed whole, work lists included. The baseline is ``torch.nn.functional.linear`` of
the same shape, with or without bias, whichever is faster. Inputs rotate so that no call finds its
own in L2. A part that fails is reported and does not hide the others; exits 1 if one failed or if
a result was wrong, never for a speed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from flashomni.bench import random_symbols
from flashomni.kernels import gemm_o_update, sparse_gemm_o, sparse_gemm_q
from flashomni.kernels._live_tiles import TileRows, head_words, live_tiles
from flashomni.kernels.gemm_q import pack_rope
from flashomni.symbols import Grid, Symbols

HEADS, HEAD_DIM, WIDTH = 24, 128, 3072
DENSITIES = (1.0, 0.5, 0.25, 0.1)
MS_A_GRAPH = 8.0
TARGETS = {
    ("gemm_q", 33024): (1.0, 2.0, 3.8, 8.8),
    ("gemm_q norm+rope", 33024): (0.97, 1.93, 3.7, 8.2),
    ("gemm_o 1 term", 33024): (0.97, 1.9, 3.5, 6.3),
    ("gemm_q", 4608): (None, 1.85, 3.3, None),
    ("gemm_o 1 term", 4608): (None, 1.85, 3.1, None),
}


class Layer:
    """Rotating inputs of one size; projections of one layer."""

    def __init__(self, tokens: int, sets: int) -> None:
        kind = {"device": "cuda", "dtype": torch.bfloat16}
        self.tokens, self.sets = tokens, sets
        self.grid = Grid(tokens, tokens)
        self.x = [torch.randn(1, tokens, WIDTH, **kind) for _ in range(sets)]
        self.y = [torch.empty(1, tokens, WIDTH, **kind) for _ in range(sets)]
        self.terms = [torch.randn(2, 1, tokens, WIDTH, **kind) for _ in range(sets)]
        self.weight = torch.randn(WIDTH, WIDTH, **kind) / WIDTH**0.5
        self.bias = torch.randn(WIDTH, **kind)
        self.norm = torch.rand(HEAD_DIM, **kind) + 0.5
        angle = torch.rand(tokens, HEAD_DIM // 2, device="cuda") * 6
        self.rope = pack_rope(*(t.repeat_interleave(2, -1) for t in (angle.cos(), angle.sin())))
        self.coefficients = torch.tensor([0.7, -1.3], device="cuda")

    def symbols(self, density: float) -> Symbols:
        return random_symbols(self.grid, HEADS, density, True, seed=0).to("cuda")

    def heads(self, tensors: list[Tensor], i: int) -> Tensor:
        return tensors[i % self.sets].view(1, self.tokens, HEADS, HEAD_DIM)

    def gemm_q(self, symbols: Symbols, i: int, fused: bool, **options) -> Tensor:
        if fused:
            options |= {"norm_weight": self.norm, "norm_eps": 1e-6, "rope": self.rope}
        out, x = self.heads(self.y, i), self.x[i % self.sets]
        return sparse_gemm_q(x, self.weight, self.bias, symbols, out=out, **options)

    def gemm_o(self, symbols: Symbols, i: int, count: int, **options) -> Tensor:
        terms = coefficients = None
        if count:
            terms = self.terms[i % self.sets][:count]
            coefficients = self.coefficients[:count]
        out, o = self.y[i % self.sets], self.heads(self.x, i)
        arguments = (o, self.weight, self.bias, symbols, terms, coefficients)
        return sparse_gemm_o(*arguments, out=out, **options)

    def update(self, symbols: Symbols, i: int, count: int, **options) -> tuple[Tensor, Tensor]:
        history = [self.heads(self.x, i + j) for j in range(count)]
        terms = self.terms[i % self.sets][:count]
        out = self.y[i % self.sets]
        arguments = (history, self.weight, self.bias, symbols)
        return gemm_o_update(*arguments, out=out, bias_terms=terms, **options)


def error(got: Tensor, exact: Tensor) -> float:
    """Relative error in the 2-norm; absolute where all is zero."""
    size = float(exact.double().norm())
    return float((got.double() - exact.double()).norm()) / (size or 1.0)


def check(tokens: int) -> list[str]:
    """Each op against its definition; returns what is wrong."""
    layer, errors, wrong = Layer(tokens, 2), {}, []
    x, y = layer.x[0], layer.y[0]
    for density in (1.0, 0.5, 0.1):
        symbols = layer.symbols(density)
        cached = ~symbols.q_mask().repeat_interleave(128, -1)[..., :tokens].mT[..., None]
        for fused in (False, True):
            exact = layer.gemm_q(symbols, 0, fused, backend="reference").clone()
            y.fill_(7.0)
            got = layer.gemm_q(symbols, 0, fused, backend="sm90")
            if not (got == 7.0).masked_fill(~cached, True).all():
                wrong.append(f"gemm_q at {tokens} tokens wrote a cached tile")
            pair = (t.masked_fill(cached, 0.0) for t in (got, exact))
            errors["gemm_q", fused, density] = error(*pair)
        clean = x.clone()
        for count in (0, 1, 2):
            exact = layer.gemm_o(symbols, 0, count, backend="reference").clone()
            layer.heads(layer.x, 0).masked_fill_(cached, float("nan"))
            y.fill_(float("nan"))
            got = layer.gemm_o(symbols, 0, count, backend="sm90")
            errors["gemm_o", count, density] = error(got, exact)
            x.copy_(clean)
        exact_out, exact_terms = (
            t.clone() for t in layer.update(symbols, 0, 2, backend="reference")
        )
        y.fill_(float("nan"))
        layer.terms[0].fill_(float("nan"))
        out, terms = layer.update(symbols, 0, 2, backend="sm90")
        errors["update out", 2, density] = error(out, exact_out)
        errors["update terms", 2, density] = error(terms, exact_terms)
        layer.terms[0].normal_()
    wrong += [
        f"{name} {option} at {tokens} tokens, density {density}: relative error {value:.2e}"
        for (name, option, density), value in errors.items()
        if not value < 5e-3  # NaN is wrong as well
    ]
    print(f"check {tokens} tokens: largest relative error {max(errors.values()):.1e}", flush=True)
    return wrong


def capture(run: Callable[[int], object], sets: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of about ``MS_A_GRAPH`` of calls that rotate the inputs, and how many they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(sets):
            run(i)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(6):
            run(i)
        stop.record()
        stop.synchronize()
        count = max(2 * sets, min(200, int(MS_A_GRAPH / max(start.elapsed_time(stop) / 6, 0.01))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                run(i)
    torch.cuda.current_stream().wait_stream(stream)
    return graph, count


def replay(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """Milliseconds of one call."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / count


def runs(layer: Layer) -> dict[tuple[str, float], Callable[[int], object]]:
    """What is timed: (name, density) -> call with the inputs of a set."""
    linear = torch.nn.functional.linear
    chosen: dict[tuple[str, float], Callable[[int], object]] = {
        ("cuBLAS", 1.0): lambda i: linear(layer.x[i % layer.sets], layer.weight),
        ("cuBLAS bias", 1.0): lambda i: linear(layer.x[i % layer.sets], layer.weight, layer.bias),
    }
    for density in DENSITIES:
        s = layer.symbols(density)
        tiles = TileRows.of(s, layer.tokens, 0)
        chosen |= {
            ("gemm_q", density): lambda i, s=s: layer.gemm_q(s, i, False),
            ("gemm_q norm+rope", density): lambda i, s=s: layer.gemm_q(s, i, True),
            ("gemm_o 0 terms", density): lambda i, s=s: layer.gemm_o(s, i, 0),
            ("gemm_o 1 term", density): lambda i, s=s: layer.gemm_o(s, i, 1),
            ("gemm_o 2 terms", density): lambda i, s=s: layer.gemm_o(s, i, 2),
            ("update 1 term", density): lambda i, s=s: layer.update(s, i, 1),
            ("update 2 terms", density): lambda i, s=s: layer.update(s, i, 2),
            ("list of gemm_q", density): lambda i, s=s, t=tiles: live_tiles(s, t),
            ("list of gemm_o", density): lambda i, s=s, t=tiles: head_words(s, t, cached=False),
        }
    return chosen


def measure(tokens: int, rounds: int) -> list[dict]:
    """Median milliseconds of every run, taken in turns in random order."""
    layer = Layer(tokens, 4 if tokens < 8000 else 2)
    graphs = {}
    for key, run in runs(layer).items():
        try:
            graphs[key] = capture(run, layer.sets)
        except Exception:
            print(f"FAILED {key} at {tokens} tokens\n{traceback.format_exc(limit=-3)}", flush=True)
    times: dict[tuple[str, float], list[float]] = {key: [] for key in graphs}
    order = random.Random(0)
    for _ in range(rounds):
        for key in order.sample(list(graphs), len(graphs)):
            graphs[key][0].replay()  # warm
            times[key].append(replay(*graphs[key]))
    return [
        {"tokens": tokens, "name": name, "density": density, "ms": statistics.median(found),
         "fastest": min(found), "slowest": max(found)}
        for (name, density), found in times.items()
    ]  # fmt: skip


def table(rows: list[dict]) -> None:
    """Times and ratios to the baseline, beside the targets."""
    for tokens in sorted({row["tokens"] for row in rows}, reverse=True):
        of_size = {(r["name"], r["density"]): r for r in rows if r["tokens"] == tokens}
        baselines = [of_size[key] for key in of_size if key[0].startswith("cuBLAS")]
        if not baselines:
            print(f"{tokens} tokens: no baseline")
            continue
        for row in baselines:
            print(
                f"{tokens} tokens, {row['name']}: {row['ms'] * 1e3:.1f} us "
                f"[{row['fastest'] * 1e3:.1f} .. {row['slowest'] * 1e3:.1f}]"
            )
        best = min(row["ms"] for row in baselines)
        print(f"{'us (times cuBLAS, target)':18s}" + "".join(f"{d:>24g}" for d in DENSITIES))
        for name in dict.fromkeys(key[0] for key in of_size if not key[0].startswith("cuBLAS")):
            cells = []
            wanted = TARGETS.get((name, tokens), (None,) * len(DENSITIES))
            for density, target in zip(DENSITIES, wanted, strict=True):
                row = of_size.get((name, density))
                if row is None:
                    cells.append("failed")
                    continue
                ratio = best / row["ms"]
                goal = "" if target is None else f" {'>=' if ratio >= target else '< '}{target}"
                cells.append(f"{row['ms'] * 1e3:.1f} ({ratio:.2f}{goal})")
            print(f"{name:18s}" + "".join(f"{cell:>24s}" for cell in cells), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="33024,4608")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    where = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
    }
    print(where, flush=True)
    failed = False
    rows: list[dict] = []
    for tokens in (4500, 33000):  # ragged
        try:
            for line in check(tokens):
                print(f"WRONG {line}", flush=True)
                failed = True
        except Exception:
            traceback.print_exc()
            failed = True
    if failed:
        print("not timed: a check failed")
        return 1
    for tokens in (int(part) for part in arguments.tokens.split(",")):
        try:
            rows += measure(tokens, arguments.rounds)
        except Exception:
            traceback.print_exc()
            failed = True
        torch.cuda.empty_cache()
    table(rows)
    if arguments.out:
        arguments.out.write_text(json.dumps({"where": where, "rows": rows}, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
