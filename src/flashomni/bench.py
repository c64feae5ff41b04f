"""Speed of the ops, as ratios within one run: correctness first, baseline interleaved, medians."""

from __future__ import annotations

import csv
import io
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashomni.engine.files import write_text
from flashomni.kernels import (
    select,
    sparse_attention,
    sparse_gemm_o,
    sparse_gemm_q,
)
from flashomni.kernels.attention import AttentionCall
from flashomni.symbols import Grid, Symbols
from flashomni.versions import commit, device_name


@dataclass(frozen=True)
class Shape:
    """A real problem: tokens (text included), heads, head_dim."""

    seqlen: int
    num_heads: int
    head_dim: int
    text: tuple[int, int] = (0, 0)


SHAPES = {
    "cpu-4096": Shape(4096, 4, 64),
    "tiny-image": Shape(4160, 4, 64, (0, 64)),
    "flux-1024": Shape(4608, 24, 128, (0, 512)),
    "flux-2048": Shape(16896, 24, 128, (0, 512)),
    "hunyuan-33k": Shape(32656, 24, 128, (32400, 32656)),
}


@dataclass(frozen=True)
class Row:
    """One measurement. ``linear`` is ratio x density: 1 where time falls with the work."""

    op: str
    shape: str
    seqlen: int
    density: float
    backend: str
    ms: float
    baseline: str
    baseline_ms: float
    ratio: float
    linear: float
    device: str
    torch: str
    commit: str
    command: str


def random_symbols(grid: Grid, num_heads: int, density: float, cached: bool, seed: int) -> Symbols:
    """Independent random symbols of exactly this density (to whole blocks) in every row.

    Args:
        grid: blocks; text rules are left out, so that the density is the one asked for.
        num_heads: heads.
        density: of S_c if ``cached``, else of S_s.
        cached: thin out S_c and visit everything, or compute everything and thin out S_s.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = grid.num_q_blocks, grid.num_kv_blocks

    def choose(*shape: int) -> Tensor:
        count = max(round(density * shape[-1]), 1)
        rank = torch.rand(shape, generator=generator).argsort(-1).argsort(-1)
        return rank < count

    q_mask = choose(1, num_heads, rows) if cached else torch.ones(1, num_heads, rows).bool()
    kv_mask = torch.ones(1, num_heads, rows, columns).bool()
    if not cached:
        kv_mask = choose(1, num_heads, rows, columns)
    return Symbols.pack(q_mask, kv_mask, grid)


def interleaved(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict:
    """Median milliseconds of each run; the runs take turns, so a drifting machine hits all."""

    def timed(run: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(run))
    return {name: statistics.median(values) for name, values in times.items()}


@dataclass(frozen=True)
class Problem:
    """What to time: ours against the dense baseline, and how to check it first."""

    backend: str
    baseline: str
    ours: Callable[[], Tensor]
    dense: Callable[[], Tensor]
    exact: Callable[[], Tensor]


def attention_problem(
    shape: Shape, density: float, device: torch.device, dtype: torch.dtype, cached: bool = False
) -> Problem:
    """``sparse_attention`` against torch's fused dense attention."""
    size = (1, shape.seqlen, shape.num_heads, shape.head_dim)
    q, k, v = (torch.randn(size, device=device, dtype=dtype) for _ in range(3))
    grid = Grid(shape.seqlen, shape.seqlen)
    symbols = random_symbols(grid, shape.num_heads, density, cached, seed=0).to(device)
    out, sdpa = torch.zeros_like(q), torch.nn.functional.scaled_dot_product_attention
    call = AttentionCall(q, k, v, out, None, symbols, None, shape.head_dim**-0.5)
    return Problem(
        select("attention", call).name,
        "torch sdpa",
        lambda: sparse_attention(q, k, v, symbols, out=out),
        lambda: sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)),
        lambda: sparse_attention(q, k, v, symbols, out=torch.zeros_like(q), backend="reference"),
    )


def gemm_q_problem(
    shape: Shape, density: float, device: torch.device, dtype: torch.dtype
) -> Problem:
    """``sparse_gemm_q`` against ``F.linear``."""
    width = shape.num_heads * shape.head_dim
    x = torch.randn(1, shape.seqlen, width, device=device, dtype=dtype)
    weight = torch.randn(width, width, device=device, dtype=dtype) / width**0.5
    bias = torch.randn(width, device=device, dtype=dtype)
    grid = Grid(shape.seqlen, shape.seqlen)
    symbols = random_symbols(grid, shape.num_heads, density, True, seed=0).to(device)
    out = x.new_zeros(1, shape.seqlen, shape.num_heads, shape.head_dim)
    return Problem(
        _best("gemm_q", device),
        "torch linear",
        lambda: sparse_gemm_q(x, weight, bias, symbols, out=out),
        lambda: torch.nn.functional.linear(x, weight, bias),
        lambda: sparse_gemm_q(
            x, weight, bias, symbols, out=torch.zeros_like(out), backend="reference"
        ),
    )


def gemm_o_problem(
    shape: Shape, density: float, device: torch.device, dtype: torch.dtype
) -> Problem:
    """``sparse_gemm_o`` with one bias term against ``F.linear``."""
    width = shape.num_heads * shape.head_dim
    o = torch.randn(1, shape.seqlen, shape.num_heads, shape.head_dim, device=device, dtype=dtype)
    weight = torch.randn(width, width, device=device, dtype=dtype) / width**0.5
    bias = torch.randn(width, device=device, dtype=dtype)
    terms = torch.randn(1, 1, shape.seqlen, width, device=device, dtype=dtype)
    weights = torch.ones(1, device=device)
    grid = Grid(shape.seqlen, shape.seqlen)
    symbols = random_symbols(grid, shape.num_heads, density, True, seed=0).to(device)
    out = terms.new_empty(1, shape.seqlen, width)
    return Problem(
        _best("gemm_o", device),
        "torch linear",
        lambda: sparse_gemm_o(o, weight, bias, symbols, terms, weights, out=out),
        lambda: torch.nn.functional.linear(o.flatten(2), weight, bias),
        lambda: sparse_gemm_o(o, weight, bias, symbols, terms, weights, backend="reference"),
    )


PROBLEMS = {"attention": attention_problem, "gemm_q": gemm_q_problem, "gemm_o": gemm_o_problem}


def _best(op: str, device: torch.device) -> str:
    from flashomni.kernels import backends

    names = backends(op)
    return names[0] if device.type == "cuda" else "cpu"


def measure(
    op: str,
    shape: str,
    densities: list[float],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    command: str,
) -> Iterator[Row]:
    """One row a density, as it is measured.

    Raises:
        ValueError: unknown op or shape.
        RuntimeError: the op's result is wrong; then nothing is timed.
    """
    if op not in PROBLEMS:
        raise ValueError(f"op must be one of {', '.join(PROBLEMS)}, got {op!r}")
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    # Freeing a block this large once lets the C allocator keep such blocks, not return them
    # to the system at every call, as in a process that has run a model. Both sides gain.
    torch.ones(24 * 2**20, dtype=torch.uint8)
    for density in densities:
        torch.manual_seed(0)
        problem = PROBLEMS[op](SHAPES[shape], density, device, dtype)
        _check(problem, dtype)
        ms = interleaved({"ours": problem.ours, "dense": problem.dense}, device, rounds)
        ratio = ms["dense"] / ms["ours"]
        yield Row(
            op=op,
            shape=shape,
            seqlen=SHAPES[shape].seqlen,
            density=density,
            backend=problem.backend,
            ms=round(ms["ours"], 4),
            baseline=problem.baseline,
            baseline_ms=round(ms["dense"], 4),
            ratio=round(ratio, 3),
            linear=round(ratio * density, 3),
            device=device_name(device),
            torch=torch.__version__,
            commit=commit(),
            command=command,
        )


def _check(problem: Problem, dtype: torch.dtype) -> None:
    """Compare with the fp32 definition before anything is timed."""
    got, exact = problem.ours().float(), problem.exact().float()
    error = ((got - exact).norm() / exact.norm()).item()
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    if not error <= limit:
        raise RuntimeError(f"relative error {error:.2e} is above {limit:.0e}: nothing is timed")


def save(rows: list[Row], path: Path) -> None:
    """Append rows to a CSV, with a header if it is new; the file appears whole or not at all."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(asdict(rows[0])), lineterminator="\n")
    if not old:
        writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(path, old + buffer.getvalue())
